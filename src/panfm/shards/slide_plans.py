"""The plans of a build's slides, kept in `.build` so that a build which was stopped does not look for tissue again.

    Record -> SlideTask -> prepare_slide: plan_tiles, overlays/<hash>.png, then .build/slide-000003.json -> SlideAnswer
    .build/slide-000003.json -> load_slide -> StoredSlide, in the processes that write shards

A stored plan carries the plan hash of its build and neither path nor raw name. It is written after the overlay, so its
existence means that both are done.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from panfm.errors import UserError
from panfm.files import write_bytes
from panfm.shards.cards import SourceCard
from panfm.shards.members import Reason
from panfm.shards.sources import Record
from panfm.shards.wsi import SlideError, SlidePlan, SlideSettings, TilePlace, judge_plan, plan_tiles_with_map
from panfm.shards.wsi_overlay import draw_overlay
from panfm.shards.wsi_reader import compute_slide_sha256

OVERLAY_FOLDER = "overlays"


@dataclass(frozen=True)
class SlideTask:
    """One slide to plan; picklable."""

    record: Record
    settings: SlideSettings
    plan_hash: str
    plan_path: Path
    overlay_path: Path

    def __repr__(self) -> str:
        return f"SlideTask({self.plan_path.name})"  # clusters log their tasks; a record names its patient


@dataclass(frozen=True)
class SlideAnswer:
    """What planning found: a reason to leave the slide out, or the number of its tiles."""

    reason: Reason | None
    detail: str = ""
    num_places: int = 0
    num_unmasked: int = 0
    series: str | None = None


@dataclass(frozen=True)
class StoredSlide:
    """What writing tiles needs: the plan, and the hash of the slide's file."""

    plan: SlidePlan
    sha256: str


def prepare_slide(task: SlideTask) -> SlideAnswer:
    """Plan a slide and draw its overlay, unless an earlier run of this build did; say why it gives no tiles."""
    try:
        stored = load_slide(task.plan_path, task.plan_hash, task.record.path, task.settings)
        if stored is None or not task.overlay_path.is_file():
            if not task.record.path.exists():
                return SlideAnswer("missing_file", f"{task.record.path}: no such file")
            plan, tissue_map = plan_tiles_with_map(task.record.path, task.settings)
            stored = StoredSlide(plan, compute_slide_sha256(task.record.path))
            write_bytes(task.overlay_path, draw_overlay(plan, tissue_map))
            _store(stored, task.plan_path, task.plan_hash)
    except SlideError as error:
        return SlideAnswer(error.reason, str(error))
    plan = stored.plan
    reason = judge_plan(plan)
    return SlideAnswer(
        None if reason is None else reason.reason,
        "" if reason is None else str(reason),
        len(plan.places),
        plan.num_unmasked,
        plan.series,
    )


def get_settings(card: SourceCard, record: Record) -> SlideSettings:
    """The settings of one slide: a resolution in its row of the table serves where the file states none."""
    assert card.slides is not None
    stated = record.metadata.get("mpp")
    return card.slides if stated is None else replace(card.slides, fallback_mpp=stated)


def load_slide(plan_path: Path, plan_hash: str, path: Path, settings: SlideSettings) -> StoredSlide | None:
    """A stored plan with all its places; None if it is not there, is torn, or belongs to another build."""
    values = _read(plan_path, plan_hash)
    if values is None:
        return None
    return StoredSlide(SlidePlan.from_json(values["plan"], path, settings), values["sha256"])


def read_places(plan_path: Path, plan_hash: str) -> tuple[list[int], list[int], list[float]]:
    """The places of a stored plan as columns x0, y0, tissue."""
    values = _read(plan_path, plan_hash)
    assert values is not None, f"{plan_path} was not written"
    return values["plan"]["x0"], values["plan"]["y0"], values["plan"]["tissue"]


@lru_cache(maxsize=64)
def load_slide_without_places(plan_path: Path, plan_hash: str, path: Path, settings: SlideSettings) -> StoredSlide:
    """As `load_slide`, for the tasks that bring their places along: only those that cannot be read are kept."""
    values = _read(plan_path, plan_hash)
    if values is None:
        raise UserError(f"{plan_path}: is gone or belongs to another build; is a second build writing to that folder?")
    plan, damaged = values["plan"], values["plan"]["unreadable"]
    cut: dict[str, Any] = {name: [plan[name][number] for number in damaged] for name in ("x0", "y0", "tissue")}
    plan |= cut | {"unreadable": list(range(len(damaged)))}
    return StoredSlide(SlidePlan.from_json(plan, path, settings), values["sha256"])


def add_unreadable(task: SlideTask, lost: Sequence[tuple[int, int]]) -> SlideError | None:
    """Record places (x0, y0) that turned out to be unreadable, redraw the overlay, and judge the slide again.

    Planning reads a few tiles of each slide only, so damage elsewhere shows when all tiles are read.
    """
    stored = load_slide(task.plan_path, task.plan_hash, task.record.path, task.settings)
    assert stored is not None, f"{task.plan_path} was not written"
    known, found = _place_set(stored.plan.unreadable), set(lost)
    if found <= known:
        return None
    plan = replace(
        stored.plan, unreadable=tuple(place for place in stored.plan.places if (place.x0, place.y0) in known | found)
    )
    write_bytes(task.overlay_path, draw_overlay(plan))
    _store(replace(stored, plan=plan), task.plan_path, task.plan_hash)
    load_slide_without_places.cache_clear()
    return judge_plan(plan)


def _place_set(places: Sequence[TilePlace]) -> set[tuple[int, int]]:
    return {(place.x0, place.y0) for place in places}


def _store(stored: StoredSlide, plan_path: Path, plan_hash: str) -> None:
    values = {"plan_hash": plan_hash, "sha256": stored.sha256, "plan": stored.plan.to_json()}
    write_bytes(plan_path, json.dumps(values, separators=(",", ":")).encode())


def _read(plan_path: Path, plan_hash: str) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(plan_path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if values.get("plan_hash") == plan_hash else None
