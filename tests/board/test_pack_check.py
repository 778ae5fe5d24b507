"""Packs that come in: tampered, foreign, doubled or hostile ones are refused, each for its own reason."""

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from panfm.board.packs.check import verify_packs
from panfm.board.packs.format import (
    FIXED_TIME,
    MANIFEST,
    encode_json,
    read_pack,
    write_archive,
)
from panfm.board.packs.reader import Reader
from panfm.errors import UserError
from panfm.evaluation.results import (
    read_result,
    read_results,
)
from panfm.files import compute_sha256, read_json, write_json
from tests.board.committed import TASK, read_test_rows, write_committed
from tests.board.packing import change_results, find_refusal, pack, rewrite


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("submitter") / "results"
    write_committed(root, "ours", 2.0)
    return root


@pytest.fixture(scope="module")
def packed(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(results, tmp_path_factory.mktemp("packs") / "ours.zip", contact="board@example.org").path


# What comes in


def test_a_whole_pack_is_recomputed_and_its_images_checked(packed: Path) -> None:
    (report,) = verify_packs([packed])
    assert not report.refusals and report.accepted is None and report.contact == "board@example.org"
    (finding,) = report.findings
    assert (finding.origin, finding.num_metrics) == ("recomputed", 4)
    assert finding.images == f"all 44 images as in the committed split {TASK}"


def test_a_tampered_prediction_file_is_refused(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    place = data.index(b"PAR1") + 40
    data[place] ^= 1
    (tmp_path / "raw.zip").write_bytes(data)
    assert "Bad CRC" in find_refusal(tmp_path / "raw.zip")

    def flip(contents: dict[str, bytes]) -> None:
        name = next(name for name in contents if name.endswith(".parquet"))
        contents[name] = contents[name].replace(b"panfm_predictions", b"panfm_predictionz")

    assert "predictions_sha256 is" in find_refusal(rewrite(packed, tmp_path / "careful.zip", flip))


def test_a_tampered_metric_is_refused(packed: Path, tmp_path: Path) -> None:
    def raise_it(contents: dict[str, bytes]) -> None:
        for name in [name for name in contents if name.endswith(".json")]:
            values = json.loads(contents[name])
            values["metrics"][values["primary_metric"]]["value"] += 0.001
            contents[name] = encode_json(values)

    assert re.search(r"\w+ is 0\.\d+, but 0\.\d+ follows", find_refusal(rewrite(packed, tmp_path / "p.zip", raise_it)))


def test_a_narrowed_interval_is_refused(packed: Path, tmp_path: Path) -> None:
    def narrow(contents: dict[str, bytes]) -> None:
        for name in [name for name in contents if name.endswith(".json")]:
            values = json.loads(contents[name])
            stated = values["metrics"]["balanced_accuracy"]
            stated["low"] = stated["value"] - 0.001
            contents[name] = encode_json(values)

    refusal = find_refusal(rewrite(packed, tmp_path / "p.zip", narrow))
    assert "the interval of balanced_accuracy is" in refusal


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"split_hash": "0" * 64}, "split_hash 000000000000 is not that of the committed split"),
        ({"task_version": 9}, "task_version is 9, the task's card says 1"),
        ({"evaluated_on": "development"}, "its predictions are"),
        ({"classes": ["a", "b"]}, "classes is"),
        ({"num_test": 43}, "44 units of 44 groups, the result says 43"),
        ({"label_fraction": 2.0}, "its predictions are"),
        ({"protocol": "../../etc"}, "is no name of letters"),
        ({"unit": "line\nbreak"}, "control characters"),
        ({"draw": 3}, "its predictions are"),
        ({"task": "pad_ufes20_malignancy"}, "belongs to no result of the pack"),
        ({"result_version": 1}, "result_version"),
        ({"predictions": "../other.parquet"}, "its predictions are"),
        ({"settings": {"grid": "x"}}, "settings.grid"),
        ({"settings": {"chosen": {"thresholds": [{"a": 1}]}}}, "settings.chosen"),
        ({"synthetic": True}, "synthetic is True"),
        ({"wall_seconds": None}, "wall_seconds"),
    ],
)
def test_a_result_that_says_something_else_is_refused(
    packed: Path, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    assert reason in find_refusal(rewrite(packed, tmp_path / "p.zip", change_results(**fields)))


@pytest.mark.parametrize(
    ("change", "take", "reason"),
    [
        ({"key": [f"k{number:016x}" for number in range(44)]}, slice(None), "is not in the committed split"),
        ({"group": ["g"] * 44}, slice(None), "has group g, in the split"),
        ({"label": [0] * 22 + [1] * 22}, slice(None), "has class"),
        ({}, slice(3, None), "3 test images are missing"),
        ({"fold": ["val"] * 44}, slice(None), "fold 'val'"),
        ({"draw": [1] * 44}, slice(None), "draw 1, the result is of draw 0"),
        ({"scores": [[0.7, 0.7]] * 44}, slice(None), "whose sums differ from 1"),
        ({"scores": [[float("nan"), 0.5]] * 44}, slice(None), "not finite"),
        ({"scores": [[0.2, 0.3, 0.5]] * 44}, slice(None), "3 scores a row"),
        ({"scores": [[0.5]] * 22 + [[0.5, 0.5]] * 22}, slice(None), "1 or 2 scores a row"),
        ({"label": [7] * 44}, slice(None), "class 7 of 2 classes"),
    ],
)
def test_predictions_that_are_not_the_tasks_are_refused(
    packed: Path, tmp_path: Path, change: dict[str, list[object]], take: slice, reason: str
) -> None:
    assert reason in find_refusal(forge(packed, tmp_path, change=change, take=take))


@pytest.mark.parametrize("column", ["sex", "subgroup:name", "subgroup:"])
def test_a_column_that_predictions_do_not_have_is_refused(packed: Path, tmp_path: Path, column: str) -> None:
    def add(contents: dict[str, bytes]) -> None:
        name = next(name for name in contents if name.endswith(".json"))
        table = pq.read_table(io.BytesIO(contents[name.replace(".json", ".parquet")]))
        file = io.BytesIO()
        pq.write_table(table.append_column(column, pa.array(["female"] * len(table))), file)
        contents[name.replace(".json", ".parquet")] = file.getvalue()
        change_results(predictions_sha256=compute_sha256(file.getvalue()))(contents)

    assert f"column '{column}'" in find_refusal(rewrite(packed, tmp_path / "p.zip", add))


def test_a_unit_that_is_there_twice_is_refused(packed: Path, tmp_path: Path) -> None:
    keys = read_test_rows(TASK)["key"]
    refusal = find_refusal(forge(packed, tmp_path, change={"key": [*keys[:-1], keys[0]]}))
    assert "1 units are there twice in a repeat" in refusal


def forge(packed: Path, tmp_path: Path, **options: object) -> Path:
    """A pack whose Result fits predictions that `submit` would not have taken."""
    try:
        path = write_committed(tmp_path / "forged", "ours", 2.0, **options)
    except ValueError:  # nothing can be computed of these: honest numbers beside them
        honest = write_committed(tmp_path / "honest", "ours", 2.0)
        path = write_committed(tmp_path / "forged", "ours", 2.0, **options, metrics=read_result(honest).metrics)
    values = read_json(path)
    values["encoder"]["address"] = "panfm:ours"

    def replace(contents: dict[str, bytes]) -> None:
        name = next(name for name in contents if name.endswith(".json"))
        contents[name] = encode_json(values)
        contents[name.replace(".json", ".parquet")] = path.with_suffix(".parquet").read_bytes()

    return rewrite(packed, tmp_path / "forged.zip", replace)


def test_a_file_that_ends_its_reader_is_refused_and_the_next_one_read(results: Path, tmp_path: Path) -> None:
    (good,) = results.rglob("*.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + b"\0" * 64 + b"PAR1")
    with Reader() as reader:
        reader.try_file(good)
        reader._process.kill()
        with pytest.raises(UserError, match="reading it ends the reader"):
            reader.try_file(good)
        reader.try_file(good)
        with pytest.raises(UserError, match="no parquet file"):
            reader.try_file(tmp_path / "bad.parquet")


# Archives that no pack is


def write_zip(
    out: Path, members: Mapping[str, bytes], edit: Callable[[zipfile.ZipInfo], None] = lambda _: None
) -> Path:
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, FIXED_TIME)
            info.external_attr = 0o100644 << 16
            edit(info)
            archive.writestr(info, data)
    return out


@pytest.mark.parametrize("name", ["../x", "/etc/x", "results/../../x", ".hidden", "results\\x", "a//b", "C:x"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "p.zip", {name: b"x", MANIFEST: b"{}"})
    assert "a member is named by a relative path" in find_refusal(path, accept=tmp_path / "accepted")
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["p.zip"]


def test_a_link_is_refused(tmp_path: Path) -> None:
    def link(info: zipfile.ZipInfo) -> None:
        info.external_attr = 0o120777 << 16

    assert "a link" in find_refusal(write_zip(tmp_path / "p.zip", {"x": b"/etc/passwd", MANIFEST: b"{}"}, link))


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "p.zip", {"x": b"0" * 64, MANIFEST: b"{}"})
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02")
    data[place + 20 : place + 28] = struct.pack("<II", 3 << 30, 3 << 30)  # both sizes in the directory
    path.write_bytes(data)
    assert "declares 3,221,225,472 bytes" in find_refusal(path)

    def compress(info: zipfile.ZipInfo) -> None:
        info.compress_type = zipfile.ZIP_DEFLATED

    assert "compressed" in find_refusal(write_zip(tmp_path / "d.zip", {"x": b"0" * 10**6, MANIFEST: b"{}"}, compress))


def test_a_member_that_the_manifest_does_not_name_is_refused(packed: Path, tmp_path: Path) -> None:
    old = read_pack(packed)
    write_archive(tmp_path / "p.zip", old.manifest, {**old.contents, "results/a/b.json": b"{}"})
    assert "member 'results/a/b.json' is not named" in find_refusal(tmp_path / "p.zip")

    def add(contents: dict[str, bytes]) -> None:
        contents["results/run.sh"] = b"echo"

    refusal = find_refusal(rewrite(packed, tmp_path / "named.zip", add))
    assert "results/run.sh belongs to no result" in refusal


def test_bytes_between_members_are_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "tail.zip").write_bytes(packed.read_bytes() + b"hidden")
    (tmp_path / "head.zip").write_bytes(b"hidden" + packed.read_bytes())
    for name in ("tail", "head"):
        find_refusal(tmp_path / f"{name}.zip")


def test_half_a_pack_another_version_and_a_foreign_file_are_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "half.zip").write_bytes(packed.read_bytes()[:-400])
    assert "not a whole zip file" in find_refusal(tmp_path / "half.zip")
    (tmp_path / "text.zip").write_text("hello")
    assert "not a whole zip file" in find_refusal(tmp_path / "text.zip")
    assert "no such file" in find_refusal(tmp_path / "absent.zip")
    old = read_pack(packed)
    values = {**old.manifest.model_dump(mode="json"), "pack_version": 2}
    members = {**dict(sorted(old.contents.items())), MANIFEST: encode_json(values)}
    assert "pack_version 2" in find_refusal(write_zip(tmp_path / "newer.zip", members, set_system))
    members = {**dict(sorted(old.contents.items())), MANIFEST: b"[" * 100_000}
    assert "no JSON" in find_refusal(write_zip(tmp_path / "deep.zip", members, set_system))


def set_system(info: zipfile.ZipInfo) -> None:
    info.create_system = 3


def test_a_changed_member_under_the_old_manifest_is_refused(packed: Path, tmp_path: Path) -> None:
    old = read_pack(packed)
    name = next(name for name in old.contents if name.endswith(".json"))
    write_archive(tmp_path / "p.zip", old.manifest, {**old.contents, name: old.contents[name] + b" "})
    assert "SHA-256" in find_refusal(tmp_path / "p.zip")


def test_a_declaration_that_its_results_do_not_make_is_refused(packed: Path, tmp_path: Path) -> None:
    old = read_pack(packed)
    one = old.manifest.encoders[0].model_copy(update={"contamination": {TASK: "none"}})
    write_archive(tmp_path / "p.zip", old.manifest.model_copy(update={"encoders": (one,)}), old.contents)
    assert "declares other encoders, or another contamination" in find_refusal(tmp_path / "p.zip")


def test_excluded_is_believed_only_of_a_task_that_is_named(packed: Path, tmp_path: Path) -> None:
    card = json.loads(next(data for name, data in read_pack(packed).contents.items() if name.endswith(".json")))
    encoder = {**card["encoder"], "contamination": "excluded"}
    refusal = find_refusal(rewrite(packed, tmp_path / "p.zip", change_results(encoder=encoder)))
    assert f"excluded_tasks does not name {TASK}" in refusal


# Submitted twice, and by another name


def test_the_same_submission_twice_is_refused(packed: Path, tmp_path: Path) -> None:
    accepted = tmp_path / "accepted"
    first, again = verify_packs([packed, packed], accept=accepted)
    assert first.accepted is not None and "the same pack as" in again.refusals[0]
    assert "the same result as" in find_refusal(packed, against=[accepted])

    def rename_nothing(contents: dict[str, bytes]) -> None:
        change_results(wall_seconds=2.0)(contents)

    other = rewrite(packed, tmp_path / "other.zip", rename_nothing)
    assert "the same result as" in find_refusal(other, accept=accepted)
    assert len(list(accepted.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "sha", "reason"),
    [
        ("ours", "other", "encoder ours has hash other, but hash-of-ours"),
        ("theirs", "hash-of-ours", "is called theirs, but ours"),
        ("theirs", "other", "the same scores as"),
    ],
)
def test_one_encoder_under_two_names_is_refused(
    results: Path, packed: Path, tmp_path: Path, name: str, sha: str, reason: str
) -> None:
    ((path, result),) = read_results([results])
    card = result.encoder.model_copy(update={"name": name, "hash": sha})
    target = tmp_path / "r" / TASK / name / path.name
    write_json(target, result.model_copy(update={"encoder": card, "draw": 0}).model_dump(mode="json"))
    target.with_suffix(".parquet").write_bytes((path.parent / result.predictions).read_bytes())
    copied = pack(tmp_path / "r", tmp_path / "copied.zip").path
    first, second = verify_packs([packed, copied])
    assert not first.refusals and reason in second.refusals[0]
