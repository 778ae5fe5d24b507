"""What the tables of benchmarks/recipes.py rest on: differences paired by patient, and a test fold opened once."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from panfm.files import read_json
from panfm.measures.statistics import compute_bootstrap_seed, compute_interval, draw_group_weights
from tests.board.fabricated import write_trial

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TASK = "lesions"
REPLICATES = 40
NAMES = {"latent": ["latent-s0", "latent-s1"], "random": ["random-s0", "random-s1"]}
STRENGTHS = {"latent-s0": 2.0, "latent-s1": 1.6, "random-s0": 0.7, "random-s1": 0.6, "another": 3.0}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark, which is scripts and no package."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("recipes_compare")
    monkeypatch.setattr(module, "NUM_REPLICATES", REPLICATES)
    return module


@pytest.fixture
def plan(harness: Any, tmp_path: Path) -> Any:
    return harness.Plan(
        out=tmp_path,
        minutes=1.0,
        seeds=(0, 1),
        recipes=("latent", "random"),
        tasks=(TASK,),
        fractions=(0.1,),
        draws=2,
        turn_seconds=1.0,
    )


def test_a_difference_is_paired_over_patients_and_a_mean_over_draws_and_seeds(harness: Any, plan: Any) -> None:
    paths: dict[str, list[Path]] = {}
    for name, strength in STRENGTHS.items():
        paths[name] = [
            write_trial(plan.out / "results", name, TASK, strength, fraction=0.1, draw=draw) for draw in range(2)
        ]
    write_trial(plan.out / "results", "latent-s0", TASK, 9.0, fraction=0.1, draw=2)  # a draw that is not asked for

    cells = harness.compute_cells(plan, NAMES, "test")
    (row,) = harness.compare(cells)

    groups = pq.read_table(paths["another"][0].with_suffix(".parquet"))["group"].to_pylist()
    weights = draw_group_weights(groups, REPLICATES, compute_bootstrap_seed(TASK, f"split-{TASK}"))
    points, replicates = {}, {}
    for recipe, names in NAMES.items():
        runs = [score_by_hand(path, weights) for name in names for path in paths[name]]
        points[recipe] = np.mean([point for point, _ in runs])
        replicates[recipe] = np.mean([resampled for _, resampled in runs], axis=0)
    assert row.recipe == "latent" and row.peer_recipe == "random"
    assert row.difference == pytest.approx(points["latent"] - points["random"], abs=1e-6)
    interval = compute_interval(replicates["latent"] - replicates["random"], 60)
    assert (row.low, row.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    by_seed = [np.mean([score_by_hand(path, weights)[0] for path in paths[name]]) for name in NAMES["latent"]]
    spread = next(cell.spread for cell in cells if cell.recipe == "latent")
    assert spread == pytest.approx(np.std(by_seed, ddof=1), abs=1e-6)


def test_the_test_fold_is_opened_once(harness: Any, plan: Any) -> None:
    open_test = importlib.import_module("recipes").open_test
    first = replace(plan, seeds=(0,))
    open_test(first)
    open_test(first)
    assert [look["seeds"] for look in read_json(plan.out / "test_opened.json")["looks"]] == [[0]]

    open_test(plan)  # nothing is chosen by training the same recipes once more
    assert [look["seeds"] for look in read_json(plan.out / "test_opened.json")["looks"]] == [[0], [0, 1]]

    for other in (
        replace(plan, recipes=("mae", "random")),
        replace(plan, minutes=2.0),
        replace(plan, tasks=("moles",)),
    ):
        with pytest.raises(SystemExit, match="it is opened once"):
            open_test(other)


def score_by_hand(path: Path, weights: Any) -> tuple[float, Any]:
    """AUROC of a trial, and of every resample, in which an image stands as often as its patient was drawn."""
    table = pq.read_table(path.with_suffix(".parquet"))
    labels = np.array(table["label"].to_pylist())
    scores = np.array(table["scores"].to_pylist())[:, 1]
    resamples = [np.repeat(np.arange(len(labels)), times) for times in weights]
    return roc_auc_score(labels, scores), np.array([roc_auc_score(labels[rows], scores[rows]) for rows in resamples])
