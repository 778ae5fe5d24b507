"""Shard sets from somebody who means harm: nothing outside is read, nothing runs, nothing fills the memory."""

import io
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from panfm.data.loader import DataConfig, build_loader
from panfm.data.mixture import MixtureConfig
from panfm.data.transforms import AugmentConfig
from panfm.errors import UserError
from panfm.files import compute_file_sha256, read_json, write_json
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.places import MAX_MEMBER_BYTES
from panfm.shards.tars import BLOCK, MemberError, check_members, parse_header
from panfm.shards.verify import verify_shard_set
from tests.data.conftest import build_source
from tests.shards.range_server import RangeServer, serve


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"patient": f"p{n}", "lesion": "", "day": "", "modality": "clinical"} for n in range(6)]
    return build_source(tmp_path_factory.mktemp("built"), "alpha", rows, shard=3)


@pytest.fixture
def shards(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "alpha")


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("PANFM_CACHE", str(shards.parent / "cache"))
    with serve(shards.parent) as running:
        yield running


def change_index(folder: Path, **changes: object) -> None:
    write_json(folder / "index.json", read_json(folder / "index.json") | changes)


def change_shard(shards: Path, **changes: object) -> None:
    entries = read_json(shards / "index.json")["shards"]
    change_index(shards, shards=[entries[0] | changes, *entries[1:]])


def change_rows(shards: Path, **columns: Callable[[list[Any]], list[Any]]) -> None:
    """Change columns of samples.parquet and let index.json agree."""
    path = shards / "samples.parquet"
    table = pq.read_table(path)
    for name, change in columns.items():
        number = table.schema.get_field_index(name)
        values = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        table = table.set_column(number, pa.field(name, values.type), values)
    pq.write_table(table, path)
    change_index(shards, samples_sha256=compute_file_sha256(path))


def put(row: int, value: object) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:row], value, *values[row + 1 :]]


def refuse(shards: Path | str, match: str) -> None:
    with pytest.raises(UserError, match=match) as error:
        open_shard_set(shards)
    assert "\n" not in str(error.value) and "root:" not in str(error.value)


# ------------------------------------------------------------------------------------------------ what an index names


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "/etc/x.tar", "../x.tar", "inner/x.tar", "..tar", ".tar", "x.tar\0", "x.pkl", "", 3, None]
)
def test_shards_lie_in_the_folder_itself(shards: Path, name: object) -> None:
    change_shard(shards, name=name)
    refuse(shards, r"index.json: names the shard .*; a shard is a file NAME.tar in the same folder")
    with pytest.raises(UserError, match="names the shard"):
        verify_shard_set(shards)


def test_an_index_that_is_none_is_refused(shards: Path) -> None:
    whole = (shards / "index.json").read_text()
    for changes in ({"num_bytes": -1}, {"num_bytes": True}, {"num_bytes": "9"}, {"num_samples": None}, {"sha256": "x"}):
        change_shard(shards, **changes)
        refuse(shards, "sizes or hash of shard-000000.tar are none")
        (shards / "index.json").write_text(whole)
    change_shard(shards, name="shard-000001.tar")
    refuse(shards, "names a shard twice")
    for listed in ({}, None, [3]):
        change_index(shards, shards=listed)
        refuse(shards, "names the shard")
    (shards / "index.json").write_text(json.dumps([whole]))
    refuse(shards, "schema version None")


@pytest.mark.parametrize("kind", ["link", "link out", "pipe", "folder"])
def test_shards_are_regular_files(shards: Path, kind: str) -> None:
    tar = shards / "shard-000001.tar"
    shard_set = open_shard_set(shards)
    outside = shutil.move(tar, shards.parent / "outside.tar")
    if kind == "link":
        shutil.move(outside, shards / "other.tar")
        tar.symlink_to("other.tar")
    elif kind == "link out":
        tar.symlink_to(outside)
    elif kind == "pipe":
        os.mkfifo(tar)
    else:
        tar.mkdir()
    refuse(shards, "shard-000001.tar: is no regular file")
    assert "is no regular file" in str(verify_shard_set(shards))
    with pytest.raises(UserError, match=r"shard-000001.tar: is no regular file"):  # also where it became one later
        shard_set.read_image(5)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"offset": put(1, -512)}, "row 1 has its image at bytes -512"),
        ({"offset": put(1, 0)}, "row 1 has its image at bytes 0"),
        ({"offset": put(1, 1025)}, "row 1 has its image at bytes 1025"),
        ({"offset": put(1, 1 << 40)}, "where none can lie"),
        ({"offset": put(1, (1 << 63) - 512)}, "where none can lie"),
        ({"length": put(1, -1)}, r"row 1 has its image at bytes \d+ \+ -1"),
        ({"length": put(1, 1 << 62)}, "where none can lie"),
        ({"length": put(1, (1 << 63) - 1)}, "where none can lie"),
        ({"length": put(1, MAX_MEMBER_BYTES + 1)}, "where none can lie"),
        ({"mask_offset": put(2, -7), "mask_length": put(2, 9)}, "row 2 has its mask at bytes -7"),
        ({"caption_offset": put(2, 512), "caption_length": put(2, 1 << 40)}, "row 2 has its caption"),
        ({"shard": put(1, "../../etc/passwd")}, r"names the shard '../../etc/passwd', which index.json does not"),
        ({"shard": put(1, "shard-000009.tar")}, r"names the shard 'shard-000009.tar', which"),
        ({"shard": put(1, None)}, "a sample without shard"),
        ({"offset": put(1, None)}, "row 1 has its image at bytes -1|a sample without offset"),
        ({"offset": lambda values: [values[0], values[0] + 512, *values[2:]]}, "rows 0 and 1 lie across each other"),
        ({"length": lambda values: [3 * values[0], *values[1:]]}, "rows 0 and 1 lie across each other"),
    ],
)
def test_rows_name_what_can_be(shards: Path, columns: dict[str, Any], message: str) -> None:
    change_rows(shards, **columns)
    refuse(shards, message)


def test_two_rows_may_show_one_image(shards: Path) -> None:
    change_rows(shards, **{name: lambda values: [values[0], *values[:1], *values[2:]] for name in ("offset", "length")})
    assert open_shard_set(shards).read_image(1) == open_shard_set(shards).read_image(0)


def test_a_table_of_more_rows_than_can_be_is_not_read(shards: Path) -> None:
    path = shards / "samples.parquet"
    many = pq.read_table(path).slice(0, 1).take(pa.array([0] * 60_000))  # some kB of file, 30 MB of table
    pq.write_table(many, path, compression="zstd")
    assert path.stat().st_size < 50_000
    change_index(shards, samples_sha256=compute_file_sha256(path))
    refuse(shards, "claims 60000 rows, index.json 6")
    change_index(shards, num_samples=60_000)
    refuse(shards, "claims 60000 rows, index.json 60000")
    pq.write_table(pa.table({"key": ["a"] * 6, "offset": ["much"] * 6}), path)
    change_index(shards, samples_sha256=compute_file_sha256(path), num_samples=6)
    refuse(shards, "samples.parquet: no table of samples")
    path.write_bytes(b"PAR1 and then nothing PAR1")
    change_index(shards, samples_sha256=compute_file_sha256(path))
    refuse(shards, "samples.parquet: no table of samples")


# ------------------------------------------------------------------------------------------------ what a tar holds


class Bomb:
    """A pickle that leaves a file behind wherever it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/panfm-was-unpickled",)


def make_member(kind: str, key: str) -> tuple[tarfile.TarInfo, bytes]:
    info, data = tarfile.TarInfo(f"{key}.jpg"), b"\xff\xd8 some bytes"
    if kind in ("pickle", "pyd", "npy", "pt"):
        info.name, data = f"{key}.{kind}", pickle.dumps(Bomb())
    elif kind == "absolute":
        info.name = "/etc/cron.d/x.jpg"
    elif kind == "climbing":
        info.name = "../../x.jpg"
    elif kind == "hidden name":
        info.name = f"{key}.jpg.pickle"
    elif kind in ("symbolic link", "hard link"):
        info.type, info.linkname = (tarfile.SYMTYPE if "sym" in kind else tarfile.LNKTYPE), "/etc/passwd"
    elif kind in ("device", "pipe", "folder"):
        info.type = {"device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE, "folder": tarfile.DIRTYPE}[kind]
    elif kind == "sparse":
        info.type = tarfile.GNUTYPE_SPARSE
    elif kind == "prefix":
        info.name = f"{'a' * 90}/{key}.jpg"  # ustar keeps the folder apart, in the prefix
    elif kind == "renamed":
        info.pax_headers = {"path": "/etc/cron.d/x"}
    info.size = 0 if kind in ("symbolic link", "hard link", "device", "pipe", "folder") else len(data)
    return info, data


KINDS = ("pickle", "pyd", "npy", "pt", "absolute", "climbing", "hidden name", "symbolic link", "hard link", "device")
KINDS += ("pipe", "folder", "sparse", "prefix", "renamed")


def add_member(shards: Path, info: tarfile.TarInfo, data: bytes, *, named: bool) -> int:
    """Append a member to the last shard, or put it, named by the row, in place of the last image: where it lies."""
    tar = shards / "shard-000001.tar"
    with tarfile.open(tar) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    form = tarfile.PAX_FORMAT if info.pax_headers else tarfile.USTAR_FORMAT
    with tarfile.open(tar, "w", format=form) as archive:
        for member, content in [*(members[:-1] if named else members), (info, data)]:
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(tar) as archive:
        place = archive.getmembers()[-1].offset_data
    entries = read_json(shards / "index.json")["shards"]
    entries[1] |= {"num_bytes": tar.stat().st_size, "sha256": compute_file_sha256(tar)}
    change_index(shards, shards=entries)
    if named:
        change_rows(shards, offset=put(5, place), length=put(5, info.size))
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_members_that_run_or_escape_are_refused(shards: Path, server: RangeServer, kind: str) -> None:
    key = pq.read_table(shards / "samples.parquet")["key"][5].as_py()
    info, data = make_member(kind, key)
    add_member(shards, info, data, named=True)
    assert (shown := verify_shard_set(shards).faults)
    assert any("is none that a sample has" in fault or "is no plain file" in fault for fault in shown), shown
    if kind == "renamed":  # by offset it is a plain member of its own name, and no more than that is read of it
        assert open_shard_set(shards).read_image(5) == data
    else:
        with pytest.raises(UserError, match=r"shard-000001.tar, byte \d+: member .* (is none that|is no plain file)"):
            open_shard_set(shards).read_image(5)
    with pytest.raises(UserError, match=r"shard-000001.tar: member .* (is none that|is no plain file)"):
        open_shard_set(f"{server.url}/alpha").read_image(5)
    assert not Path("/tmp/panfm-was-unpickled").exists()
    assert not list((shards.parent / "cache").rglob("pieces/*"))  # nothing of it came onto the disk


@pytest.mark.parametrize("kind", ["pickle", "symbolic link", "renamed"])
def test_members_that_no_row_names_are_not_read_here_and_not_fetched(
    shards: Path, server: RangeServer, kind: str
) -> None:
    add_member(shards, *make_member(kind, "stray"), named=False)
    assert open_shard_set(shards).read_image(5)  # by offset, and only that
    assert verify_shard_set(shards).faults
    with pytest.raises(UserError, match=r"shard-000001.tar: member .*"):
        open_shard_set(f"{server.url}/alpha").read_image(5)


def test_the_loader_stops_at_such_a_member(shards: Path) -> None:
    add_member(shards, *make_member("pickle", "stray"), named=True)
    data = DataConfig(shards=(str(shards),), workers=0)
    loader = build_loader(
        data,
        MixtureConfig(),
        AugmentConfig(image_size=16, views=1),
        mask=None,
        mask_grid=(4, 4),
        seed=0,
        global_batch_size=6,
        micro_batch_size=6,
        excluded={},
    )
    with loader, pytest.raises(UserError, match=r"member 'stray.pickle' is none that a sample has"):
        loader.draw(range(6))


def test_rows_that_point_into_other_bytes_are_noticed(shards: Path) -> None:
    """At the .json of a sample, into the pixels of one, at a shorter stretch of one: never anything but the image."""
    table = pq.read_table(shards / "samples.parquet")
    offset, length = table["offset"][3].as_py(), table["length"][3].as_py()
    with tarfile.open(shards / "shard-000001.tar") as archive:
        info = archive.getmembers()[0]
    assert info.name.endswith(".json")
    for place, size, message in (
        (info.offset_data, info.size, r"member '\w+.json' of \d+ bytes is not the one"),
        (offset + BLOCK, length - BLOCK, "no header of a tar member where one must be"),
        (offset, length - 1, rf"member '\w+.jpg' of {length} bytes is not the one of {length - 1}"),
    ):
        change_rows(shards, offset=put(3, place), length=put(3, size))
        with pytest.raises(UserError, match=message):
            open_shard_set(shards).read_image(3)
        change_rows(shards, offset=put(3, offset), length=put(3, length))


def test_headers_are_read_strictly() -> None:
    info = tarfile.TarInfo("key.jpg")
    info.size = 5
    block = info.tobuf(tarfile.USTAR_FORMAT)
    assert parse_header(block) == ("key.jpg", 5)
    for place in (0, 100, 124, 130, 156, 157, 257, 345, 500):  # any changed byte breaks the sum
        with pytest.raises(MemberError):
            parse_header(block[:place] + bytes([block[place] ^ 1]) + block[place + 1 :])
    for broken in (b"", block[:-1], bytes(BLOCK), block * 2):
        with pytest.raises(MemberError, match="no header"):
            parse_header(broken)
    info.size = 9 << 33  # beyond eleven octal digits, GNU writes binary
    with pytest.raises(MemberError, match="no readable size"):
        parse_header(info.tobuf(tarfile.GNU_FORMAT))


def test_a_stretch_of_a_tar_accounts_for_every_byte() -> None:
    def add(name: str, data: bytes) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)

    data = add("a.json", b"{}") + add("a.jpg", b"x" * 700) + add("b.json", b"{}") + add("b.png", b"y")
    places, end = [1536, 4096], bytes(2 * BLOCK)
    assert [(name, bytes(content[:1])) for name, content in check_members(data, 0, places, [700, 1], is_end=False)] == [
        ("a.jpg", b"x"),
        ("b.png", b"y"),
    ]
    assert len(check_members(data + end, 10240, [11776, 14336], [700, 1], is_end=True)) == 2
    for content, offsets, lengths, is_end, message in (
        (data, places[:1], [700], False, "'b.png' has no row"),
        (data, places, [700, 2], False, "'b.png' of 1 bytes is not what"),
        (data, [1536, 4608], [700, 1], False, "'b.png' has no row|no member begins at byte 4608"),
        (data[:-BLOCK], places, [700, 1], False, "more than its index leaves room for"),
        (data + end, places, [700, 1], False, "no header"),
        (data + bytes(BLOCK) + b"hidden".ljust(BLOCK, b"\0"), places, [700, 1], True, "something is hidden"),
        (data[:1024], [], [], False, ""),
    ):
        if not message:
            assert check_members(content, 0, offsets, lengths, is_end=is_end) == []
            continue
        with pytest.raises(MemberError, match=message):
            check_members(content, 0, offsets, lengths, is_end=is_end)


def test_a_hash_that_is_none_is_refused(shards: Path, server: RangeServer) -> None:
    for wrong in ("", "0" * 63, "x" * 64, "0" * 64 + "\n"):
        change_rows(shards, sha256=put(1, wrong))
        refuse(f"{server.url}/alpha", "samples.parquet: a sha256 is none")


def test_an_image_that_is_not_the_indexs_never_comes_into_the_cache(shards: Path, server: RangeServer) -> None:
    """The tar is a sound one, and index.json agrees with it; only the image is another one."""
    table = pq.read_table(shards / "samples.parquet")
    place, tar = table["offset"][4].as_py(), shards / "shard-000001.tar"
    data = bytearray(tar.read_bytes())
    data[place + 100] ^= 1
    tar.write_bytes(data)
    entries = read_json(shards / "index.json")["shards"]
    entries[1]["sha256"] = compute_file_sha256(tar)
    change_index(shards, shards=entries)
    shard_set: ShardSet = open_shard_set(f"{server.url}/alpha")
    with pytest.raises(UserError, match=r"shard-000001.tar: member '\w+.jpg' is not the image that the index names"):
        shard_set.read_image(3)
