"""What the page's script knows: a Board in, plain JSON values out, which `page` embeds in index.html.

    Board --> {encoders, tasks, texts, sections: [{rows, published, replicates}], published, development, fairness, ...}

Encoders and tasks are named by their place in these lists, sentences by theirs in `texts`: a board of 200 encoders and
40 tasks says most sentences thousands of times. Numbers are rounded as in the CSV. Replicates are int16 in one step a
section, so that the script can rank again over the tasks that the reader ticks (`ranking.rank` is what it repeats).
"""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from panfm.board.charts import get_series
from panfm.board.figures import draw_critical_difference, draw_efficiency, draw_radar, draw_score_vs
from panfm.board.ranking import list_counted
from panfm.board.render import DIGITS, list_board_tasks
from panfm.board.standings import Board
from panfm.board.summary import Cell, Comparison, PublishedRow, Row, Section, Task
from panfm.board.words import (
    ORIGINS,
    PROTOCOLS,
    describe_audit,
    describe_fraction,
    describe_gap,
    describe_method,
    describe_protocol,
    describe_units,
    describe_unranked,
    describe_winner,
    list_contamination,
)
from panfm.evaluation.results import EncoderCard
from panfm.measures.draws import Floats
from panfm.measures.statistics import MAX_UNDEFINED_SHARE, NO_INTERVAL

MAX_REPLICATE_VALUES = 1_200_000  # of a section, 3.2 MB of page; more encoders and tasks keep fewer replicates each
MIN_REPLICATES = 200  # ... but so many at least: a 2.5 % percentile of fewer is a guess
COSTS = {"parameters": "parameters", "flops": "FLOPs an image", "energy": "pretraining energy (kWh)"}
UNDEFINED = -32768  # the int16 that stands for NaN


class Texts:
    """Sentences that are said more than once, each kept once."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def keep(self, text: str | None) -> int | None:
        """Return the place of a text, None where there is none."""
        return None if not text else self.places.setdefault(text, len(self.places))


def compute_page_data(board: Board) -> dict[str, Any]:
    """Compute what the page's script draws the board from: plain JSON values, None where undefined."""
    summary, texts = board.summary, Texts()
    series = get_series(summary)
    cards = {row.encoder.name: row.encoder for section in summary.sections for row in section.rows}
    tasks = list_board_tasks(summary)
    places = {slug: place for place, slug in enumerate(tasks)}
    sections = [_plain_section(section, places, board.replicates[section.slug], texts) for section in summary.sections]
    return {
        "audit": summary.audit,
        "encoders": [_plain_encoder(card, series[name]) for name, card in sorted(cards.items())],
        "series": series,
        "tasks": [_plain_task(task) for task in tasks.values()],
        "sections": sections,
        "published": [
            _drop_empty({**asdict(line), "protocol": PROTOCOLS.get(line.protocol, line.protocol)})
            for line in summary.published
        ],
        "development": [
            _drop_empty({**asdict(entry), "protocol": _name_protocol(entry.protocol, entry.variant)})
            for entry in summary.development
        ],
        "fairness": [_drop_empty(asdict(row)) for row in board.fairness],
        "sites": [_drop_empty(asdict(row)) for row in board.sites],
        "origins": ORIGINS,
        "max_undefined_share": MAX_UNDEFINED_SHARE,
        "specs": _list_specs(),
        "texts": list(texts.places),
    }


def _list_specs() -> dict[str, Any]:
    """The drawings, without their rows: the script fills these in."""
    return {
        "efficiency": draw_efficiency(),
        "critical_difference": draw_critical_difference(),
        "radar": draw_radar(),
        **{f"score_vs_{name}": draw_score_vs(x_title=title) for name, title in COSTS.items()},
    }


def encode_replicates(replicates: Floats) -> dict[str, Any]:
    """Encode rescaled values [E, T, R] as little-endian int16 in base64; value = number x step, UNDEFINED = NaN.

    The first replicates are kept where all would make the page too large: they are independent of each other.
    """
    num_encoders, num_tasks, num_replicates = replicates.shape
    kept = min(num_replicates, max(MIN_REPLICATES, MAX_REPLICATE_VALUES // max(1, num_encoders * num_tasks)))
    values = replicates[:, :, :kept]
    undefined = np.isnan(values)
    largest = float(np.abs(values[~undefined]).max(initial=0.0))
    step = round(largest / 32767, 12) + 1e-12  # rounded: the last bits of a sum depend on the machine
    numbers = np.where(undefined, UNDEFINED, np.rint(np.nan_to_num(values) / step)).astype("<i2")
    return {
        "num_replicates": kept,
        "num_computed": num_replicates,
        "step": step,
        "values": base64.b64encode(numbers.tobytes()).decode("ascii"),
    }


def _plain_encoder(card: EncoderCard, series: int) -> dict[str, Any]:
    return _drop_empty(
        {
            "name": card.name,
            "series": series,
            "parameters": card.num_parameters,
            "flops": card.flops_per_image,
            "energy": card.energy_kwh,
            "input": f"{card.image_size} px",
            "features": f"{card.embed_dim}, {card.pooling}",
            "training_data": card.training_data,
            "licence": card.licence,
            "access": card.access,
            "hash": card.hash[:12],
        }
    )


def _plain_task(task: Task) -> dict[str, Any]:
    return _drop_empty(
        {
            "slug": task.slug,
            "name": task.name,
            "title": task.title,
            "family": task.family,
            "modality": task.modality,
            "licence": task.licence,
            "access": task.access,
            "metric": task.metric,
            "metric_title": task.metric_title,
            "metric_description": task.metric_description,
            "higher": task.higher_is_better,
            "classes": ", ".join(task.classes).replace("_", " ") if len(task.classes) > 1 else None,
            "units": describe_units(task),
            "num_groups": task.num_test_groups,
            "few_groups": task.few_groups,
            "no_interval": task.metric in NO_INTERVAL,
            "chance": task.chance,
            "perfect": task.perfect,
            "claim_note": task.claim_note,
            "badges": list_task_badges(task),
        }
    )


def list_task_badges(task: Task) -> list[tuple[str, str, str]]:
    """Say what a reader must know of a task before its numbers: (kind, words, why)."""
    badges = []
    if task.synthetic:
        badges.append(("synthetic", "synthetic images", "Its images are drawn by a program."))
    if not task.claim:
        badges.append(("caution", "pipeline check only", task.claim_note or "supports no claim about encoders"))
    if task.group_kind in ("sample", "unknown"):
        why = "Images of one patient may lie in training and test, and count as independent."
        badges.append(("caution", "patients unknown", why))
    if task.few_groups:
        which = "" if task.which_groups == "in all" else f" {task.which_groups}"
        number = f"{task.num_rarer_groups} {'group' if task.num_rarer_groups == 1 else 'groups'}"
        badges.append(("caution", f"only {number}{which}", "Intervals of this task may be too narrow."))
    return badges


def _plain_section(section: Section, places: dict[str, int], replicates: Floats, texts: Texts) -> dict[str, Any]:
    names = sorted(row.encoder.name for row in section.rows)
    return _drop_empty(
        {
            "slug": section.slug,
            "title": describe_protocol(section),
            "synthetic": section.synthetic,
            "protocol": section.protocol,
            "protocol_title": PROTOCOLS.get(section.protocol, section.protocol),
            "variant": section.variant,
            "label_fraction": section.label_fraction,
            "labels": describe_fraction(section.label_fraction),
            "compat": section.is_compat,
            "verdict": describe_winner(section),
            "unranked": describe_unranked(section),
            "reference": section.reference,
            "encoders": names,
            "tasks": [places[task.slug] for task in section.tasks],
            "counted": list_counted(section.tasks, [row.cells for row in section.rows], section.synthetic),
            "rows": [_plain_row(section, row, texts) for row in section.rows],
            "published": [_plain_published(row) for row in section.published],
            "replicates": encode_replicates(replicates),
        }
    )


def _plain_row(section: Section, row: Row, texts: Texts) -> dict[str, Any]:
    standing = None
    if row.standing is not None:
        standing = _drop_empty({**asdict(row.standing), "reason": texts.keep(row.standing.reason)})
    return _drop_empty(
        {
            "encoder": row.encoder.name,
            "standing": standing,
            "reason": row.reason,
            "contamination": list_contamination(section, row),
            "over_tasks": _plain_gap(row.over_tasks, texts),
            "cells": [_plain_cell(cell, texts) for cell in row.cells],
        }
    )


def _plain_cell(cell: Cell, texts: Texts) -> dict[str, Any]:
    audited = describe_audit(cell)
    return _drop_empty(
        {
            "value": cell.value,
            "low": cell.low,
            "high": cell.high,
            "reason": texts.keep(cell.reason),
            "method": texts.keep(describe_method(cell.method, cell.num_runs)),
            "runs": cell.num_runs,
            "spread": cell.spread,
            "label_note": texts.keep(cell.label_note),
            "audit": None if audited is None else (audited[0], texts.keep(audited[1])),
            "seen": cell.audit.num_seen if cell.audit is not None else None,
            "origin": cell.origin if cell.num_runs else None,
            "aggregate_only": (cell.origin == "self_reported" and not cell.predictions_sha256) or None,
            "difference": _plain_gap(cell.difference, texts),
        }
    )


def _plain_gap(gap: Comparison | None, texts: Texts) -> dict[str, Any] | None:
    if gap is None:
        return None
    return _drop_empty(
        {
            "difference": gap.difference,
            "low": gap.low,
            "high": gap.high,
            "reason": texts.keep(gap.reason),
            "method": texts.keep(describe_method(gap.method)),
            "p_value": gap.p_value,
            "p_adjusted": gap.p_adjusted,
            "words": texts.keep(describe_gap(gap)) if gap.p_adjusted is not None else None,
            "sure": gap.is_sure,
        }
    )


def _plain_published(row: PublishedRow) -> dict[str, Any]:
    cells = [None if cell is None else _drop_empty(asdict(cell)) for cell in row.cells]
    return {"model": row.model, "readers": row.readers, "citation": row.citation, "doi": row.doi, "cells": cells}


def _name_protocol(protocol: str, variant: str) -> str:
    name = PROTOCOLS.get(protocol, protocol)
    return name if variant == "default" else f"{name} ({variant.replace('_', ' ')})"


def _drop_empty(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is undefined (the script reads a missing key as null) and round numbers as the CSV does."""
    return {key: _round(value) for key, value in values.items() if value is not None}


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_round(item) for item in value]
    return value
