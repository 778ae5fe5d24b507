"""What a person decides is recorded, counted and carried out; the sheet shows what waits and fetches nothing."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.errors import UserError
from panfm.shards import review
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.inspect import summarise
from panfm.shards.review import Sheet, read_decisions, read_flags, read_review_state, record_decisions, write_sheet
from panfm.shards.screening import SCREENING_VERSION
from panfm.shards.writer import BuildOptions, build_shards

ROW = "{version},{key},{kind},{box},{score}\n"


@pytest.fixture
def shard_set(make_archive: Callable[..., Any], tmp_path: Path) -> ShardSet:
    """Twelve images: the first two are flagged as the screening would write it, the others screened without a flag."""
    archive = make_archive()
    archive.values["title"] = "A <b>small</b> archive"
    options = BuildOptions(samples_per_shard=5, max_rejected_share=0)
    built = open_shard_set(build_shards(archive.card, archive.root, tmp_path / "shards", options=options).path)
    keys = built.table["key"].to_pylist()
    rows = [(keys[0], "face", "8,6,40,30", 0.5), (keys[0], "text", "0,0,8,6", 4.0), (keys[1], "text", "0,0,8,6", 9.0)]
    rows += [(key, "none", ",,,", "") for key in keys[2:]]
    text = "version,key,kind,left,top,width,height,score\n" + "".join(
        ROW.format(version=SCREENING_VERSION, key=key, kind=kind, box=box, score=score)
        for key, kind, box, score in rows
    )
    (built.path / "review").mkdir()
    (built.path / "review/flags.csv").write_text(text)
    return built


def write_decisions(path: Path, **decisions: str) -> Path:
    path.write_text("key,decision\n" + "".join(f"{key},{one}\n" for key, one in decisions.items()))
    return path


def read_page(sheet: Sheet) -> tuple[str, list[str]]:
    page = sheet.path.read_text()
    return page, re.findall(r'data-key="([^"]+)"', page)


def test_the_sheet_shows_what_waits_and_fetches_nothing(shard_set: ShardSet) -> None:
    keys = shard_set.table["key"].to_pylist()
    page, shown = read_page(write_sheet(shard_set))
    assert shown == keys[:2]  # two kinds before one
    assert '<span class="box face" style="left:10.0%;top:10.0%;width:50.0%;height:50.0%"></span>' in page
    assert "A &lt;b&gt;small&lt;/b&gt; archive" in page and "<b>small</b>" not in page
    assert not re.findall(r"(?:https?:)?//[a-z]|<link|<script src|@import|url\(", page)
    assert "default-src 'none'" in page
    first = write_sheet(shard_set, sample=3, seed=1)
    page, shown = read_page(first)
    assert shown[:2] == keys[:2] and first.num_shown == 5
    assert read_page(write_sheet(shard_set, sample=3, seed=1)) == (page, shown)
    assert read_page(write_sheet(shard_set, sample=3, seed=2))[1] != shown
    everything = write_sheet(shard_set, everything=True, limit=7)
    assert (everything.num_shown, everything.num_waiting) == (7, 5)


def test_states_are_counted_from_unscreened_to_decided(shard_set: ShardSet, tmp_path: Path) -> None:
    keys = shard_set.table["key"].to_pylist()
    state = read_review_state(shard_set)
    assert (state.num_screened, state.num_flagged, state.num_undecided) == (12, 2, 2)
    assert state.kinds == {"face": 1, "eye": 0, "text": 2}
    assert str(summarise(shard_set)).splitlines()[-1] == (
        "screened: yes, 2 flagged (face 1, text 2), 2 undecided, 0 kept, 0 removed"
    )
    index = (shard_set.path / "index.json").read_bytes()
    table = write_decisions(tmp_path / "decisions.csv", **{keys[0]: "keep", keys[5]: "keep", keys[1]: ""})
    recorded = record_decisions(shard_set.path, table, by="AB", date="2026-11-22")
    assert (recorded.num_kept, recorded.num_removed, recorded.num_foreign) == (2, 0, 0)
    assert (shard_set.path / "index.json").read_bytes() == index, "a review without removal changes no index"
    state = read_review_state(shard_set)
    assert (state.num_kept, state.num_undecided, state.num_unflagged_seen, state.num_missed) == (1, 1, 1, 0)
    one = read_decisions(shard_set.path)[keys[0]]
    assert (one.version, one.decision, one.flags, one.by, one.date) == (1, "keep", "face+text", "AB", "2026-11-22")
    assert read_page(write_sheet(shard_set))[1] == [keys[1]], "what is decided is not shown again"

    (shard_set.path / "review/flags.csv").write_text("version,key,kind,left,top,width,height,score\n0,k,none,,,,,\n")
    assert str(read_review_state(shard_set)).startswith("screened: no"), "flags of another version count as none"


def test_removed_images_are_gone_and_the_record_says_why(shard_set: ShardSet, tmp_path: Path) -> None:
    keys = shard_set.table["key"].to_pylist()
    write_sheet(shard_set)
    first = write_decisions(tmp_path / "first.csv", **{keys[0]: "keep", keys[1]: "keep"})
    record_decisions(shard_set.path, first, by="AB", date="2026-11-22")
    second = write_decisions(tmp_path / "second.csv", **{keys[1]: "remove", keys[7]: "remove", "kother": "remove"})
    recorded = record_decisions(shard_set.path, second, by="CD", date="2026-11-23")
    assert (recorded.num_kept, recorded.num_removed, recorded.num_foreign) == (0, 2, 1)
    left = open_shard_set(shard_set.path)
    assert left.table["key"].to_pylist() == [key for key in keys if key not in (keys[1], keys[7])]
    assert not (shard_set.path / "review/index.html").exists(), "the sheet held pixels of what was removed"
    with (shard_set.path / "quarantine.csv").open() as file:
        rows = {row["key"]: row["reason"] for row in csv.DictReader(file)}
    assert rows == {keys[1]: "rejected_in_review", keys[7]: "missed_by_screening"}
    state = read_review_state(left)
    assert (state.num_flagged, state.num_removed, state.num_kept, state.num_to_remove) == (1, 1, 1, 0)
    assert (state.num_unflagged_seen, state.num_missed, state.num_undecided) == (1, 1, 0)
    assert list(read_decisions(shard_set.path)) == [keys[0]]
    assert read_flags(left)[0] == frozenset(left.table["key"].to_pylist())
    assert "decided by CD" in (shard_set.path / "forgotten.json").read_text()


def test_a_later_decision_counts_and_the_record_grows(shard_set: ShardSet, tmp_path: Path) -> None:
    keys = shard_set.table["key"].to_pylist()
    table = write_decisions(tmp_path / "one.csv", **{keys[2]: "keep"})
    record_decisions(shard_set.path, table, by="AB", date="2026-11-22")
    record_decisions(shard_set.path, table, by="CD", date="2026-11-23")
    lines = (shard_set.path / "review/decisions.csv").read_text().splitlines()
    assert lines == [
        "version,key,decision,flags,by,date",
        f"1,{keys[2]},keep,none,AB,2026-11-22",
        f"2,{keys[2]},keep,none,CD,2026-11-23",
    ]
    assert read_decisions(shard_set.path)[keys[2]].by == "CD"


def test_a_removal_that_was_cut_off_is_made_up_for(shard_set: ShardSet, tmp_path: Path) -> None:
    keys = shard_set.table["key"].to_pylist()
    (shard_set.path / "review/decisions.csv").write_text(
        f"version,key,decision,flags,by,date\n1,{keys[0]},remove,face,AB,2026-11-22\n"
    )
    assert "1 to remove" in str(read_review_state(shard_set))
    table = write_decisions(tmp_path / "again.csv", **{keys[1]: "keep"})
    assert record_decisions(shard_set.path, table, by="AB").num_removed == 1
    assert keys[0] not in open_shard_set(shard_set.path).table["key"].to_pylist()


@pytest.mark.parametrize(
    ("text", "by", "said"),
    [
        ("key,decision\nK0,keep\n", "", "give the initials"),
        ("key,decision\nK0,crop\n", "AB", "line 2: decision 'crop' must be keep or remove"),
        ("key,decision\nK0,keep\nK0,remove\n", "AB", "line 3: keeps and removes the same image"),
        ("key,decision\nK0,\n", "AB", "holds no decision"),
        ("key,decision\nkother,keep\n", "AB", "none of its 1 keys"),
        ("key;decision\nK0;keep\n", "AB", "has no column key"),
    ],
)
def test_faults_of_a_decisions_file_change_nothing(
    shard_set: ShardSet, tmp_path: Path, text: str, by: str, said: str
) -> None:
    table = tmp_path / "decisions.csv"
    table.write_text(text.replace("K0", shard_set.table["key"][0].as_py()))
    before = {path: path.read_bytes() for path in shard_set.path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=said) as caught:
        record_decisions(shard_set.path, table, by=by)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in shard_set.path.rglob("*") if path.is_file()} == before


def test_thumbnails_hold_no_metadata(shard_set: ShardSet) -> None:
    import base64

    page, _ = read_page(write_sheet(shard_set))
    images = [base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)", page)]
    assert len(images) == 2
    assert not any(marker in data for data in images for marker in (b"Exif", b"ICC_PROFILE", b"http"))
    assert review.THUMBNAIL_SIDE >= 400  # a person must be able to read what is written


def test_the_command_line_writes_the_sheet_and_records(shard_set: ShardSet, tmp_path: Path) -> None:
    keys = shard_set.table["key"].to_pylist()
    run = CliRunner().invoke(app, ["shards", "review", str(shard_set.path), "--sample", "2", "--limit", "3"])
    assert run.exit_code == 0, run.output  # all are screened: OpenCV is not asked for
    assert "3 images to decide on, 1 more wait" in run.output
    table = str(write_decisions(tmp_path / "decisions.csv", **{keys[0]: "remove", keys[1]: "keep"}))
    run = CliRunner().invoke(app, ["shards", "review", str(shard_set.path), "--decisions", table, "--by", "AB"])
    assert run.exit_code == 0 and "1 kept, 1 removed from the shards" in run.output
    assert "screened: yes, 1 flagged (text 1), 0 undecided, 1 kept, 1 removed" in run.output
