"""The pages behind the board: figures are those of `measures`, few patients are not shown, nobody is identified."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from scipy.stats import binomtest

from panfm.board.build import build_leaderboard
from panfm.board.standings import compute_standings
from panfm.board.task_charts import trace_event_free
from panfm.board.task_pages import TaskPage, find_reference
from panfm.config import validate
from panfm.errors import UserError
from panfm.evaluation.operating import describe_thresholds
from panfm.evaluation.results import (
    MetricValue,
    get_scores,
    make_outcome,
    read_predictions,
    read_results,
    write_predictions,
    write_result,
)
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.tasks import TaskCard
from panfm.measures.by_family import compute_point
from panfm.measures.operating_points import choose_thresholds, measure_operating_point
from panfm.measures.statistics import compute_bootstrap_seed
from panfm.measures.subgroups import MIN_SHOWN_GROUPS, compare_subgroups
from panfm.shards.index import ShardSet
from tests.board.fabricated import GOOD, RANDOM, write_trial

NUM_GROUPS = 160


def make_levels() -> dict[str, list[str | None]]:
    """Levels of 160 groups of three images: sexes by group, a rare site, one attribute that all share."""
    group = np.repeat(np.arange(NUM_GROUPS), 3)
    sex: list[str | None] = [None if one % 16 == 15 else "female" if one % 5 < 2 else "male" for one in group]
    site: list[str | None] = ["toe" if one < 8 else "arm" if one < 80 else "trunk" for one in group]
    kind: list[str | None] = ["histopathology" if one % 2 or one % 3 == 0 else "follow_up" for one in group]
    return {"sex": sex, "anatomic_site": site, "device": ["camera"] * len(group), "confirmed_by": kind}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages") / "results"
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 300)
    positive = 1 / (1 + np.exp(-(2 * labels - 1 + rng.normal(size=300))))
    chosen = {"C": 1.0, **describe_thresholds(labels, np.stack([1 - positive, positive], axis=1))}
    for encoder, strength in ((GOOD, 1.5), (RANDOM, 0.3)):
        write_trial(
            root, encoder, "lesions", strength, num_groups=NUM_GROUPS, subgroups=make_levels(),
            settings={"chosen": chosen, "split_notes": ["3 images without the label malignant"]},
        )  # fmt: skip
        write_trial(root, encoder, "diagnoses", strength, classes=4, num_groups=NUM_GROUPS, subgroups=make_levels())
    return root


@pytest.fixture(scope="module")
def pages(results: Path) -> dict[str, TaskPage]:
    return {page.task.name: page for page in compute_standings([results]).pages}


def read_rows(results: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores and groups of the good encoder on the task of two classes."""
    path = next(path for path, one in read_results([results]) if (one.task, one.encoder.name) == ("lesions", GOOD))
    table = read_predictions(path.with_suffix(".parquet"))
    return np.asarray(table["label"]), get_scores(table), np.array(table["group"].to_pylist())


def test_operating_points_are_transferred(results: Path, pages: dict[str, TaskPage]) -> None:
    labels, scores, groups = read_rows(results)
    details = next(one for one in pages["lesions"].encoders if one.encoder == GOOD)
    assert [one.threshold.wanted for one in details.operating_points] == [0.9, 0.95, 0.9, 0.95]
    for point in details.operating_points:
        assert point == measure_operating_point(point.threshold, labels, scores[:, 1], groups)
    own = choose_thresholds(labels, scores[:, 1])[0]
    assert details.common is not None and details.common.value != pytest.approx(own.value)  # not the test's own


def test_subgroups_at_the_common_threshold(results: Path, pages: dict[str, TaskPage]) -> None:
    labels, scores, groups = read_rows(results)
    details = next(one for one in pages["lesions"].encoders if one.encoder == GOOD)
    assert list(details.subgroups) == ["sex", "anatomic_site"] and details.common is not None
    levels = make_levels()
    expected = compare_subgroups(
        labels, scores[:, 1], groups, levels["sex"], threshold=details.common.value, reference="male",
        seed=compute_bootstrap_seed("lesions", "split-lesions"), num_replicates=2,
    )  # fmt: skip
    table = details.subgroups["sex"]
    assert (table.reference, table.num_unknown, table.threshold) == ("male", 30, details.common.value)
    for ours, theirs in zip(table.levels, expected.levels, strict=True):
        assert (ours.sensitivity, ours.specificity, ours.calibration_gap) == (
            theirs.sensitivity, theirs.specificity, theirs.calibration_gap,
        )  # fmt: skip
        assert ours.sensitivity_difference == theirs.sensitivity_difference
    assert details.confirmation is not None and details.confirmation.num_histology == 3 * 107


def test_the_reference_that_a_card_declares_is_taken(tmp_path: Path) -> None:
    levels = make_levels()
    for name, declared in (("as_it_is", {}), ("declared", {"sex": "female"}), ("unknown", {"sex": "neither"})):
        write_trial(
            tmp_path / name, GOOD, "lesions", 2.0, num_groups=NUM_GROUPS, subgroups=levels,
            settings={"references": declared},
        )  # fmt: skip
        page, *_ = compute_standings([tmp_path / name]).pages
        (details,) = page.encoders
        assert details.subgroups["sex"].reference == ("female" if name == "declared" else "male")


def test_reference_is_the_largest_level_and_never_other() -> None:
    groups = np.array(["a", "a", "a", "b", "c", "d", "e", "f"])
    assert find_reference(["x", "x", "x", "y", "y", "other", "other", "other"], groups) == "y"
    assert find_reference([None, "b", "b", "a", None, None, None, None], groups) == "a"


def test_pages_tell_what_they_show_and_hide(results: Path, tmp_path: Path) -> None:
    build_leaderboard([results], tmp_path)
    page = (tmp_path / "tasks/lesions.html").read_text()
    assert 'href="tasks/lesions.html"' in (tmp_path / "index.html").read_text()
    assert 'href="../index.html"' in page and "For research only" in page
    shown = (
        "Operating points", "Do the probabilities keep what they promise?", "Would acting on it do good?",
        "By how the diagnosis was confirmed", "90 % sensitivity", "3 images without the label malignant",
        "no subgroups by device: all test images with a known one are camera", "Reference: male.",
    )  # fmt: skip
    for words in shown:
        assert words in page, words
    toe = page.split('<th scope="row" class="name">toe</th>')[1].split("</tr>")[0]
    assert f"fewer than {MIN_SHOWN_GROUPS} groups" in toe
    assert "% positive" not in toe and "24" not in toe and "(4)" not in toe
    assert "k0001" not in page and "p001" not in page and "data:image" not in page
    assert page.count("http") == page.count("http-equiv") + page.count("https://vega.github.io/schema/")  # a name
    several = (tmp_path / "tasks/diagnoses.html").read_text()
    assert "Share of images whose most probable class is right" in several and "Operating points" not in several
    assert "Would acting" not in several and "Do the probabilities keep" in several


def test_any_metric_that_does_not_follow_is_refused(results: Path, tmp_path: Path) -> None:
    write_trial(tmp_path, GOOD, "lesions", 1.5)
    result = read_results([tmp_path])[0][1]
    forged = {**result.metrics, "accuracy": result.metrics["auroc"].model_copy(update={"value": 0.999})}
    write_result(tmp_path, result.model_copy(update={"metrics": forged}))
    with pytest.raises(UserError, match=r"accuracy is 0\.999, but .* follows from its predictions"):
        compute_standings([tmp_path])


def test_an_encoder_name_cannot_write_on_the_page(tmp_path: Path) -> None:
    write_trial(tmp_path / "r", "<script>alert(1)</script>", "lesions", 1.0, subgroups=None)
    build_leaderboard([tmp_path / "r"], tmp_path)
    page = (tmp_path / "tasks/lesions.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "\\u003cscript\\u003ealert(1)" in page
    assert "No thresholds: this protocol has no out-of-fold training scores" in page


def test_an_evaluation_brings_subgroups_and_thresholds(
    clinic: ShardSet, make_task: Callable[..., TaskCard], tmp_path: Path
) -> None:
    card = make_task(subgroups=["modality", "sex"])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / f"{card.name}.yaml").write_text(yaml.safe_dump(card.model_dump(mode="json")))
    config = {
        "encoders": [{"address": "timm:test_vit@random:0?image_size=32", "name": "tiny"}], "shards": [str(clinic.path)],
        "task_dir": str(tmp_path / "tasks"), "out": str(tmp_path / "results"), "fractions": [1.0], "device": "cpu",
        "cache_dir": str(tmp_path / "cache"), "num_replicates": 100, "protocols": ["linear_probe"],
    }  # fmt: skip
    run_evaluation(validate(EvaluateConfig, config, where="test"))
    page = compute_standings([tmp_path / "results"]).pages[0]
    (details,) = page.encoders
    assert [point.threshold.wanted for point in details.operating_points] == [0.9, 0.95, 0.9, 0.95]
    assert details.common is not None and details.common.reached >= 0.9
    assert "no subgroups by modality: all test images with a known one are clinical" in page.notes
    assert "no subgroups by sex: unknown throughout" in page.notes
    assert "6 images without the label diagnosis" in page.notes
    assert (page.positive, page.encoders[0].calibration is not None) == ("melanoma", True)


@pytest.mark.parametrize("images_a_group", [1, 3])
def test_mcnemar_is_shown_where_every_image_is_another_patient(tmp_path: Path, images_a_group: int) -> None:
    root = tmp_path / "results"
    for encoder, strength in ((GOOD, 3.0), (RANDOM, 0.2)):
        path = write_trial(root, encoder, "lesions", strength, num_groups=80)
        if images_a_group == 3:
            continue
        result = next(one for found, one in read_results([root]) if found == path)
        table = read_predictions(path.with_suffix(".parquet"))
        groups = pa.array([f"g{number:03d}" for number in range(len(table))])
        sha256 = write_predictions(path.with_suffix(".parquet"), table.set_column(1, "group", groups))
        write_result(root, result.model_copy(update={"predictions_sha256": sha256, "num_test_groups": len(table)}))
    (page,) = compute_standings([root]).pages
    build_leaderboard([root], tmp_path)
    html = (tmp_path / "tasks" / f"{page.task.slug}.html").read_text()
    assert ("Right on which images?" in html) == (images_a_group == 1)
    if images_a_group == 3:
        assert page.right_more == () and page.reference is None
        return
    labels, *_ = read_rows(root)
    tables = {
        one.encoder.name: get_scores(read_predictions(path.with_suffix(".parquet"))).argmax(axis=1) == labels
        for path, one in read_results([root])
    }
    (line,) = page.right_more
    assert (line.encoder, page.reference) == (GOOD, RANDOM)
    only_good, only_random = (tables[GOOD] & ~tables[RANDOM]).sum(), (tables[RANDOM] & ~tables[GOOD]).sum()
    assert (line.found.num_only_a, line.found.num_only_b) == (only_good, only_random)
    expected = binomtest(int(only_random), int(only_good + only_random), 0.5).pvalue
    assert line.p_adjusted == pytest.approx(expected) and expected < 0.05


@pytest.mark.parametrize(("num_high", "is_shown"), [(40, True), (MIN_SHOWN_GROUPS - 1, False)])
def test_follow_up_is_split_by_the_cut_off_of_training(tmp_path: Path, num_high: int, is_shown: bool) -> None:
    """Patients at high risk have the event on days 1, 2, ...; the others are followed to day 100 without it."""
    root = tmp_path / "results"
    path = write_trial(root, GOOD, "lesions", 1.0, num_groups=100)
    old = next(result for found, result in read_results([root]) if found == path)
    is_high = np.arange(100) < num_high
    targets = np.stack([np.where(is_high, np.arange(100) + 1.0, 100.0), is_high], axis=1)
    scores = np.stack([np.where(is_high, 2.0, -1.0), np.where(is_high, 0.1, 0.9)], axis=1)
    predictions = pa.table({
        "key": [f"k{number:03d}" for number in range(100)], "group": [f"p{number:03d}" for number in range(100)],
        "fold": ["test"] * 100, "repeat": [0] * 100, "draw": [0] * 100, "label": [0] * 100,
        "scores": scores.astype(np.float32).tolist(), "targets": targets.tolist(),
    })  # fmt: skip
    sha256 = write_predictions(path.with_suffix(".parquet"), predictions)
    _, outcome = make_outcome(read_predictions(path.with_suffix(".parquet")), (50.0,))
    value = compute_point("survival", "harrell_c", outcome).value
    write_result(
        root,
        old.model_copy(
            update={
                "family": "survival", "unit": "patient", "classes": (), "primary_metric": "harrell_c", "num_test": 100,
                "metrics": {"harrell_c": MetricValue(value=value, direction="higher")}, "predictions_sha256": sha256,
                "settings": {"grid": [50.0], "chosen": {"cut_off": 0.5}},
            }
        ),
    )  # fmt: skip
    (page,) = compute_standings([root]).pages
    found = page.encoders[0].follow_up
    assert found is not None and (found.num_low, found.num_high) == (100 - num_high, num_high)
    build_leaderboard([root], tmp_path)
    html = (tmp_path / "tasks" / f"{page.task.slug}.html").read_text()
    assert "Who stayed free of the event?" in html
    if not is_shown:
        assert found.low is None and "drawing-event-free" not in html and "19 patients" not in html
        assert "not shown: fewer than 20 patients on one side" in html
        return
    assert found.low is not None and found.high is not None and 'id="drawing-event-free"' in html
    np.testing.assert_allclose(found.low.values, 1.0)
    np.testing.assert_allclose(found.high.read([1, 20, 40]), [39 / 40, 0.5, 0.0], atol=1e-12)
    low, high = trace_event_free(found.low), trace_event_free(found.high)
    assert (low["x"][-1], low["y"][-1]) == (100, 1.0)
    assert (high["x"][-1], high["y"][-1]) == (36, 0.1)  # fewer than five are followed after
    cells = html.split("high risk</td>")[1].split("</tr>")[0]
    assert "0.375" in cells and cells.count("too few followed") == 3  # on days 25, 50, 75 and 100
