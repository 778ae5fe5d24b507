"""What a submitted Result says of itself: its task's card, its predictions and the owner's own run are held against it.

    Result --card of the task--> facts      Result + test set --recomputed--> every metric and interval
    Result --the owner's own of the same encoder hash--> all metrics alike within AGREEMENT

Each check raises a UserError that names the pack and its file (`where`), the value, the rule and the way out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from panfm.board.packs.images import find_shipped_card
from panfm.board.verify import SAME_VALUE, TestSet
from panfm.errors import UserError
from panfm.evaluation.families import Family
from panfm.evaluation.results import Result
from panfm.evaluation.task_rows import COARSENESS
from panfm.measures.by_family import describe_metric, estimate_outcome
from panfm.measures.intervals import Estimate
from panfm.measures.statistics import NUM_REPLICATES, compute_bootstrap_seed

# Two runs of one encoder on other machines differ by rounding of its features: one test image of 100 may change sides.
# A metric of more than 1 (years, ranks) may differ by this share of itself.
AGREEMENT = 0.01
# A percentile interval drawn by another version of numpy's generator: 2,000 replicates put its ends within 2 % of its
# width, and nothing honest is further off than this.
INTERVAL_SLACK = 0.1


def check_facts(where: str, result: Result) -> None:
    """What a Result says of itself, against the card of its task."""
    if result.family not in get_args(Family):
        raise UserError(f"{where}: family {result.family!r} is not known; known: {', '.join(get_args(Family))}")
    facts: list[tuple[str, Any, Any]] = [("evaluated_on", result.evaluated_on, "test")]
    card = find_shipped_card(result.task)
    if card is not None:
        facts += [
            ("task_version", result.task_version, card.version),
            ("family", result.family, card.family),
            ("classes", result.classes, card.classes if card.classes else result.classes),
            ("primary_metric", result.primary_metric, card.primary_metric),
            ("metrics", tuple(sorted(result.metrics)), tuple(sorted(card.metrics))),
            ("synthetic", result.synthetic, card.synthetic),
        ]
    for name, ours, theirs in facts:
        if ours != theirs:
            raise UserError(
                f"{where}: {name} is {ours}, the task's card says {theirs}; evaluate again with the version of panfm "
                "that the board uses"
            )
    if card is not None and COARSENESS.get(result.group_kind, -1) < COARSENESS[card.group]:
        raise UserError(
            f"{where}: group_kind is {result.group_kind[:40]!r}, the task's card promises {card.group!r}; build the "
            "shards with the shipped source card and evaluate again"
        )
    if not 0 <= result.label_fraction <= 1:
        raise UserError(f"{where}: label_fraction {result.label_fraction} is not between 0 and 1; evaluate again")
    if result.primary_metric not in result.metrics:
        raise UserError(f"{where}: has no value of its primary metric {result.primary_metric}; evaluate again")
    if result.encoder.contamination == "excluded" and result.task not in result.encoder.excluded_tasks:
        raise UserError(
            f"{where}: contamination is 'excluded', but excluded_tasks does not name {result.task}; declare it "
            "unknown, or name the task"
        )


def check_metrics(where: str, result: Result, test_set: TestSet) -> None:
    """Every metric, direction and interval must follow from the predictions."""
    try:
        estimates = estimate_outcome(
            result.family,
            list(result.metrics),
            test_set.outcome,
            seed=compute_bootstrap_seed(result.task, result.split_hash),
            num_replicates=result.settings.get("num_replicates", NUM_REPLICATES),
        )
    except KeyError as error:
        raise UserError(f"{where}: unknown metric {error}; evaluate with the board's version of panfm") from None
    for name, stated in result.metrics.items():
        found = estimates[name]
        if stated.direction != describe_metric(result.family, name).direction:
            raise UserError(f"{where}: {name} is said to be better when {stated.direction}; evaluate again")
        same = (stated.value is None) == (found.value is None)
        if not same or abs((stated.value or 0.0) - (found.value or 0.0)) > SAME_VALUE:
            raise UserError(
                f"{where}: {name} is {stated.value}, but {found.value} follows from its predictions; the file was "
                "changed or is of another version, evaluate and submit again"
            )
        if (stated.low is None) != (stated.high is None) or not _is_plausible(stated.low, stated.high, found):
            raise UserError(
                f"{where}: the interval of {name} is {stated.low} to {stated.high}, but {found.low} to {found.high} "
                "follows from its predictions; evaluate and submit again"
            )


def _is_plausible(low: float | None, high: float | None, found: Estimate) -> bool:
    if low is None or high is None:
        return True  # saying less is no lie; the board draws its own
    if found.low is None or found.high is None:
        return False
    slack = max(INTERVAL_SLACK * (found.high - found.low), SAME_VALUE)
    return low <= high and abs(low - found.low) <= slack and abs(high - found.high) <= slack


def confirm(where: str, result: Result, own_results: Sequence[tuple[Path, Result]]) -> str | None:
    """Hold a Result against the owner's own one of the same encoder; None where there is none."""
    for path, own in own_results:
        same = (own.task, own.unit, own.stem, own.encoder.hash) == (
            result.task,
            result.unit,
            result.stem,
            result.encoder.hash,
        )
        if not same:
            continue
        for name, stated in result.metrics.items():
            ours = own.metrics[name].value if name in own.metrics else None
            if (ours is None) != (stated.value is None):
                raise UserError(
                    f"{where}: {name} is {stated.value}, but {ours} in {path}; the encoder gave other scores"
                )
            if ours is None or stated.value is None:
                continue
            allowed = AGREEMENT * max(1.0, abs(ours))
            if abs(ours - stated.value) > allowed:
                raise UserError(
                    f"{where}: {name} is {stated.value:.4f}, but {ours:.4f} in {path}: they differ by "
                    f"{abs(ours - stated.value):.4f}, more than {allowed:g}; the encoder gave other scores, ask how "
                    "these were made"
                )
        return f"all {len(result.metrics)} metrics within {AGREEMENT:g} of the board's own run"
    return None
