"""Verification: a sound set has no fault, and every kind of damage is one line that names it."""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from panfm.errors import UserError
from panfm.files import compute_file_sha256
from panfm.shards.schema import SAMPLES_SCHEMA
from panfm.shards.verify import FAULTS_SHOWN, verify_shard_set
from panfm.shards.writer import BuildOptions, build_shards
from tests.shards.conftest import draw_picture


@pytest.fixture
def shards(make_archive: Callable[..., Any], tmp_path: Path) -> Path:
    archive = make_archive()
    (archive.root / "images" / "photo11.jpg").write_bytes(b"no image")  # one line in quarantine.csv
    options = BuildOptions(samples_per_shard=4, short_side=40, max_rejected_share=0.5)
    return build_shards(archive.card, archive.root, tmp_path / "shards", options=options).path


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], trailer: bytes = b"") -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    if trailer:
        path.write_bytes(path.read_bytes() + trailer)


def read_tar(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as archive:
        return [(info, archive.extractfile(info).read()) for info in archive]  # type: ignore[union-attr]


def change_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | changes))


def accept_tar(shards: Path, tar: Path) -> None:
    """Make index.json agree with a changed tar, so that only what lies inside can give it away."""
    index = json.loads((shards / "index.json").read_text())
    for entry in index["shards"]:
        if entry["name"] == tar.name:
            entry |= {"num_bytes": tar.stat().st_size, "sha256": compute_file_sha256(tar)}
    change_index(shards, shards=index["shards"])


def get_faults(shards: Path, **options: Any) -> str:
    return "\n".join(verify_shard_set(shards, **options).faults)


def test_a_sound_set_has_no_fault(shards: Path) -> None:
    checked = verify_shard_set(shards, deep=True)
    assert checked.faults == ()
    assert str(checked) == f"{shards}: 11 samples in 3 shards: all as the index says"


@pytest.mark.slow
def test_processes_find_the_same(shards: Path) -> None:
    tar = sorted(shards.glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:-4096])
    assert verify_shard_set(shards, processes=2) == verify_shard_set(shards)


def test_missing_foreign_and_changed_files(shards: Path) -> None:
    first, second, third = sorted(shards.glob("*.tar"))
    shutil.copy(first, shards / "shard-000009.tar")
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    data = bytearray(third.read_bytes())
    data[1024] ^= 1
    third.write_bytes(data)
    faults = get_faults(shards)
    assert f"{first}: is missing" in faults
    assert f"{second}: has" in faults and f"{third}: is not the file that index.json names" in faults
    assert "shard-000009.tar: lies in the folder, but index.json does not name it" in faults
    with pytest.raises(UserError, match="no such folder"):
        verify_shard_set(shards / "gone")


def test_every_byte_of_a_tar_counts(shards: Path) -> None:
    """Wherever one bit flips, verification says so, even if the hash of the whole file is made to agree."""
    tar = sorted(shards.glob("*.tar"))[0]
    whole, index = tar.read_bytes(), (shards / "index.json").read_bytes()
    with tarfile.open(tar) as archive:
        members = [(info.offset_data, info.size) for info in archive]
    places = [place for offset, size in members for place in (offset + size // 2,)] + [len(whole) - 1]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 4
        tar.write_bytes(data)
        assert "SHA-256 differs" in get_faults(shards), place
        accept_tar(shards, tar)
        assert get_faults(shards), place
        (shards / "index.json").write_bytes(index)


def test_nothing_else_may_be_in_a_tar(shards: Path) -> None:
    tar = sorted(shards.glob("*.tar"))[0]
    members = read_tar(tar)
    key = members[0][0].name.partition(".")[0]

    def attempt(info: tarfile.TarInfo, data: bytes = b"", trailer: bytes = b"") -> str:
        info.size = len(data)
        write_tar(tar, [*members, (info, data)], trailer)
        accept_tar(shards, tar)
        return get_faults(shards)

    assert "'/etc/x.jpg' is none that a sample has" in attempt(tarfile.TarInfo("/etc/x.jpg"), b"x")
    assert "'../x.jpg' is none" in attempt(tarfile.TarInfo("../x.jpg"), b"x")
    assert ".pickle' is none that a sample has" in attempt(tarfile.TarInfo(f"{key}.pickle"), b"x")
    link = tarfile.TarInfo(f"{key}.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    assert "is no plain file" in attempt(link)
    assert "stands twice" in attempt(tarfile.TarInfo(f"{key}.json"), b"{}")
    assert "stray: has no row in samples.parquet" in attempt(tarfile.TarInfo("stray.json"), b"{}")
    assert "caption_offset, caption_length in samples.parquet" in attempt(tarfile.TarInfo(f"{key}.txt"), b"a text")
    write_tar(tar, members, trailer=b"hidden behind the end".ljust(512, b"\0"))
    accept_tar(shards, tar)
    assert "holds bytes behind its last readable member" in get_faults(shards)


def test_members_and_rows_must_agree(shards: Path) -> None:
    tar = sorted(shards.glob("*.tar"))[0]
    members = read_tar(tar)
    place = next(place for place, (info, _) in enumerate(members) if info.name.endswith(".json"))
    info, data = members[place]
    key = info.name.removesuffix(".json")

    def attempt(**changes: Any) -> str:
        values = json.dumps(json.loads(data) | changes).encode()
        info.size = len(values)
        write_tar(tar, [*members[:place], (info, values), *members[place + 1 :]])
        accept_tar(shards, tar)
        return get_faults(shards)

    assert re.search(f"{key}: age.* in samples.parquet: not as in the tar", attempt(age=77.0))
    assert f"{key}: labels" in attempt(labels={"diagnosis": "melanoma", "x": "y"})
    assert f"{key}.json: name_of_patient: Extra inputs" in attempt(name_of_patient="Jane")
    assert f"{key}.json: names the key other" in attempt(key="other")
    assert f"{key}.jpg: is not the image that its JSON names" in attempt(sha256="0" * 64)
    rest = [member for member in members if not member[0].name.startswith(key)]
    write_tar(tar, rest)
    accept_tar(shards, tar)
    assert f"{key}: is in samples.parquet and not in the tar" in get_faults(shards)


def test_pictures_and_masks_are_looked_at(shards: Path) -> None:
    """A tar whose hashes all agree, but whose mask has another size, or whose image is another picture."""
    table = pq.read_table(shards / "samples.parquet")
    row = next(row for row in table.to_pylist() if row["mask_offset"] is not None)
    tar = shards / row["shard"]
    data = bytearray(tar.read_bytes())
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    mask = buffer.getvalue()
    assert len(mask) <= row["mask_length"]
    data[row["mask_offset"] : row["mask_offset"] + row["mask_length"]] = mask.ljust(row["mask_length"], b"\0")
    tar.write_bytes(data)
    accept_tar(shards, tar)
    assert f"{row['key']}.mask.png: is 8 x 8" in get_faults(shards)

    buffer = io.BytesIO()
    draw_picture(99, (row["width"], row["height"])).save(buffer, "JPEG", quality=20)
    image = buffer.getvalue().ljust(row["length"], b"\0")
    assert len(image) == row["length"]
    data[row["offset"] : row["offset"] + row["length"]] = image
    tar.write_bytes(data)
    accept_tar(shards, tar)
    assert "its perceptual hash differs" not in get_faults(shards)
    assert "its perceptual hash differs" in get_faults(shards, deep=True)


def test_counts_are_compared(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    assert index["num_rejected"] == {"undecodable": 1}
    change_index(shards, num_samples=12, num_labels={}, num_rejected={})
    faults = get_faults(shards)
    assert "num_samples is 12, the rows say 11" in faults and "num_labels is {}" in faults
    assert "quarantine.csv: counts {'undecodable': 1}, index.json says {}" in faults
    change_index(shards, **index)
    (shards / "samples.parquet").write_bytes(b"PAR1")
    assert "is not the file that index.json names" in get_faults(shards)


def test_a_shard_with_many_faults_is_summed_up(shards: Path) -> None:
    table = pq.read_table(shards / "samples.parquet")
    shifted = pa.array([offset + 512 for offset in table["offset"].to_pylist()])
    many = pa.concat_tables([table.set_column(table.schema.get_field_index("offset"), "offset", shifted)] * 3)
    keys = [f"{key}{number}" for number, key in enumerate(many["key"].to_pylist())]
    many = many.set_column(0, "key", pa.array(keys)).set_column(
        many.schema.get_field_index("shard"), "shard", pa.array(["shard-000000.tar"] * len(keys))
    )
    with pq.ParquetWriter(shards / "samples.parquet", SAMPLES_SCHEMA) as writer:
        writer.write_table(many.cast(SAMPLES_SCHEMA))
    change_index(shards, samples_sha256=compute_file_sha256(shards / "samples.parquet"))
    of_first = [fault for fault in verify_shard_set(shards).faults if "shard-000000.tar" in fault]
    assert len(of_first) == FAULTS_SHOWN + 1 and of_first[-1].endswith("more faults")


def test_a_foreign_file_is_named(shards: Path) -> None:
    for own in ("datasheet.md", "review/flags.csv"):
        (shards / own).parent.mkdir(exist_ok=True)
        (shards / own).write_text("ours")
    assert get_faults(shards) == ""
    (shards / "names.csv").write_text("Jane Roe")
    assert "names.csv: lies in the folder, but is no part of the set; it may name patients" in get_faults(shards)
