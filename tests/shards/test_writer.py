"""A build: what enters the shards, what must not, and that neither processes nor kills change a byte."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from panfm.errors import UserError
from panfm.shards import writer
from panfm.shards.cards import SourceCard, load_card
from panfm.shards.index import open_shard_set
from panfm.shards.privacy import PUBLIC_KEY, pseudonymise
from panfm.shards.schema import SAMPLES_SCHEMA, Sample
from panfm.shards.writer import BuildOptions, build_shards
from tests.shards.wsi_pyramids import draw_tissue, write_pyramid

SMALL = BuildOptions(samples_per_shard=5)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def find_row(table: Any, source_path: str) -> int:
    key = pseudonymise(PUBLIC_KEY, "small", "sample", source_path)
    return int(table["key"].to_pylist().index(key))


# ------------------------------------------------------------------------------------------------ what enters


def test_every_sample_is_whole(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    out = tmp_path / "shards"
    report = build_shards(archive.card, archive.root, out, options=SMALL)
    assert (report.num_samples, report.num_shards, report.num_rejected, report.differences) == (12, 3, {}, ())
    assert sorted(path.name for path in out.iterdir()) == [
        "index.json",
        "quarantine.csv",
        "samples.parquet",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    assert pq.read_schema(out / "samples.parquet").equals(SAMPLES_SCHEMA)
    shard_set = open_shard_set(out)
    table = shard_set.table
    assert len(set(table["key"].to_pylist())) == 12
    for number in range(12):
        row = find_row(table, f"images/photo{number}.jpg")
        facts = table.slice(row, 1).to_pylist()[0]
        image = Image.open(io.BytesIO(shard_set.read_image(row)))
        original = Image.open(archive.root / f"images/photo{number}.jpg")
        assert np.array_equal(np.asarray(image), np.asarray(original))  # nothing to change: the JPEG's own data
        assert (facts["width"], facts["height"], facts["original_width"]) == (80, 60, 80)
        assert facts["age"] == (None if number == 1 else 30 + number)
        assert facts["sex"] == ("female", "male")[number % 2]
        assert facts["phototype_low"] == (None, 3)[number % 2]
        assert facts["phototype_source"] == (None, "clinician")[number % 2]
        assert facts["visit_day"] == (number % 4 if number < 8 else number % 2)
        assert facts["group_kind"] == ("patient" if number < 8 else "lesion")
        assert facts["group_id"] == (facts["patient_id"] if number < 8 else facts["lesion_id"])
        assert dict(facts["labels"]) == ({"diagnosis": "nevus"}, {"diagnosis": "melanoma"}, {})[number % 3]
        assert json.loads(facts["tabular"]) == {"diameter": number + 0.5}
        assert facts["institution"] == "north" and facts["synthetic"] and facts["licence"] == "CC0 1.0"
        mask = shard_set.read_mask(row)
        if number % 3:
            assert mask is None
        else:
            stored = np.asarray(Image.open(io.BytesIO(mask or b"")))
            assert np.array_equal(stored, np.asarray(Image.open(archive.root / f"masks/photo{number}.png")))
        assert shard_set.read_caption(row) == ("a mole of patient number 2" if number == 2 else None)
    assert len({g for g, k in zip(table["group_id"].to_pylist(), table["group_kind"].to_pylist(), strict=True)}) == 4


def test_the_tar_says_what_the_table_says(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    build_shards(archive.card, archive.root, tmp_path / "shards", options=SMALL)
    shard_set = open_shard_set(tmp_path / "shards")
    members: dict[str, dict[str, bytes]] = {}
    for path in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                key, _, extension = member.name.partition(".")
                members.setdefault(key, {})[extension] = tar.extractfile(member).read()  # type: ignore[union-attr]
    for row, facts in enumerate(shard_set.table.to_pylist()):
        sample = Sample.model_validate_json(members[facts["key"]]["json"])
        assert members[facts["key"]]["jpg"] == shard_set.read_image(row)
        assert members[facts["key"]].get("mask.png") == shard_set.read_mask(row)
        for name, value in sample.model_dump(exclude={"schema_version"}).items():
            told = {"labels": dict, "tabular": json.loads, "permitted_uses": tuple}.get(name, lambda same: same)
            assert told(facts[name]) == (pytest.approx(value) if isinstance(value, float) else value), name


READ_BY_WEBDATASET = """
import json, sys
import webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("rgb8"):
    extras = sorted(set(sample) & {"mask.png", "txt"})
    print(json.dumps([sample["__key__"], sample["jpg"].shape, sample["json"]["source"], extras]))
"""


@pytest.mark.slow
def test_any_webdataset_reader_reads_it(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    build_shards(archive.card, archive.root, tmp_path / "shards", options=SMALL)
    urls = [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]
    # In a process of its own: the library leaves files open, which is an error in this suite.
    command = [sys.executable, "-c", READ_BY_WEBDATASET, *urls]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    keys, shapes, sources, extras = zip(*map(json.loads, lines), strict=True)
    shard_set = open_shard_set(tmp_path / "shards")
    assert list(keys) == shard_set.table["key"].to_pylist()
    assert list(shapes) == [[60, 80, 3]] * 12 and set(sources) == {"small"}
    assert sum("mask.png" in extra for extra in extras) == 4 and sum("txt" in extra for extra in extras) == 1


def test_photographs_are_shrunk_with_their_masks_and_tiles_are_not(
    make_archive: Callable[..., Any], tmp_path: Path
) -> None:
    archive = make_archive(3, size=(200, 150))
    small_mask = np.zeros((300, 400), dtype=np.uint8)  # drawn at twice the size, as HAM10000's are at three times
    small_mask[:150, 200:] = 7
    Image.fromarray(small_mask).save(archive.root / "masks/photo0.png")
    options = BuildOptions(short_side=75)
    build_shards(archive.card, archive.root, tmp_path / "a", options=options)
    shard_set = open_shard_set(tmp_path / "a")
    row = find_row(shard_set.table, "images/photo0.jpg")
    facts = shard_set.table.slice(row, 1).to_pylist()[0]
    assert [facts[name] for name in ("width", "height", "original_width", "original_height")] == [100, 75, 200, 150]
    mask = np.asarray(Image.open(io.BytesIO(shard_set.read_mask(row) or b"")))
    expected = np.zeros((75, 100), dtype=np.uint8)
    expected[:38, 50:] = 7  # the odd row goes to the tissue: nearest neighbour, no values in between
    assert mask.shape == (75, 100) and set(np.unique(mask)) == {0, 7} and np.abs(mask != expected).sum() <= 50
    archive.values["modality"] = "histopathology"
    build_shards(archive.card, archive.root, tmp_path / "b", options=options)
    assert set(open_shard_set(tmp_path / "b").table["width"].to_pylist()) == {200}


def test_palette_masks_keep_their_classes(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(1)
    classes = np.arange(60 * 80, dtype=np.uint8).reshape(60, 80) % 3
    mask = Image.fromarray(classes).convert("P")
    mask.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    mask.save(archive.root / "masks/photo0.png")
    build_shards(archive.card, archive.root, tmp_path / "shards", options=SMALL)
    stored = open_shard_set(tmp_path / "shards").read_mask(0)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored or b""))), classes)


@pytest.mark.real
def test_a_real_slide_becomes_tiles(real_data: Path, tmp_path: Path) -> None:
    card = load_card("slides_samples")
    report = build_shards(card, real_data / "slides", tmp_path / "shards", options=BuildOptions(samples_per_shard=16))
    shard_set = open_shard_set(tmp_path / "shards")
    table = shard_set.table
    assert report.num_samples == table.num_rows > 20 and report.num_shards == -(-table.num_rows // 16)
    assert set(table["mpp"].to_pylist()) == {0.5} and set(table["group_kind"].to_pylist()) == {"slide"}
    assert len(set(table["slide_id"].to_pylist())) == 1
    assert min(table["tissue_fraction"].to_pylist()) >= 0.5
    assert set(table["width"].to_pylist()) == set(table["height"].to_pylist()) == {224}
    places = list(zip(table["y0"].to_pylist(), table["x0"].to_pylist(), strict=True))
    assert len(set(places)) == len(places) and places != sorted(places)  # each once, shuffled
    import openslide

    with openslide.OpenSlide(real_data / "slides/openslide_testdata/CMU-1-Small-Region.svs") as slide:
        for row in (0, 7):
            stored = np.asarray(Image.open(io.BytesIO(shard_set.read_image(row)))).astype(int)
            x0, y0 = table["x0"][row].as_py(), table["y0"][row].as_py()

            def differ(shift: int, stored: np.ndarray = stored, x0: int = x0, y0: int = y0) -> float:
                there = slide.read_region((x0 + shift, y0), 0, (224, 224)).convert("RGB")
                return float(np.abs(stored - np.asarray(there).astype(int)).mean())

            # 0.499 -> 0.5 um a pixel: the tile is its place on the slide to within half a pixel at its far edge.
            assert differ(0) < 8 and differ(0) < 0.5 * differ(8)


@pytest.mark.real
def test_real_photographs(real_data: Path, tmp_path: Path) -> None:
    report = build_shards(
        load_card("slice3d"), real_data / "total_body/slice3d", tmp_path / "s", options=BuildOptions()
    )
    assert (report.num_samples, report.differences) == (3, ())
    table = open_shard_set(tmp_path / "s").table
    assert table["modality"].to_pylist() == ["total_body"] * 3 and sorted(table["age"].to_pylist()) == [35, 45, 65]
    assert all(row == [] for row in table["labels"].to_pylist())  # "unlabelled" is no label


# ------------------------------------------------------------------------------------------------ what must not


def test_no_identifier_gets_through(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(6)
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x013B] = "Canon", "EOS", "PLANTED artist"
    exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 11.0, 7.0), 29: "1987:03:14"})
    text = PngImagePlugin.PngInfo()
    text.add_text("Patient", "PLANTED text")
    text.add_text("Zipped", "PLANTED zipped " * 30, zip=True)
    picture = Image.open(archive.root / "images/photo0.jpg").convert("RGB")
    writes: list[tuple[str, dict[str, Any]]] = [
        ("PLANTED-Ida-Doe.jpg", {"exif": exif, "comment": b"PLANTED comment", "xmp": b"<x>PLANTED xmp</x>"}),
        ("PLANTED-Ida-Doe.png", {"pnginfo": text, "exif": exif}),
        ("PLANTED-Ida-Doe.tif", {"description": "PLANTED tag", "software": "PLANTED"}),
        ("PLANTED-Ida-Doe.webp", {"exif": exif}),
    ]
    for row, (name, options) in zip(archive.rows, writes, strict=False):
        picture.save(archive.root / "images" / name, **options)
        row |= {"file": f"images/{name}", "patient": "PLANTED-patient", "date": "1987-03-14", "lesion": "PLANTED-mole"}
    (archive.root / "images/PLANTED-broken.jpg").write_bytes(b"PLANTED not an image")
    archive.rows[4]["file"] = "images/PLANTED-broken.jpg"
    mask = PngImagePlugin.PngInfo()
    mask.add_text("Reader", "PLANTED reader")
    Image.new("L", (80, 60), 3).save(archive.root / "masks/PLANTED-mask.png", pnginfo=mask)
    archive.rows[5]["mask"] = "masks/PLANTED-mask.png"
    archive.write_table()

    # Private ids: nobody without the key may be able to compute them.
    archive.values["identifiers"] = "private"
    options = BuildOptions(max_rejected_share=0.5, key_file=tmp_path / "k.key", create_key=True)
    report = build_shards(archive.card, archive.root, tmp_path / "shards", options=options)
    assert report.num_rejected == {"undecodable": 1} and report.rejected[0].path.name == "PLANTED-broken.jpg"
    shard_set = open_shard_set(tmp_path / "shards")
    secret = (tmp_path / "k.key").read_text().strip()
    public = pseudonymise(PUBLIC_KEY, "small", "patient", "PLANTED-patient")
    files = read_folder(tmp_path / "shards")
    everything = [*files.values(), str(shard_set.table.to_pylist()).encode()]  # the parquet is compressed
    everything += [
        member for row in range(5) for member in (shard_set.read_image(row), shard_set.read_mask(row) or b"")
    ]
    for data in everything:
        for planted in (
            b"PLANTED",
            b"Ida",
            b"1987",
            b"photo5",
            str(tmp_path).encode(),
            secret.encode(),
            public.encode(),
        ):
            assert planted not in data
    for row in range(5):
        stored = Image.open(io.BytesIO(shard_set.read_image(row)))
        stored.load()
        assert not dict(stored.getexif()) and not {"icc_profile", "comment", "xmp", "exif", "Patient"} & set(
            stored.info
        )
    assert shard_set.table["device"].to_pylist().count("Canon EOS") == 3
    with (tmp_path / "shards/quarantine.csv").open() as file:
        assert [(row["reason"], row["num"]) for row in csv.DictReader(file)] == [("undecodable", "1")]


def test_private_ids_need_a_key_outside(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(2)
    out = tmp_path / "shards"
    with pytest.raises(UserError, match=r"card small has identifiers: public.*leave it out"):
        build_shards(archive.card, archive.root, out, options=BuildOptions(key_file=tmp_path / "k.key"))
    archive.values["identifiers"] = "private"
    with pytest.raises(UserError, match=r"card small: identifiers: private needs a secret key; give --key-file FILE"):
        build_shards(archive.card, archive.root, out, options=BuildOptions())
    with pytest.raises(UserError, match=r"k.key: no such key file.*--create-key"):
        build_shards(archive.card, archive.root, out, options=BuildOptions(key_file=tmp_path / "k.key"))
    with pytest.raises(UserError, match=r"lies inside the shard set"):
        build_shards(archive.card, archive.root, out, options=BuildOptions(key_file=out / "k.key", create_key=True))
    assert not out.exists()


def test_cards_of_one_namespace_share_patients(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(2)
    groups = []
    for name, namespace in (("small", None), ("other", None), ("third", "small")):
        archive.values |= {"name": name, "id_namespace": namespace}
        build_shards(archive.card, archive.root, tmp_path / name, options=SMALL)
        groups.append(set(open_shard_set(tmp_path / name).table["patient_id"].to_pylist()))
    assert groups[0] == groups[2] != groups[1] and len(groups[0]) == 1


def test_lesions_numbered_by_patient_stay_apart(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(8)
    for row in archive.rows:
        row["lesion"] = "1"
    archive.write_table()
    archive.values["lesion_id_scope"] = "patient"
    build_shards(archive.card, archive.root, tmp_path / "shards", options=SMALL)
    assert len(set(open_shard_set(tmp_path / "shards").table["lesion_id"].to_pylist())) == 2  # one a patient


# ------------------------------------------------------------------------------------------------ the same bytes


def test_the_seed_shuffles_and_nothing_else(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    keys = []
    for seed in (0, 1):
        options = BuildOptions(samples_per_shard=5, seed=seed)
        build_shards(archive.card, archive.root, tmp_path / str(seed), options=options)
        keys.append(open_shard_set(tmp_path / str(seed)).table["key"].to_pylist())
    in_order = [pseudonymise(PUBLIC_KEY, "small", "sample", f"images/photo{number}.jpg") for number in range(12)]
    assert keys[0] != keys[1] and in_order not in keys and sorted(keys[0]) == sorted(keys[1]) == sorted(in_order)


@pytest.mark.slow
def test_processes_seed_and_reruns(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    build_shards(archive.card, archive.root, tmp_path / "one", options=SMALL)
    two = BuildOptions(samples_per_shard=5, processes=2)
    build_shards(archive.card, archive.root, tmp_path / "two", options=two)
    first = read_folder(tmp_path / "one")
    assert first == read_folder(tmp_path / "two")

    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    again = build_shards(archive.card, archive.root, tmp_path / "one", options=two)
    assert again.already_complete and again.num_samples == 12 and again.num_shards_reused == 3
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}

    other = BuildOptions(samples_per_shard=5, seed=1)
    with pytest.raises(
        UserError, match=r"one: already holds a complete shard set of another card.*another --out, or del"
    ):
        build_shards(archive.card, archive.root, tmp_path / "one", options=other)
    archive.rows[0]["age"] = "99"
    archive.write_table()
    with pytest.raises(UserError, match=r"already holds a complete shard set"):
        build_shards(archive.card, archive.root, tmp_path / "one", options=SMALL)
    assert first == read_folder(tmp_path / "one")


KILLED_BUILD = """
import signal
import json, sys
from pathlib import Path
from panfm.shards.cards import SourceCard
from panfm.shards.writer import BuildOptions, build_shards
from tests.shards.wsi_pyramids import draw_tissue, write_pyramid
card, root, out = sys.argv[1:]
options = BuildOptions(samples_per_shard=1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so would we
build_shards(SourceCard.model_validate_json(card), Path(root), Path(out), options=options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_goes_on_to_the_same_bytes(
    make_archive: Callable[..., Any], tmp_path: Path, kind: signal.Signals
) -> None:
    archive = make_archive(12, size=(1600, 1200))
    options = BuildOptions(samples_per_shard=1)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED_BUILD, archive.card.model_dump_json(), str(archive.root), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    finished = out / ".build"
    while len(list(finished.glob("*.parquet"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, kind)
    assert process.wait() != 0, "the build ended before it could be killed"
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"killed: has no index.json, so its build did not complete.*again"):
        open_shard_set(out)
    (out / "shard-000009.tar.tmp-left").write_bytes(b"half")
    report = build_shards(archive.card, archive.root, out, options=options)
    assert 3 <= report.num_shards_reused < 12
    build_shards(archive.card, archive.root, tmp_path / "whole", options=options)
    assert read_folder(out) == read_folder(tmp_path / "whole")


def test_only_whole_shards_of_the_same_plan_are_reused(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    for number in range(3):  # too many to finish: the shards are whole, the build is not
        (archive.root / f"images/photo{number}.jpg").rename(archive.root / f"images/away{number}.jpg")
    out = tmp_path / "shards"
    with pytest.raises(
        UserError, match=r"3 of 12 files were rejected \(missing_file 3\), more than max_rejected_share"
    ):
        build_shards(archive.card, archive.root, out, options=SMALL)
    assert not (out / "index.json").exists() and len(list((out / ".build").glob("*.parquet"))) == 3
    with (out / "shard-000001.tar").open("ab") as file:
        file.truncate(1000)
    (out / ".build/shard-000002.parquet").write_bytes(b"torn")
    lenient = BuildOptions(samples_per_shard=5, max_rejected_share=0.3)
    report = build_shards(archive.card, archive.root, out, options=lenient)
    assert (report.num_shards_reused, report.num_samples) == (1, 9)


def test_shards_of_another_plan_are_not_reused(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    out = tmp_path / "shards"
    photo = archive.root / "images/photo3.jpg"
    photo.rename(archive.root / "away.jpg")
    with pytest.raises(UserError, match=r"1 of 12 files were rejected"):
        build_shards(archive.card, archive.root, out, options=SMALL)
    (archive.root / "away.jpg").rename(photo)
    archive.rows[7]["age"] = "88"
    archive.write_table()
    report = build_shards(archive.card, archive.root, out, options=SMALL)
    assert (report.num_shards_reused, report.num_samples) == (0, 12)
    build_shards(archive.card, archive.root, tmp_path / "fresh", options=SMALL)
    assert read_folder(out) == read_folder(tmp_path / "fresh")


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_images_are_counted_by_reason(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(12)
    images, masks = archive.root / "images", archive.root / "masks"
    data = (images / "photo1.jpg").read_bytes()
    (images / "photo1.jpg").write_bytes(data[: len(data) // 2])
    (images / "photo2.jpg").write_bytes(b"text")
    Image.new("RGB", (80, 60), "white").save(images / "photo4.jpg")
    Image.open(images / "photo5.jpg").resize((40, 30)).save(images / "photo5.jpg")
    (images / "photo7.jpg").unlink()
    (masks / "photo0.png").unlink()
    (masks / "photo3.png").write_bytes(b"text")
    Image.new("L", (60, 80), 255).save(masks / "photo6.png")
    options = BuildOptions(samples_per_shard=5, max_rejected_share=0.7)
    report = build_shards(archive.card, archive.root, tmp_path / "shards", options=options)
    expected = {
        "blank": 1,
        "mismatched_mask": 1,
        "missing_file": 1,
        "missing_mask": 1,
        "too_small": 1,
        "truncated": 1,
        "undecodable": 1,
        "undecodable_mask": 1,
    }
    assert report.num_rejected == expected and report.num_samples == 4
    named = {rejection.path.name: rejection.reason for rejection in report.rejected}
    assert named["photo1.jpg"] == "truncated" and named["photo5.jpg"] == "too_small"
    index = json.loads((tmp_path / "shards/index.json").read_text())
    assert index["num_rejected"] == expected and index["num_samples"] == 4
    with (tmp_path / "shards/quarantine.csv").open() as file:
        rows = {row["key"]: row["reason"] for row in csv.DictReader(file)}
    assert rows[pseudonymise(PUBLIC_KEY, "small", "sample", "images/photo4.jpg")] == "blank"
    with pytest.raises(
        UserError, match=r"8 of 12 files were rejected \(blank 1, .*the first: .*photo.*max_rejected_share"
    ):
        build_shards(archive.card, archive.root, tmp_path / "strict", options=SMALL)
    assert not (tmp_path / "strict/index.json").exists()


def test_nothing_left_is_an_error(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(3)
    for path in (archive.root / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"3 of 3 files were rejected \(undecodable 3\)"):
        build_shards(archive.card, archive.root, tmp_path / "s", options=BuildOptions(max_rejected_share=1.0))
    assert not (tmp_path / "s/index.json").exists()


def test_foreign_folders_and_forbidden_uses_are_refused(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(2)
    with pytest.raises(UserError, match=r"raw: holds \w+.*, which is no part of a shard set; give --out an empty"):
        build_shards(archive.card, archive.root, archive.root, options=SMALL)
    assert not (archive.root / ".build").exists()
    with pytest.raises(UserError, match=r"table.csv: is a file; give --out a folder"):
        build_shards(archive.card, archive.root, archive.root / "table.csv", options=SMALL)
    archive.values["permitted_uses"] = ["education"]
    with pytest.raises(UserError, match=r"card small: permitted_uses \(education\) does not include research"):
        build_shards(archive.card, archive.root, tmp_path / "s", options=SMALL)
    assert not (tmp_path / "s").exists()


@pytest.mark.real
def test_slides_that_cannot_be_read_are_counted(real_data: Path, tmp_path: Path) -> None:
    values = load_card("slides_samples").model_dump(mode="json")
    names = ["H&E", "corrupt", "H&E head and neck (TCGA-HNSC)"]
    card = SourceCard.model_validate(values | {"only": {"label": names}})
    with pytest.raises(UserError, match=r"2 of 3 files were rejected \(no_mpp 1, unreadable_slide 1\).*fallback_mpp"):
        build_shards(card, real_data / "slides", tmp_path / "s", options=BuildOptions())
    options = BuildOptions(max_rejected_share=0.7)
    assert build_shards(card, real_data / "slides", tmp_path / "s", options=options).num_samples > 20


def test_a_resolution_in_the_table_serves_where_the_slide_states_none(
    make_slides: Callable[..., Any], tmp_path: Path
) -> None:
    archive = make_slides((224, 224), (224, 224))
    write_pyramid(archive.root / "slides/slide1.tiff", draw_tissue(448, 448), None, (1,), compression="zlib")
    for row, stated in zip(archive.rows, ("0.1", "0.25"), strict=True):  # the first slide's own word counts
        row["mpp"] = stated
    archive.values["columns"]["mpp"] = "mpp"
    archive.write_table()
    build_shards(archive.card, archive.root, tmp_path / "shards", options=BuildOptions())
    rows = open_shard_set(tmp_path / "shards").table.to_pylist()
    assert len(rows) == 8 and {row["mpp"] for row in rows} == {0.5} and {row["colour"] for row in rows} == {"untagged"}
    assert {(row["x0"], row["y0"]) for row in rows} == {(x, y) for x in (0, 112, 224) for y in (0, 112, 224)} - {
        (112, 224),
        (224, 112),
    }  # 112 level-0 pixels a tile of the one, 224 of the other


def test_a_private_archive_needs_its_legal_basis(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive()
    archive.values |= {"identifiers": "private", "legal_basis": "TODO: ask the data protection officer"}
    options = BuildOptions(key_file=tmp_path / "key", create_key=True)
    with pytest.raises(UserError, match="TODO is left in legal_basis"):
        build_shards(archive.card, archive.root, tmp_path / "shards", options=options)
    archive.values["legal_basis"] = "approved by the ethics committee"
    assert build_shards(archive.card, archive.root, tmp_path / "shards", options=options).num_samples == 12


def test_what_a_lost_worker_was_writing_is_taken_away(
    make_archive: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, out = make_archive(), tmp_path / "shards"
    count_all = writer._count_all

    def lose_a_worker(plan: Any) -> Any:
        (out / "shard-000001.tar.tmp-lost").write_bytes(b"half an image")
        return count_all(plan)

    monkeypatch.setattr(writer, "_count_all", lose_a_worker)
    build_shards(archive.card, archive.root, out, options=SMALL)
    assert not list(out.glob("*.tmp-*"))
