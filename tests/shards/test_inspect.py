"""The look at a shard set: counts are those of the table, and the sheet shows the images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from panfm.errors import UserError
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.inspect import draw_contact_sheet, format_total, summarise
from panfm.shards.writer import BuildOptions, build_shards


@pytest.fixture
def shard_set(make_archive: Callable[..., Any], tmp_path: Path) -> ShardSet:
    archive = make_archive()
    archive.rows[0]["file"] = "images/copy.jpg"
    (archive.root / "images/copy.jpg").write_bytes((archive.root / "images/photo3.jpg").read_bytes())
    (archive.root / "images/photo5.jpg").write_bytes(b"text")
    archive.write_table()
    options = BuildOptions(samples_per_shard=5, max_rejected_share=0.1)
    return open_shard_set(build_shards(archive.card, archive.root, tmp_path / "shards", options=options).path)


def test_counts(shard_set: ShardSet) -> None:
    summary = summarise(shard_set)
    assert (summary.source, summary.num_samples, summary.num_shards, summary.num_groups) == ("small", 11, 3, 4)
    assert summary.labels == {"diagnosis": {"nevus": 4, "melanoma": 4, "unknown": 3}}
    assert summary.counts["sex"] == {"female": 6, "male": 5} and summary.counts["modality"] == {"clinical": 11}
    assert summary.counts["institution"] == {"north": 11} and summary.counts["official_split"] == {"unknown": 11}
    assert summary.phototypes == {"3": 5, "unknown": 6}
    assert summary.missing["age"] == 1 and summary.missing["patient_id"] == 4 and summary.missing["visit_day"] == 0
    assert summary.rejected == {"undecodable": 1} and summary.num_near_copies == 1 and summary.num_with_mask == 4
    assert summary.short_sides == (60, 60, 60) and summary.age_years == (30.0, 36.5, 41.0)
    assert summary.num_bytes == sum(path.stat().st_size for path in shard_set.path.glob("*.tar"))
    assert summary.age_decades == {"30-39": 8, "40-49": 2, "unknown": 1} and summary.short_side_quartiles == (60, 60)
    lengths = shard_set.table["length"].to_pylist()
    assert summary.bytes_per_image == (min(lengths), sorted(lengths)[5], max(lengths))


def test_the_page_tells_shares_sizes_and_the_review(shard_set: ShardSet) -> None:
    lines = str(summarise(shard_set)).splitlines()
    assert "missing: patient_id 4 (36 %), age 1 (9 %), anatomic_site 11 (100 %)" in "\n".join(lines)
    assert "age: 30-39 8, 40-49 2, unknown 1" in lines and lines[-1] == "screened: no"
    total = format_total([summarise(shard_set), summarise(shard_set)]).splitlines()
    assert [line.split()[:2] for line in total] == [["small", "11"], ["small", "11"], ["all", "22"]]


def test_the_contact_sheet_shows_every_image(shard_set: ShardSet, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(draw_contact_sheet(shard_set, tmp_path / "sheet.png")))
    assert pixels.shape == (2 * (128 + 26), 8 * 128, 3)
    for place in range(16):
        left, top = place % 8 * 128, place // 8 * 154
        tile, text = pixels[top : top + 128, left : left + 128], pixels[top + 128 : top + 154, left : left + 128]
        assert (np.ptp(tile) > 100) == (np.ptp(text) > 100) == (place < 11)
    assert draw_contact_sheet(shard_set, tmp_path / "again.png").read_bytes() == (tmp_path / "sheet.png").read_bytes()
    few = np.asarray(Image.open(draw_contact_sheet(shard_set, tmp_path / "few.png", num_images=3)))
    assert few.shape == (154, 3 * 128, 3)
    with pytest.raises(UserError, match=r"sheet.jpg: a contact sheet is a PNG"):
        draw_contact_sheet(shard_set, tmp_path / "sheet.jpg")


def test_rare_labels_are_on_a_small_contact_sheet(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(30, (40, 40))
    for number, row in enumerate(archive.rows):
        row["dx"], row["mask"], row["date"] = "mel" if number == 17 else "nv", "", ""
    Image.new("RGB", (40, 40), (0, 0, 250)).save(archive.root / "images/photo17.png")
    blue = Image.open(archive.root / "images/photo17.png")
    blue.paste((0, 250, 0), (0, 0, 20, 40))  # two colours: not blank
    blue.save(archive.root / "images/photo17.png")
    archive.rows[17]["file"] = "images/photo17.png"
    archive.write_table()
    options = BuildOptions(max_rejected_share=0)
    built = open_shard_set(build_shards(archive.card, archive.root, tmp_path / "shards", options=options).path)
    for seed in range(3):
        sheet = Image.open(draw_contact_sheet(built, tmp_path / "sheet.png", num_images=4, seed=seed))
        assert (np.asarray(sheet) == (0, 0, 250)).all(axis=-1).sum() > 200, "the one melanoma is not shown"
