"""A predictions file from somebody else: parquet in, a table of the one shape that the board reads out, or a refusal.

    file --size, columns, types--> rows --each unit once a repeat, with one group and class--> scores in their range

What only the Result can say (which draw, which classes) is held against it.
"""

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from panfm.board.packs.reader import WAY_OUT, read_bounded
from panfm.errors import UserError
from panfm.evaluation.families import WITHOUT_CLASSES
from panfm.evaluation.operating import read_thresholds
from panfm.evaluation.results import PREDICTIONS_SCHEMA, SUBGROUP_PREFIX, Result, get_scores, get_targets
from panfm.evaluation.tasks import Subgroup
from panfm.measures.metrics import PROBABILITY_TOLERANCE

MAX_GRID, MAX_REPLICATES = 1000, 10_000
LEVELS = frozenset(f"{SUBGROUP_PREFIX}{name}" for name in get_args(Subgroup))
OUTER_FOLD = re.compile(r"outer\d{1,3}")
# Numbers a unit has in the families without classes: scores, then targets; None: as many as its protocol needs.
NUM_SCORES = {"regression": 1}
NUM_TARGETS = {"regression": 1, "survival": 2}


def read_strictly(file: Path, result: Result) -> pa.Table:
    """Read predictions that come from elsewhere, holding them against their Result.

    Raises UserError for another layout, a unit that is there twice, missing in a repeat or has two groups or classes, a
    fold that is not the test fold, another draw, and scores that are not finite or outside the family's range.
    """
    _check_settings(file, result)
    table = read_bounded(file)
    _check_columns(file, table)
    _check_units(file, result, table)
    _check_numbers(file, result, table)
    return table


def _check_columns(file: Path, table: pa.Table) -> None:
    names = table.schema.names
    if names[: len(PREDICTIONS_SCHEMA)] != PREDICTIONS_SCHEMA.names or len(set(names)) != len(names):
        raise UserError(f"{file}: columns are {', '.join(names)[:200]}; {WAY_OUT}")
    for field in table.schema:
        wanted = pa.string() if field.name in LEVELS else None
        if field.name in PREDICTIONS_SCHEMA.names:
            wanted = PREDICTIONS_SCHEMA.field(field.name).type
            if table.column(field.name).null_count:
                raise UserError(f"{file}: {field.name} is unknown in some rows; {WAY_OUT}")
        if wanted is None or field.type != wanted:
            raise UserError(f"{file}: column {field.name[:80]!r} ({field.type}) is none of predictions v2; {WAY_OUT}")
    if extra := sorted(set(table.schema.metadata or {}) - {b"panfm_predictions"}):
        raise UserError(f"{file}: carries {extra[0]!r} beside its columns; {WAY_OUT}")


def _check_units(file: Path, result: Result, table: pa.Table) -> None:
    """Each unit once a repeat, on test folds, of the Result's draw, and one thing only."""
    folds = set(table.column("fold").unique().to_pylist())
    if folds != {"test"} and not all(OUTER_FOLD.fullmatch(fold) for fold in folds):
        strange = sorted(folds - {"test"})[0]
        raise UserError(f"{file}: fold {strange!r}; predictions of a board are on 'test' folds, {WAY_OUT}")
    draws = set(table.column("draw").unique().to_pylist())
    if draws != {result.draw}:
        raise UserError(f"{file}: draw {min(draws)}, the result is of draw {result.draw}; {WAY_OUT}")
    names = ["key", "repeat"]
    num_pairs = len(table.group_by(names).aggregate([]))
    if num_pairs != len(table):
        raise UserError(f"{file}: {len(table) - num_pairs} units are there twice in a repeat; {WAY_OUT}")
    repeats = sorted(table.column("repeat").unique().to_pylist())
    num_keys = pc.count_distinct(table.column("key")).as_py()
    if repeats != list(range(len(repeats))) or num_keys * len(repeats) != len(table):
        raise UserError(
            f"{file}: {num_keys} units, {len(repeats)} repeats, {len(table)} rows: some are missing; {WAY_OUT}"
        )
    same = ["group", "label", *(name for name in table.schema.names if name.startswith(SUBGROUP_PREFIX))]
    if len(table.group_by(["key", *same]).aggregate([])) != num_keys:
        raise UserError(f"{file}: a unit has two groups, classes or levels in its repeats; {WAY_OUT}")
    num_groups = pc.count_distinct(table.column("group")).as_py()
    if (result.num_test, result.num_test_groups) != (num_keys, num_groups):
        raise UserError(
            f"{file}: {num_keys} units of {num_groups} groups, the result says {result.num_test} of "
            f"{result.num_test_groups}; {WAY_OUT}"
        )


def _check_numbers(file: Path, result: Result, table: pa.Table) -> None:
    num_classes = len(result.classes) + (result.family == "out_of_distribution")
    labels = table.column("label").to_numpy()
    allowed = 1 if result.family in WITHOUT_CLASSES else max(1, num_classes)
    if labels.min() < 0 or labels.max() >= allowed:
        raise UserError(f"{file}: class {labels.max()} of {allowed} classes counted from 0; {WAY_OUT}")
    has_classes = result.family not in WITHOUT_CLASSES
    wanted_scores = num_classes if has_classes else NUM_SCORES.get(result.family)
    if result.family == "survival":
        wanted_scores = 1 + len(result.settings.get("grid", ()))
    wanted_targets = 0 if has_classes else NUM_TARGETS.get(result.family)
    for name, wanted in (("scores", wanted_scores), ("targets", wanted_targets)):
        lengths = pc.unique(pc.list_value_length(table.column(name))).to_pylist()
        if len(lengths) != 1 or (wanted is not None and lengths[0] != wanted):
            shown = " or ".join(map(str, sorted(lengths)[:3]))
            raise UserError(
                f"{file}: {shown} {name} a row; family {result.family} has {wanted or 'one number of them'}; {WAY_OUT}"
            )
    scores, targets = get_scores(table), get_targets(table)
    if not np.isfinite(scores).all() or not np.isfinite(targets).all():
        raise UserError(f"{file}: {int((~np.isfinite(scores)).sum())} scores are not finite; {WAY_OUT}")
    if result.family in ("segmentation", "retrieval") and scores.min() < 0:
        raise UserError(f"{file}: a score of {scores.min():g}; family {result.family} counts from 0 on, {WAY_OUT}")
    if not has_classes or result.family == "ugly_duckling":
        return
    probabilities = scores[:, :-1] if result.family == "out_of_distribution" else scores
    off = float(np.abs(probabilities.sum(axis=1) - 1).max())
    if probabilities.min() < 0 or off > PROBABILITY_TOLERANCE:
        raise UserError(
            f"{file}: scores from {probabilities.min():.3g} to {probabilities.max():.3g} whose sums differ from 1 by "
            f"up to {off:.3g}; family {result.family} has one probability a class, {WAY_OUT}"
        )


def _check_settings(file: Path, result: Result) -> None:
    """What the board reads from a Result's settings has the shape that it reads; else a page could not be drawn."""
    settings: dict[str, Any] = result.settings
    chosen = settings.get("chosen", {})
    grid, num_replicates = settings.get("grid", []), settings.get("num_replicates", 2000)
    faults = {
        "grid": not isinstance(grid, list)
        or len(grid) > MAX_GRID
        or not all(isinstance(day, int | float) and np.isfinite(day) for day in grid),
        "num_replicates": not isinstance(num_replicates, int) or not 1 <= num_replicates <= MAX_REPLICATES,
        "chosen": not isinstance(chosen, dict) or not isinstance(chosen.get("cut_off"), int | float | None),
        "label_note": not isinstance(settings.get("label_note"), str | None),
        "split_notes": not _is_texts(settings.get("split_notes", [])),
        "references": not isinstance(settings.get("references", {}), dict)
        or not _is_texts(list(settings.get("references", {}).values())),
    }
    if not faults["chosen"]:
        try:
            found = [(one.wanted, one.reached, one.value) for one in read_thresholds(settings)]
            faults["chosen"] = not all(isinstance(one, int | float | None) for row in found for one in row)
        except (TypeError, ValueError, AttributeError):
            faults["chosen"] = True
    if wrong := [name for name, is_wrong in faults.items() if is_wrong]:
        raise UserError(f"{file}: settings.{wrong[0]} of its result is not as panfm writes it; {WAY_OUT}")


def _is_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
