from pathlib import Path

import pytest

from panfm.errors import UserError
from panfm.files import (
    compute_file_sha256,
    compute_json_hash,
    find_resource,
    list_resources,
    open_atomic,
    read_json,
    write_json,
    write_text,
)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), open_atomic(path) as file:
        file.write(b"half of the new")
        raise RuntimeError("killed")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_written_file_can_be_read_by_colleagues(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_json_refuses_nan_and_round_trips(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": None})
    assert read_json(tmp_path / "a.json") == {"a": None, "b": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "b.json", {"metric": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_damaged_and_missing_json_are_user_errors_naming_the_file(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"torn\.json: not valid JSON"):
        read_json(tmp_path / "torn.json")
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")


def test_hashes_do_not_depend_on_key_order_and_do_on_content(tmp_path: Path) -> None:
    assert compute_json_hash({"a": 1, "b": 2}) == compute_json_hash({"b": 2, "a": 1})
    assert compute_json_hash({"a": 1}) != compute_json_hash({"a": 2})
    (tmp_path / "x").write_bytes(b"abc")
    assert compute_file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_resolver_prefers_the_users_file_and_knows_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as a user in an empty folder
    assert find_resource("configs/pretrain", "debug_cpu").name == "debug_cpu.yaml"
    assert find_resource("configs/pretrain", "configs/pretrain/debug_cpu.yaml").is_file()
    (tmp_path / "debug_cpu.yaml").write_text("mine: 1")
    assert find_resource("configs/pretrain", "debug_cpu.yaml") == Path("debug_cpu.yaml")
    with pytest.raises(UserError, match=r"debug_gpu: no such file.*nearest: debug_cpu"):
        find_resource("configs/pretrain", "debug_gpu")
    assert "debug_cpu" in list_resources("configs/pretrain")
