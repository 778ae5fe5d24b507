import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from panfm import features as features_module
from panfm.encoder import Encoder, load_encoder
from panfm.errors import UserError
from panfm.features import Features, compute_features, write_features
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.writer import BuildOptions, build_shards
from tests.archives import make_source_card

NUM_IMAGES = 50
ADDRESS = "timm:test_vit@random:0?image_size=32"


def build(folder: Path, seed: int, number: int = NUM_IMAGES) -> ShardSet:
    rng = np.random.default_rng(seed)
    (folder / "raw").mkdir(parents=True)
    with (folder / "raw/table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file"])
        for image in range(number):
            coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((64, 48)).save(folder / f"raw/{image}.png")
            writer.writerow([f"{image}.png"])
    card = make_source_card("features_test", modality="clinical", columns={"path": "file"})
    build_shards(card, folder / "raw", folder / "shards", options=BuildOptions(samples_per_shard=20))
    return open_shard_set(folder / "shards")


@pytest.fixture(scope="module")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return build(tmp_path_factory.mktemp("features"), seed=0)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(ADDRESS)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that went through an encoder."""
    sizes: list[int] = []
    original = Encoder.forward

    def count(self: Encoder, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Encoder, "forward", count)
    return sizes


def compute_directly(encoder: Encoder, shard_set: ShardSet) -> NDArray[np.float32]:
    images = [encoder.transform.apply(shard_set.read_image(row)) for row in range(shard_set.num_samples)]
    return encoder.forward(torch.from_numpy(np.stack(images))).numpy()


def test_values_keys_and_order_are_those_of_the_shard_set(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, forwards: list[int]
) -> None:
    expected = compute_directly(encoder, shard_set)
    forwards.clear()
    for workers in (0, 2):
        features = compute_features(
            encoder, shard_set, cache_dir=tmp_path / str(workers), batch_size=16, workers=workers
        )
        np.testing.assert_allclose(features.values, expected, rtol=1e-4, atol=1e-5)
        assert features.values.dtype == np.float32 and features.values.shape == (NUM_IMAGES, 64)
        assert list(features.keys) == shard_set.table["key"].to_pylist()
        assert features.data_hash == shard_set.compute_data_hash() and features.encoder_hash == encoder.hash
    assert forwards == [16, 16, 16, 2] * 2
    assert len({row.tobytes() for row in np.asarray(features.values)}) == NUM_IMAGES  # images differ, so do features


def test_a_second_call_reads_the_map_and_a_subset_is_taken_from_it(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, forwards: list[int]
) -> None:
    whole = compute_features(encoder, shard_set, cache_dir=tmp_path)
    forwards.clear()
    again = compute_features(encoder, shard_set, cache_dir=tmp_path)
    assert isinstance(again.values, np.memmap) and not again.values.flags.writeable
    np.testing.assert_array_equal(again.values, whole.values)
    subset = compute_features(encoder, shard_set, [7, 3, 40], cache_dir=tmp_path)
    np.testing.assert_array_equal(subset.values, whole.values[[7, 3, 40]])
    assert subset.keys == tuple(whole.keys[row] for row in (7, 3, 40)) and subset.rows.tolist() == [7, 3, 40]
    assert subset.data_hash != whole.data_hash
    assert forwards == []


def test_a_subset_alone_does_not_force_the_whole(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, forwards: list[int]
) -> None:
    rows = np.array([40, 3, 7, 8, 9])
    subset = compute_features(encoder, shard_set, rows, cache_dir=tmp_path)
    assert sum(forwards) == 5
    compute_features(encoder, shard_set, rows, cache_dir=tmp_path)
    assert sum(forwards) == 5
    np.testing.assert_allclose(subset.values, compute_directly(encoder, shard_set)[rows], rtol=1e-4, atol=1e-5)
    empty = compute_features(encoder, shard_set, [], cache_dir=tmp_path)
    assert empty.values.shape == (0, 64) and empty.keys == ()


@pytest.mark.parametrize("change", ["weights", "transform", "pooling", "dtype", "data"])
def test_what_changes_features_misses_the_cache(
    change: str, encoder: Encoder, shard_set: ShardSet, tmp_path: Path, forwards: list[int]
) -> None:
    compute_features(encoder, shard_set, cache_dir=tmp_path)
    forwards.clear()
    address = {
        "weights": "timm:test_vit@random:1?image_size=32",
        "transform": "timm:test_vit@random:0?image_size=48",
        "pooling": f"{ADDRESS}&pooling=mean",
        "dtype": f"{ADDRESS}&dtype=bf16",
        "data": ADDRESS,
    }[change]
    data = build(tmp_path / "other", seed=1) if change == "data" else shard_set
    features = compute_features(load_encoder(address), data, cache_dir=tmp_path)
    assert sum(forwards) == NUM_IMAGES
    np.testing.assert_allclose(
        features.values,
        compute_directly(load_encoder(address), data),
        rtol=0.05,
        atol=0.05 if "bf16" in address else 1e-5,
    )


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    monkeypatch.setattr(features_module, "PART_ROWS", 17)  # 2 batches of 8 a part: 16 + 16 + 16 + 2
    whole = compute_features(encoder, shard_set, cache_dir=tmp_path / "whole", batch_size=8)
    original = features_module.iterate_features

    def die(*args: object) -> Iterator[NDArray[np.float32]]:
        for number, batch in enumerate(original(*args)):  # type: ignore[arg-type]
            if number == 5:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(features_module, "iterate_features", die)
    with pytest.raises(KeyboardInterrupt):
        compute_features(encoder, shard_set, cache_dir=tmp_path / "killed", batch_size=8)
    (folder,) = (tmp_path / "killed").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["lock", "part-000000000.bin", "part-000000016.bin"]

    monkeypatch.setattr(features_module, "iterate_features", original)
    torn = folder / "part-000000016.bin"
    torn.write_bytes(torn.read_bytes()[:-1] + b"\x00")  # a damaged part is computed again, a whole one is not
    forwards.clear()
    resumed = compute_features(encoder, shard_set, cache_dir=tmp_path / "killed", batch_size=8)
    assert sum(forwards) == NUM_IMAGES - 16
    assert np.array_equal(resumed.values, whole.values)
    assert sorted(path.name for path in folder.iterdir()) == ["features.npy", "lock", "manifest.json"]


def test_parts_of_another_batch_size_are_not_mixed_in(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[int]
) -> None:
    monkeypatch.setattr(features_module, "PART_ROWS", 16)
    original = features_module.iterate_features

    def die(*args: object) -> Iterator[NDArray[np.float32]]:
        for number, batch in enumerate(original(*args)):  # type: ignore[arg-type]
            if number == 3:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(features_module, "iterate_features", die)
    with pytest.raises(KeyboardInterrupt):
        compute_features(encoder, shard_set, cache_dir=tmp_path, batch_size=8)
    monkeypatch.setattr(features_module, "iterate_features", original)
    forwards.clear()
    compute_features(encoder, shard_set, cache_dir=tmp_path, batch_size=16)
    assert sum(forwards) == NUM_IMAGES


def test_two_that_want_the_same_features_compute_them_once(
    encoder: Encoder, shard_set: ShardSet, tmp_path: Path, forwards: list[int]
) -> None:
    def compute(_: int) -> Features:
        return compute_features(encoder, shard_set, cache_dir=tmp_path, batch_size=8)

    with ThreadPoolExecutor(3) as pool:  # the lock is of the file, so threads stand for processes
        results = list(pool.map(compute, range(3)))
    assert sum(forwards) == NUM_IMAGES
    assert all(np.array_equal(result.values, results[0].values) for result in results)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "foreign", "no_manifest", "torn_manifest"])
def test_a_damaged_cache_is_computed_again(
    damage: str, encoder: Encoder, shard_set: ShardSet, tmp_path: Path, forwards: list[int]
) -> None:
    good = np.array(compute_features(encoder, shard_set, cache_dir=tmp_path).values)
    (folder,) = tmp_path.iterdir()
    file, manifest = folder / "features.npy", folder / "manifest.json"
    if damage == "flipped":
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-64])
    elif damage == "foreign":  # a whole cache of another encoder under this one's name
        compute_features(load_encoder("timm:test_vit@random:1?image_size=32"), shard_set, cache_dir=tmp_path / "other")
        (other,) = (tmp_path / "other").iterdir()
        for name in ("features.npy", "manifest.json"):
            (folder / name).write_bytes((other / name).read_bytes())
    elif damage == "no_manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:20])
    forwards.clear()
    again = compute_features(encoder, shard_set, cache_dir=tmp_path)
    assert sum(forwards) == NUM_IMAGES
    assert np.array_equal(again.values, good)


def test_a_damaged_shard_is_named_with_the_key(encoder: Encoder, tmp_path: Path) -> None:
    shards = build(tmp_path, seed=0, number=3)
    (tar,) = shards.path.glob("*.tar")
    data = bytearray(tar.read_bytes())
    data[int(shards.places.offset[1]) + 60] ^= 1
    tar.write_bytes(data)
    damaged = open_shard_set(shards.path)
    key = damaged.table["key"][1].as_py()
    with pytest.raises(UserError, match=rf"{tar.name}: {key}: its bytes are not those of the index"):
        compute_features(encoder, damaged, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    compute_features(encoder, damaged, [0, 2], cache_dir=tmp_path / "cache")


def test_a_feature_that_is_not_finite_is_an_error(encoder: Encoder, shard_set: ShardSet, tmp_path: Path) -> None:
    broken = load_encoder(ADDRESS)
    with torch.no_grad():
        broken.module.model.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match="gives a feature that is not finite"):
        compute_features(broken, shard_set, cache_dir=tmp_path)


def test_features_are_written_as_lists_under_their_keys(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_features(tmp_path / "f.parquet", ["a", "b", "c", "d"], values, {"encoder": "x"})
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["key"].to_pylist() == ["a", "b", "c", "d"]
    assert table["feature"].to_pylist()[2] == [6.0, 7.0, 8.0]
    assert str(table.schema.field("feature").type.value_type) == "float"
    assert table.schema.metadata[b"encoder"] == b"x"
