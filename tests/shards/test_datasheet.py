"""The datasheet answers what can be answered and marks the rest; mlcroissant accepts and reads the Croissant file."""

import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from panfm.cli.main import app
from panfm.errors import UserError
from panfm.files import compute_file_sha256
from panfm.shards.datasheet import OPEN, make_croissant, write_croissant, write_datasheet
from panfm.shards.index import ShardSet, open_shard_set
from panfm.shards.schema import SAMPLES_SCHEMA
from panfm.shards.writer import BuildOptions, build_shards


@pytest.fixture
def build(make_archive: Callable[..., Any], tmp_path: Path) -> Callable[..., ShardSet]:
    def make(**changes: Any) -> ShardSet:
        archive = make_archive()
        archive.values |= changes
        key = {} if archive.card.identifiers == "public" else {"key_file": str(tmp_path / "a.key"), "create_key": True}
        options = BuildOptions(samples_per_shard=5, max_rejected_share=0, **key)
        return open_shard_set(build_shards(archive.card, archive.root, tmp_path / "shards", options=options).path)

    return make


def test_the_datasheet_has_every_section_and_marks_what_is_open(build: Callable[..., ShardSet], tmp_path: Path) -> None:
    cohort = {"design": "prospective", "kind": "clinical", "period": "2018-2020", "places": "one ward"}
    shard_set = build(cohort=cohort, retention="ten years", synthetic=False)
    text = write_datasheet(shard_set, tmp_path / "datasheet.md").read_text()
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == [
        "Motivation", "Composition", "Collection", "Preprocessing and labelling", "Uses", "Distribution", "Maintenance",
    ]  # fmt: skip
    assert "12 images of 4 groups" in text and "4 with lesion masks" in text
    assert "prospective design, clinical, 2018-2020, one ward." in text
    assert "**Who keeps it, and how long?** ten years" in text
    assert "| label diagnosis | nevus 4, melanoma 4, unknown 4 |" in text
    assert "Not permitted: education, commercial." in text
    open_questions = re.findall(r"\*\*([^*]+)\*\* " + re.escape(OPEN), text)
    assert "On which legal basis?" in open_questions and "Who keeps it, and how long?" not in open_questions
    assert {"Under which licence?", "Who can get it, and how?"}.isdisjoint(open_questions)
    assert shard_set.compute_data_hash() in text and "None" not in text.replace("None of", "")
    with pytest.raises(UserError, match=r"ends in .md"):
        write_datasheet(shard_set, tmp_path / "datasheet.txt")


def test_the_todo_of_a_draft_is_no_answer(build: Callable[..., ShardSet], tmp_path: Path) -> None:
    todo = dict.fromkeys(("origin", "licence", "legal_basis", "how_to_obtain", "retention"), "TODO: ask")
    text = write_datasheet(build(synthetic=False, **todo), tmp_path / "datasheet.md").read_text()
    assert "TODO" not in text and f"**Under which licence?** {OPEN}" in text and f"**Who made it?** {OPEN}" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of rdflib and pandas, below mlcroissant
def test_mlcroissant_accepts_the_metadata_and_reads_the_rows_without_a_network(
    build: Callable[..., ShardSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlcroissant = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed")

    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    shard_set = build(note="Mind the gap.", citation="A. Uthor. A set (2020).", synthetic=False)
    path = write_croissant(shard_set, shard_set.path / "croissant.json")
    dataset = mlcroissant.Dataset(jsonld=path)
    assert list(dataset.metadata.ctx.issues.errors) == []
    assert {warning for warning in dataset.metadata.ctx.issues.warnings if "datePublished" not in warning} == set()
    rows = list(dataset.records(record_set="samples"))
    assert [row["samples/key"].decode() for row in rows] == shard_set.table["key"].to_pylist()
    assert [row["samples/width"] for row in rows] == shard_set.table["width"].to_pylist()


def test_the_metadata_name_every_file_and_column(build: Callable[..., ShardSet]) -> None:
    shard_set = build(licence="CC BY-NC 4.0")
    plain = make_croissant(shard_set)
    hashes = {entry["contentUrl"]: entry["sha256"] for entry in plain["distribution"]}
    files = [*shard_set.path.glob("*.tar"), shard_set.path / "samples.parquet"]
    assert hashes == {path.name: compute_file_sha256(path) for path in files} and len(files) == 4
    fields = {field["name"]: field["dataType"] for field in plain["recordSet"][0]["field"]}
    assert list(fields) == [name for name in SAMPLES_SCHEMA.names if name != "labels"]  # a map
    assert (fields["age"], fields["event"], fields["width"], fields["key"]) == (
        "sc:Float", "sc:Boolean", "sc:Integer", "sc:Text",
    )  # fmt: skip
    assert plain["license"] == "https://creativecommons.org/licenses/by-nc/4.0/"
    assert make_croissant(shard_set) == plain


def test_a_private_set_names_no_path_and_no_id(build: Callable[..., ShardSet], tmp_path: Path) -> None:
    shard_set = build(identifiers="private", access="private", synthetic=False)
    text = json.dumps(make_croissant(shard_set)) + write_datasheet(shard_set, tmp_path / "sheet.md").read_text()
    for name in ("key", "patient_id", "lesion_id", "group_id"):
        assert not any(value in text for value in shard_set.table[name].drop_null().to_pylist())
    assert str(tmp_path) not in text and "photo1" not in text and "table.csv" not in text
    assert "under a secret key" in text
    with pytest.raises(UserError, match=r"ends in .json"):
        write_croissant(shard_set, tmp_path / "croissant.yaml")


def test_the_command_line_writes_both_for_one_set_only(build: Callable[..., ShardSet], tmp_path: Path) -> None:
    shards = str(build().path)
    options = ["--datasheet", str(tmp_path / "d.md"), "--croissant", str(tmp_path / "c.json")]
    run = CliRunner().invoke(app, ["shards", "inspect", shards, *options])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "d.md").is_file() and json.loads((tmp_path / "c.json").read_text())["name"] == "small"
    run = CliRunner().invoke(app, ["shards", "inspect", shards, shards, *options])
    assert isinstance(run.exception, UserError) and "2 are given" in str(run.exception)
    run = CliRunner().invoke(app, ["shards", "inspect", shards, shards])
    assert run.exit_code == 0 and run.output.splitlines()[-1].startswith("all")
