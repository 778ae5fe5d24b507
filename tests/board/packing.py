"""Packs for tests: honest ones, and those of a forger who makes the manifest fit what was changed."""

import json
from collections.abc import Callable
from pathlib import Path

from panfm.board.packs.check import verify_packs
from panfm.board.packs.format import (
    declare_encoders,
    encode_json,
    list_members,
    read_pack,
    write_archive,
)
from panfm.board.packs.submit import Written, build_pack, write_pack
from panfm.board.summary import LeaderboardSummary
from panfm.evaluation.results import (
    EncoderCard,
)

Edit = Callable[[dict[str, bytes]], None]


def pack(root: Path, out: Path, *encoders: str, **options: object) -> Written:
    return write_pack(out, build_pack([root], encoders, **options))


def find_refusal(path: Path, **options: object) -> str:
    """The one line that says why the pack is refused."""
    (report,) = verify_packs([path], **options)
    assert len(report.refusals) == 1, report.refusals
    assert "\n" not in report.refusals[0] and str(path) in report.refusals[0]
    return report.refusals[0]


def rewrite(path: Path, out: Path, edit: Edit) -> Path:
    """Write a pack again with other contents and a manifest that fits them: a careful forger."""
    old = read_pack(path)
    contents = dict(old.contents)
    edit(contents)
    cards = [
        (values["task"], EncoderCard(**values["encoder"]))
        for name, data in contents.items()
        if name.endswith(".json")
        for values in [json.loads(data)]
    ]
    manifest = old.manifest.model_copy(update={"members": list_members(contents), "encoders": declare_encoders(cards)})
    write_archive(out, manifest, contents)
    return out


def change_results(**fields: object) -> Edit:
    def edit(contents: dict[str, bytes]) -> None:
        for name in [name for name in contents if name.endswith(".json")]:
            contents[name] = encode_json({**json.loads(contents[name]), **fields})

    return edit


def find_cells(summary: LeaderboardSummary) -> dict[tuple[str, str], str]:
    return {
        (row.encoder.name, task.name): cell.origin
        for section in summary.sections
        for row in section.rows
        for task, cell in zip(section.tasks, row.cells, strict=True)
        if cell.num_runs
    }
