"""Measuring of benchmarks/recipes.py: panfm's own evaluation, then paired differences on shared resamples.

exports  --panfm.evaluation.run-->  Results, predictions  -->  Cell: metric and replicates  -->  Row: a difference
"""

import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from recipes_train import PEERS, UNTRAINED, Plan
from rows import Row

from panfm.board.verify import check_same_test_set, read_test_set, recompute
from panfm.evaluation.protocol import EvaluatedOn
from panfm.evaluation.results import Result, read_results
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EncoderEntry, EvaluateConfig
from panfm.files import read_json
from panfm.measures.statistics import compute_bootstrap_seed, compute_interval, draw_group_weights

WEIGHTS = "weights/tf_efficientnet_lite0.imagenet1k.safetensors"
TEACHER = "timm:tf_efficientnet_lite0.in1k"
TEACHER_NAME = "teacher"
COMPARED_WITH = (UNTRAINED, *PEERS, *(f"{peer}, CLS" for peer in PEERS), TEACHER_NAME)
NUM_REPLICATES = 2000

Floats = NDArray[np.float64]


def evaluate_all(plan: Plan, evaluate_on: EvaluatedOn) -> dict[str, list[str]]:
    """Measure every encoder; returns the encoders' names on the board by recipe."""
    entries: dict[str, list[EncoderEntry]] = defaultdict(list)
    trained = next(recipe for recipe in plan.recipes if recipe != UNTRAINED)
    for recipe in plan.recipes:
        for seed in plan.seeds:
            run = plan.find_run(recipe, seed)
            if recipe == UNTRAINED:  # the same architecture and transform as what is trained
                address = f"panfm:{plan.find_run(trained, seed)}/export@random:{seed}"
                entries[recipe].append(EncoderEntry(address=address, name=run.name))
                continue
            entries[recipe].append(EncoderEntry(address=f"panfm:{run}/export", name=run.name))
            if recipe in PEERS and plan.complete:
                # lightly's own benchmarks read the class token off its MAE, we the mean of the patches: both are shown.
                entry = EncoderEntry(address=f"panfm:{run}/export?pooling=cls", name=f"{run.name}-cls")
                entries[f"{recipe}, CLS"].append(entry)
    if plan.complete:
        entries[TEACHER_NAME].append(EncoderEntry(address=f"{TEACHER}@{plan.out / WEIGHTS}", name=TEACHER_NAME))
    summary = run_evaluation(
        EvaluateConfig(
            encoders=tuple(entry for found in entries.values() for entry in found),
            shards=tuple(str(path) for path in plan.shards),
            tasks=plan.tasks,
            fractions=plan.fractions,
            draws=plan.draws,
            evaluate_on=evaluate_on,
            num_replicates=100,  # the intervals of the tables are computed here, for all encoders on shared replicates
            out=str(plan.out / "results"),
            cache_dir=str(plan.out / "features"),
        )
    )
    if summary.failures:
        sys.exit(str(summary))
    return {recipe: [str(entry.name) for entry in found] for recipe, found in entries.items()}


@dataclass(frozen=True)
class Cell:
    """One recipe on one task, protocol and label fraction: the task's primary metric, the mean over draws and seeds."""

    recipe: str
    task: str
    protocol: str
    fraction: float
    metric: str
    value: float
    spread: float | None  # standard deviation over training seeds; None: one seed
    replicates: Floats  # [R], the same resampled patients for every recipe
    num_groups: int


def compute_cells(plan: Plan, names: dict[str, list[str]], evaluate_on: EvaluatedOn) -> list[Cell]:
    """Read the predictions and compute metric and replicates, one cell a recipe, task, protocol and fraction."""
    recipe_of = {name: recipe for recipe, found in names.items() for name in found}
    wanted: dict[tuple[str, str, float], list[tuple[Path, Result]]] = defaultdict(list)
    for path, result in read_results([plan.out / "results"]):
        fits = result.task in plan.tasks and result.label_fraction in plan.fractions and result.draw < plan.draws
        if result.encoder.name in recipe_of and result.evaluated_on == evaluate_on and fits:
            wanted[result.task, result.protocol, result.label_fraction].append((path, result))
    cells = []
    for (task, protocol, fraction), items in sorted(wanted.items()):
        first = read_test_set(*items[0])
        seed = compute_bootstrap_seed(task, first.result.split_hash)
        weights = draw_group_weights(first.groups, NUM_REPLICATES, seed)
        found: dict[str, list[tuple[str, float, Floats]]] = defaultdict(list)
        for item in items:
            test_set = read_test_set(*item)
            check_same_test_set(first, test_set)
            run, name = recompute(test_set, weights), test_set.result.encoder.name
            if run.value is not None:
                found[recipe_of[name]].append((name, run.value, run.replicates))
        for recipe, runs in found.items():
            by_seed = [
                float(np.mean([value for name, value, _ in runs if name == wanted_name]))
                for wanted_name in sorted({name for name, _, _ in runs})
            ]
            cells.append(
                Cell(
                    recipe=recipe,
                    task=task,
                    protocol=protocol,
                    fraction=fraction,
                    metric=first.result.primary_metric,
                    value=float(np.mean(by_seed)),
                    spread=statistics.stdev(by_seed) if len(by_seed) > 1 else None,
                    replicates=np.mean([replicates for _, _, replicates in runs], axis=0),
                    num_groups=len(np.unique(first.groups)),
                )
            )
    return cells


@dataclass(frozen=True)
class Comparison(Row):
    """One paired comparison of the task's primary metric."""

    difference: float
    low: float | None  # 95 % over resampled patients, of the mean over draws and seeds
    high: float | None
    task: str
    protocol: str
    label_fraction: float
    recipe: str
    peer_recipe: str


def compare(cells: Sequence[Cell]) -> list[Comparison]:
    """Every recipe of ours against those of COMPARED_WITH and against ours behind it, on the same replicates."""
    at = {(cell.recipe, cell.task, cell.protocol, cell.fraction): cell for cell in cells}
    ours = [recipe for recipe in dict.fromkeys(cell.recipe for cell in cells) if not recipe.startswith(COMPARED_WITH)]
    rows = []
    for cell in cells:
        if cell.recipe not in ours:
            continue
        for peer_recipe in (*COMPARED_WITH, *ours[ours.index(cell.recipe) + 1 :]):
            peer = at.get((peer_recipe, cell.task, cell.protocol, cell.fraction))
            if peer is None:
                continue
            interval = compute_interval(cell.replicates - peer.replicates, cell.num_groups)
            rows.append(
                Comparison(
                    name=f"{cell.task}, {cell.protocol}, {cell.fraction:.0%}: {cell.recipe} - {peer_recipe}",
                    ours=cell.value,
                    peer=peer.value,
                    ratio=cell.value / peer.value,
                    unit=cell.metric,
                    difference=cell.value - peer.value,
                    low=interval.low,
                    high=interval.high,
                    task=cell.task,
                    protocol=cell.protocol,
                    label_fraction=cell.fraction,
                    recipe=cell.recipe,
                    peer_recipe=peer_recipe,
                )
            )
    return rows


def show(plan: Plan, cells: Sequence[Cell], rows: Sequence[Comparison]) -> Iterator[str]:
    """The tables, line by line: what was trained, each task's primary metric, paired differences."""
    recipes = list(dict.fromkeys([*plan.recipes, *(cell.recipe for cell in cells)]))
    width = max(map(len, recipes))
    yield f"\n{'trained':<{width}}  {'samples':>9}  {'images/s':>8}  {'minutes':>7}"
    for recipe in recipes:
        runs = [
            read_json(path) for seed in plan.seeds if (path := plan.find_run(recipe, seed) / "trained.json").is_file()
        ]
        if runs:
            samples, minutes = (statistics.mean(run[key] for run in runs) for key in ("samples_seen", "minutes"))
            yield f"{recipe:<{width}}  {samples:>9,.0f}  {samples / minutes / 60:>8.1f}  {minutes:>7.1f}"
    columns = sorted({(cell.protocol, cell.fraction) for cell in cells}, key=lambda c: (c[0] == "knn", *c))
    headings = "".join(f"  {f'{protocol} {fraction:.0%}':>18}" for protocol, fraction in columns)
    for task in plan.tasks:
        metric = next(cell.metric for cell in cells if cell.task == task)
        yield f"\n{task}, {metric}\n{'':<{width}}{headings}"
        for recipe in recipes:
            line = f"{recipe:<{width}}"
            for protocol, fraction in columns:
                found = [
                    c for c in cells if (c.recipe, c.task, c.protocol, c.fraction) == (recipe, task, protocol, fraction)
                ]
                spread = "" if not found or found[0].spread is None else f" +-{found[0].spread:.3f}"
                line += f"  {f'{found[0].value:.3f}{spread}' if found else '-':>18}"
            yield line
    yield "\npaired differences, 95 % over resampled patients, of the mean over draws and seeds (* = without 0)"
    for row in rows:
        interval = "no interval" if row.low is None or row.high is None else f"[{row.low:+.3f}, {row.high:+.3f}]"
        sure = row.low is not None and row.high is not None and row.low * row.high > 0
        yield f"{row.name:<86}  {row.difference:+.3f} {interval}{' *' if sure else ''}"
