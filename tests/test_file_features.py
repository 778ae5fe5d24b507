"""Features of files: each content once, resumed, shared by ranks, and one bad file costs itself alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image

from panfm import features, file_features
from panfm.cli import embed
from panfm.encoder import Encoder, load_encoder
from panfm.encoder.embedding import ReadableBatch
from panfm.errors import UserError
from panfm.features import remove_cached
from panfm.file_features import FileFeatures, compute_file_features, group_faults, list_images
from tests.ranks import run_ranks
from tests.test_features import NUM_IMAGES, build

ADDRESS = "timm:test_vit@random:0?image_size=32"
NUM_GOOD = 19


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(ADDRESS)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """19 contents in 20 files of two folders, two files that cannot be decoded, and what is no image."""
    folder = tmp_path / "photos"
    (folder / "later/deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(NUM_GOOD):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        place = folder / ("later/deep" if number % 3 == 0 else "")
        Image.fromarray(coarse).resize((64, 48)).save(
            place / f"{number:02}.{'png' if number % 2 else 'JPG'}", quality=95
        )
    shutil.copy(folder / "01.png", folder / "later/copy.png")
    (folder / "05a.jpg").write_bytes(b"no image")
    whole = (folder / "later/deep/00.JPG").read_bytes()
    (folder / "zz_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "later/notes.txt").write_text("no image")
    (folder / "._01.png").write_bytes(b"what a Mac leaves behind")
    return folder


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that went through an encoder."""
    sizes: list[int] = []
    original = Encoder.forward

    def count(self: Encoder, images: object) -> object:
        sizes.append(len(images))  # type: ignore[arg-type]
        return original(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoder, "forward", count)
    return sizes


def compute(encoder: Encoder, folder: Path, cache: Path, **options: int) -> FileFeatures:
    found = compute_file_features(encoder, list_images([folder]).paths, cache_dir=cache, batch_size=4, **options)
    assert found is not None
    return found


def test_a_folder_is_searched_to_its_bottom_and_images_told_by_their_names(photos: Path) -> None:
    images = list_images([photos])
    names = [str(path.relative_to(photos)) for path in images.paths]
    assert len(names) == NUM_GOOD + 3 and images.num_others == 2
    assert names[:2] == ["01.png", "02.JPG"] and "05a.jpg" in names
    assert names[-8:] == [
        "later/copy.png",
        *(f"later/deep/{number:02}.{'png' if number % 2 else 'JPG'}" for number in range(0, 19, 3)),
    ]
    assert list_images([photos, photos / "01.png"]).paths == images.paths
    (photos / "empty").mkdir()
    for location, message in (
        (photos / "empty", r"empty: no image in it, and no index.json of a shard set"),
        (photos / "absent.png", r"absent.png: no such file or folder"),
    ):
        with pytest.raises(UserError, match=message):
            list_images([location])


def test_one_bad_file_costs_itself_alone(encoder: Encoder, photos: Path, tmp_path: Path) -> None:
    paths = list_images([photos]).paths
    good = [path for path in paths if path.name not in ("05a.jpg", "zz_cut.jpg")]
    for workers in (0, 3):
        found = compute(encoder, photos, tmp_path / str(workers), workers=workers)
        assert [paths[number] for number in found.numbers] == good
        np.testing.assert_allclose(found.values, encoder.embed(good), rtol=1e-4, atol=1e-5)
        assert {paths[number].name: reason for number, reason in found.faults.items()} == {
            "05a.jpg": "does not decode (undecodable)",
            "zz_cut.jpg": "does not decode (truncated)",
        }
    assert (
        found.values[good.index(photos / "01.png")].tolist()
        == found.values[good.index(photos / "later/copy.png")].tolist()
    )


def test_every_content_is_computed_once_and_a_grown_folder_costs_its_new_images(
    encoder: Encoder, photos: Path, tmp_path: Path, batches: list[int]
) -> None:
    first = compute(encoder, photos, tmp_path / "cache")
    assert sum(batches) == NUM_GOOD  # the copy has the content of another
    batches.clear()
    moved = photos.rename(tmp_path / "moved")
    again = compute(encoder, moved, tmp_path / "cache")
    assert batches == [] and np.array_equal(again.values, first.values)
    Image.new("RGB", (40, 40), (9, 99, 200)).save(moved / "03_new.png")
    grown = compute(encoder, moved, tmp_path / "cache")
    assert batches == [1] and len(grown.numbers) == len(first.numbers) + 1
    compute(load_encoder("timm:test_vit@random:1?image_size=32"), moved, tmp_path / "cache")
    assert sum(batches) == 1 + NUM_GOOD + 1  # another encoder knows nothing of it
    removed, busy = remove_cached(tmp_path / "cache", "any source")
    assert len(removed) == 2 and not busy and not list((tmp_path / "cache").iterdir())  # a patient can be forgotten


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    encoder: Encoder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: list[int]
) -> None:
    monkeypatch.setattr(file_features, "PART_ROWS", 7)  # two batches of four a part
    whole = compute(encoder, photos, tmp_path / "whole")
    original = file_features.iterate_readable

    def die(*args: object) -> Iterator[ReadableBatch]:
        for number, batch in enumerate(original(*args)):  # type: ignore[arg-type]
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(file_features, "iterate_readable", die)
    with pytest.raises(KeyboardInterrupt):
        compute(encoder, photos, tmp_path / "killed")
    monkeypatch.setattr(file_features, "iterate_readable", original)
    (part,) = (tmp_path / "killed").glob("*/part-*.bin")
    kept = part.read_bytes()
    batches.clear()
    resumed = compute(encoder, photos, tmp_path / "killed")
    assert sum(batches) == NUM_GOOD - 7  # of the first two batches one file does not decode
    assert np.array_equal(resumed.values, whole.values) and resumed.faults == whole.faults

    for damage in (kept[:-1] + bytes([kept[-1] ^ 1]), kept[:-9], b""):  # a damaged part is computed again
        part.write_bytes(damage)
        batches.clear()
        assert np.array_equal(compute(encoder, photos, tmp_path / "killed").values, whole.values)
        assert sum(batches) == 7 and part.read_bytes() == kept


def test_a_file_that_changes_meanwhile_is_left_out(
    encoder: Encoder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = file_features._fill

    def change(*args: object) -> dict[str, str]:
        shutil.copy(photos / "02.JPG", photos / "04.JPG")
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(file_features, "_fill", change)
    paths = list_images([photos]).paths
    found = compute(encoder, photos, tmp_path / "cache")
    assert found.faults[paths.index(photos / "04.JPG")] == "cannot be read (it changed while it was embedded)"


def test_the_command_writes_what_it_can_and_says_what_it_could_not(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "f.parquet"
    options = {"cache": tmp_path / "cache", "batch_size": 4, "workers": 2, "device": "cpu"}
    with pytest.raises(typer.Exit) as end:
        embed.run(ADDRESS, [str(photos)], out, **options)
    assert end.value.exit_code == 1
    said = capsys.readouterr()
    assert f"{out}: 20 features of 64 dimensions" in said.out and "2 other files in the folders" in said.out
    assert "64 dimensions, pooling cls; shorter side to 33 px (bicubic), centre crop of 32 px, mean 0.500" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("left out, 2 of 22 images: ")]
    assert f"1 does not decode (undecodable): {photos / '05a.jpg'}" in line and "1 does not decode (truncated)" in line
    table = pq.read_table(out)
    assert table.column_names == ["key", "feature"] and table["key"][0].as_py() == str(photos / "01.png")
    assert table.schema.metadata[b"pooling"] == b"cls" and b'"resize_size": 33' in table.schema.metadata[b"transform"]
    embed.run(ADDRESS, [str(photos / "01.png")], out, **options)  # nothing left out: no exit
    with pytest.raises(UserError, match="no image of 1 can be read, so nothing is written: 1 does not decode"):
        embed.run(ADDRESS, [str(photos / "05a.jpg")], tmp_path / "none.parquet", **options)
    assert not (tmp_path / "none.parquet").exists()


def test_many_faults_are_counted_and_some_named() -> None:
    faults = dict.fromkeys(range(7), "does not decode (truncated)") | {7: "cannot be read (Permission denied)"}
    said = group_faults(faults, [f"{number}.png" for number in range(8)], shown=2)
    assert said == (
        "7 does not decode (truncated): 0.png, 1.png and 5 more; 1 cannot be read (Permission denied): 7.png"
    )


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have it: sums of more threads round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def embed_on_rank(photos: Path, shards: Path, folder: Path) -> list[tuple[int, int]]:
    """Of files, then of shards: the command's exit code, and the images that went through this rank's encoder."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "PART_ROWS", 8)  # several parts of few images
        sizes: list[int] = []
        forward = Encoder.forward
        patch.setattr(Encoder, "forward", lambda self, images: sizes.append(len(images)) or forward(self, images))
        for path, out in ((photos, folder / "files.parquet"), (shards, folder / "shards.parquet")):
            sizes.clear()
            code = 0
            try:
                embed.run(ADDRESS, [str(path)], out, cache=folder / "cache", batch_size=4, workers=1, device="cpu")
            except typer.Exit as end:
                code = end.exit_code
            found.append((code, sum(sizes)))
    return found


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one_process(photos: Path, tmp_path: Path, one_thread: None) -> None:
    shard_set = build(tmp_path / "set", seed=0)
    paths = (photos, shard_set.path)
    assert embed_on_rank(*paths, tmp_path / "alone") == [(1, NUM_GOOD), (0, NUM_IMAGES)]
    first, second = run_ranks(embed_on_rank, 2, *paths, tmp_path / "together")
    for place, (code, number) in enumerate(((1, NUM_GOOD), (0, NUM_IMAGES))):
        (first_code, num_first), (second_code, num_second) = first[place], second[place]
        assert (first_code, second_code) == (code, 0)
        assert num_first + num_second == number and min(num_first, num_second) > number / 4
    for name in ("files.parquet", "shards.parquet"):
        assert (tmp_path / "together" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    table = pq.read_table(tmp_path / "alone/shards.parquet")
    assert table.column_names == ["key", "source", "group_id", "feature"]
    for name in ("key", "source", "group_id"):
        assert table[name].to_pylist() == shard_set.table[name].to_pylist()
