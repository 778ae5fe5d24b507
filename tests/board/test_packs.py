"""Packs: what leaves says so and tells nobody's path; what a board makes of what it let in."""

import csv
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest

from panfm.board.build import build_leaderboard
from panfm.board.packs.aggregate import MIN_SHOWN_GROUPS
from panfm.board.packs.check import verify_packs
from panfm.board.packs.format import (
    MANIFEST,
    Manifest,
    declare_encoders,
    list_members,
    read_pack,
    write_archive,
)
from panfm.board.packs.submit import build_pack, shorten_address, write_pack
from panfm.board.render import render_csv
from panfm.board.standings import compute_standings
from panfm.errors import UserError
from panfm.evaluation.results import (
    AGGREGATE_SUFFIX,
    VERIFICATION,
    EncoderCard,
    Result,
    TrainedOn,
    read_results,
)
from panfm.files import compute_sha256, read_json, write_json
from tests.board.committed import LARGE, TASK, write_committed
from tests.board.fabricated import write_trial
from tests.board.packing import change_results, find_cells, find_refusal, pack, rewrite


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("submitter") / "results"
    write_committed(root, "ours", 2.0)
    return root


@pytest.fixture(scope="module")
def packed(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(results, tmp_path_factory.mktemp("packs") / "ours.zip", contact="board@example.org").path


# What leaves


def test_a_pack_holds_results_predictions_and_a_manifest_that_names_them(results: Path, packed: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        names = archive.namelist()
        manifest = json.loads(archive.read(MANIFEST))
        members = {name: archive.read(name) for name in names[:-1]}
    assert names[-1] == MANIFEST and names[:-1] == sorted(names[:-1]) and len(names) == 3
    assert {one["name"]: (one["size"], one["sha256"]) for one in manifest["members"]} == {
        name: (len(data), compute_sha256(data)) for name, data in members.items()
    }
    assert (manifest["pack_version"], manifest["contact"]) == (1, "board@example.org")
    assert manifest["encoders"][0]["trained_on"] == "unknown"
    assert manifest["encoders"][0]["contamination"] == {TASK: "unknown"}
    ((path, result),) = read_results([results])
    assert members[next(name for name in members if name.endswith(".parquet"))] == (
        (path.parent / result.predictions).read_bytes()
    )


def test_a_pack_tells_no_path_and_no_contact_that_was_not_given(results: Path, tmp_path: Path) -> None:
    path = pack(results, tmp_path / "p.zip").path
    everything = b"".join([*read_pack(path).contents.values(), path.read_bytes()])
    assert b"somebody" not in everything and str(tmp_path).encode() not in everything
    assert read_pack(path).manifest.contact is None
    assert read_pack(path).manifest.encoders[0].card.address == "panfm:ours"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("panfm:/home/anna/exports/a", "panfm:a"),
        ("panfm:exports/a@random:3", "panfm:a@random:3"),
        ("timm:vit_tiny@/data/w.safetensors?image_size=64", "timm:vit_tiny@w.safetensors?image_size=64"),
        ("timm:hf-hub:org/name", "timm:hf-hub:org/name"),
        ("timm:vit@random:0?image_size=64", "timm:vit@random:0?image_size=64"),
        ("hf:~/models/b/", "hf:b"),
    ],
)
def test_an_address_leaves_without_folders(address: str, shown: str) -> None:
    assert shorten_address(address) == shown


def test_a_path_in_any_text_is_refused(results: Path, tmp_path: Path) -> None:
    for path, result in read_results([results]):
        card = result.encoder.model_copy(update={"training_data": "see /home/anna/archive/readme"})
        write_json(tmp_path / "r" / path.name, result.model_copy(update={"encoder": card}).model_dump(mode="json"))
        (tmp_path / "r" / result.predictions).write_bytes((path.parent / result.predictions).read_bytes())
    with pytest.raises(UserError, match=r"training_data: .*looks like a path"):
        build_pack([tmp_path / "r"])


def test_equal_results_give_equal_bytes(results: Path, tmp_path: Path) -> None:
    one, two = pack(results, tmp_path / "one.zip"), pack(results, tmp_path / "elsewhere" / "two.zip")
    assert one.sha256 == two.sha256 and one.path.read_bytes() == two.path.read_bytes()


def test_what_goes_out_is_said(results: Path) -> None:
    text = "\n".join(build_pack([results]).lines)
    assert f"test units of {TASK}, by image: 44 of 44 groups" in text
    assert "predictions: 44 rows" in text and "key, group, fold" in text
    assert "contact: none given" in text and "trained on: unknown" in text


def test_development_results_are_left_out_and_counted(tmp_path: Path) -> None:
    write_committed(tmp_path / "r", "ours", 2.0)
    write_trial(tmp_path / "r", "ours", "lesions", 2.0, evaluated_on="development", encoder_hash="hash-of-ours")
    outgoing = build_pack([tmp_path / "r"])
    assert len(outgoing.contents) == 2
    assert any("left out: 1 results on development folds" in line for line in outgoing.lines)


def test_predictions_of_unknown_sources_stay(tmp_path: Path) -> None:
    write_trial(tmp_path / "r", "ours", "lesions", 2.0)
    with pytest.raises(UserError, match=r"may not leave: its source is unknown, so it is private.*--aggregate-only"):
        build_pack([tmp_path / "r"])


def test_private_keys_under_a_public_tasks_name_stay(tmp_path: Path) -> None:
    keys = [f"k{number:016x}" for number in range(44)]
    write_committed(tmp_path / "r", "ours", 2.0, change={"key": keys})
    with pytest.raises(UserError, match="is not in the committed split"):
        build_pack([tmp_path / "r"])


def test_an_encoder_that_is_not_there_is_named(results: Path) -> None:
    with pytest.raises(UserError, match=r"'other': no Result of it below .*there are ours"):
        build_pack([results], ["other"])


def test_a_contact_is_one_line(results: Path) -> None:
    with pytest.raises(UserError, match="one line"):
        build_pack([results], contact="a\nb")


# The owner of the board


def test_accepted_packs_build_a_board_that_says_whose_word_it_is(packed: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    write_committed(own, "random", 0.2)
    (report,) = verify_packs([packed], accept=tmp_path / "accepted")
    assert report.accepted is not None and (report.accepted / VERIFICATION).is_file()
    summary = compute_standings([own, tmp_path / "accepted"]).summary
    assert find_cells(summary) == {("ours", TASK): "recomputed", ("random", TASK): "recomputed"}
    rows = csv.DictReader(render_csv(summary).splitlines())
    assert [row["origin"] for row in rows] == ["recomputed", "recomputed"]


def test_what_the_owner_measured_too_is_verified(tmp_path: Path) -> None:
    own = tmp_path / "own"
    write_committed(tmp_path / "theirs", "ours", 2.0, task=LARGE)
    write_committed(own, "ours", 2.0, task=LARGE, noise=1)
    write_committed(own, "random", 0.2, task=LARGE)
    packed = pack(tmp_path / "theirs", tmp_path / "p.zip").path
    (report,) = verify_packs([packed], [own], tmp_path / "accepted")
    assert report.findings[0].origin == "verified" and "within 0.01 of the board's own run" in report.findings[0].images
    summary = compute_standings([own, tmp_path / "accepted"]).summary
    assert find_cells(summary) == {("ours", LARGE): "verified", ("random", LARGE): "recomputed"}
    assert ",verified," in render_csv(summary)
    assert all(row.standing is not None for row in summary.sections[0].rows)


def test_what_the_owner_cannot_get_again_is_refused(packed: Path, tmp_path: Path) -> None:
    write_committed(tmp_path / "own", "ours", 0.5)
    refusal = find_refusal(packed, against=[tmp_path / "own"], accept=tmp_path / "accepted")
    assert re.search(r"they differ by 0\.\d+, more than 0.01", refusal)
    assert not (tmp_path / "accepted").exists()


def test_a_verification_holds_for_the_predictions_that_it_names(packed: Path, tmp_path: Path) -> None:
    verify_packs([packed], accept=tmp_path / "accepted")
    (path,) = (tmp_path / "accepted").rglob(VERIFICATION)
    values = read_json(path)
    values["checked"][0]["predictions_sha256"] = "0" * 64
    write_json(path, {**values})
    with pytest.raises(UserError, match="names other predictions"):
        compute_standings([tmp_path / "accepted"])
    write_json(path, {**values, "checked": []})
    with pytest.raises(UserError, match="does not name it"):
        compute_standings([tmp_path / "accepted"])


def test_a_build_checks_committed_images_again(packed: Path, tmp_path: Path) -> None:
    keys = [f"k{number:016x}" for number in range(44)]
    forged = write_committed(tmp_path / "forged", "ours", 2.0, change={"key": keys})
    verify_packs([packed], accept=tmp_path / "accepted")
    (path,) = (tmp_path / "accepted").rglob(VERIFICATION)
    (place,) = (tmp_path / "accepted").rglob("*.parquet")
    place.write_bytes(forged.with_suffix(".parquet").read_bytes())
    place.with_suffix(".json").write_bytes(forged.read_bytes())
    values = read_json(path)
    values["checked"][0] |= {"predictions_sha256": compute_sha256(place.read_bytes()), "origin": "verified"}
    write_json(path, values)
    with pytest.raises(UserError, match="is not in the committed split"):
        compute_standings([tmp_path / "accepted"])


def test_images_that_nobody_can_check_make_no_rank(tmp_path: Path) -> None:
    out = tmp_path / "p.zip"
    for name, strength in (("newcomer", 2.0), ("second", 1.0)):
        write_trial(tmp_path / "theirs", name, "synthetic_x", strength, num_groups=60)
    contents = {
        f"results/{path.relative_to(tmp_path / 'theirs').as_posix()}": path.read_bytes()
        for path in sorted((tmp_path / "theirs").rglob("*.*"))
    }
    found: list[tuple[str, EncoderCard]] = [(one.task, one.encoder) for _, one in read_results([tmp_path / "theirs"])]
    manifest = Manifest(
        panfm_version="0", aggregate_only=False, encoders=declare_encoders(found), members=list_members(contents)
    )
    write_archive(out, manifest, contents)
    (report,) = verify_packs([out], accept=tmp_path / "accepted")
    assert {one.origin for one in report.findings} == {"self_reported"}
    assert {one.images for one in report.findings} == {"images not checked: not a task that panfm ships"}
    board = compute_standings([tmp_path / "accepted"])
    rows = board.summary.sections[0].rows
    assert {row.reason for row in rows} == {"self-reported: its test images were not checked"}
    assert all(row.standing is None for row in rows) and board.pages[0].notes[0] == rows[0].reason
    assert all(cell.difference is None for row in rows for cell in row.cells)
    assert all(np.isnan(values).all() for values in board.replicates.values())
    # The owner's own run on the same images checks them.
    write_trial(tmp_path / "own", "random", "synthetic_x", 0.2)
    summary = compute_standings([tmp_path / "accepted", tmp_path / "own"]).summary
    assert set(find_cells(summary).values()) == {"recomputed"}
    assert all(row.standing is not None for row in summary.sections[0].rows)
    write_trial(tmp_path / "others", "random", "synthetic_x", 0.2, key_prefix="z")
    refusals = verify_packs([out], [tmp_path / "others"])[0].refusals
    assert len(refusals) == 2 and "hold other images" in refusals[0]


# Aggregates


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hospital")
    levels = {"sex": ["female"] * 200 + ["male"] * 4}
    for draw in range(3):
        write_trial(root / "r", "ours", "own_lesions", 2.0, num_groups=68, draw=draw, fraction=0.1, subgroups=levels)
    write_trial(root / "r", "ours", "few_patients", 2.0, num_groups=18)
    write_trial(root / "r", "ours", "rare_class", 2.0, num_groups=60, classes=4)
    return pack(root / "r", root / "figures.zip", aggregate_only=True).path


def test_aggregates_hide_few_groups_and_hold_no_count_of_them(figures: Path) -> None:
    contents = read_pack(figures).contents
    assert [name.split("/")[1] for name in contents] == ["own_lesions"]
    text = b"".join(contents.values()).decode()
    values = json.loads(text)
    assert not any(
        word in text for word in ("k0000", "p000", "female", "test_counts", "predictions", "seed", "train_k")
    )
    assert (values["num_test"], values["num_test_groups"], values["num_rarer_groups"]) == (200, 60, 30)
    assert values["num_train_groups"] is None  # 10 of them
    stated = values["metrics"]["auroc"]
    assert stated["low"] < stated["value"] < stated["high"] and stated["value"] == round(stated["value"], 3)
    assert stated["reason"] is None or not re.search(r"\d", stated["reason"])
    assert values["num_runs"] == 3


def test_what_stays_at_home_is_said_without_counting_it(tmp_path: Path) -> None:
    write_trial(tmp_path / "r", "ours", "few_patients", 2.0, num_groups=18)
    with pytest.raises(UserError, match=f"fewer than {MIN_SHOWN_GROUPS} test groups") as caught:
        build_pack([tmp_path / "r"], aggregate_only=True)
    assert "18" not in str(caught.value)
    write_trial(tmp_path / "r", "ours", "enough", 2.0, num_groups=60)
    write_trial(tmp_path / "r", "ours", "rare_class", 2.0, num_groups=60, classes=4)
    lines = build_pack([tmp_path / "r"], aggregate_only=True).lines
    left = [line for line in lines if line.startswith("stays here")]
    assert len(left) == 2 and "in the rarer class: merge rare classes" in left[1]


def test_aggregates_stand_on_the_board_in_no_rank(figures: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name, strength in (("a", 2.0), ("b", 0.3)):
        write_trial(own, name, "lesions", strength, fraction=0.1)
    (report,) = verify_packs([figures], accept=tmp_path / "accepted")
    assert not report.refusals and report.findings[0].origin == "self_reported"
    summary = build_leaderboard([own, tmp_path / "accepted"], tmp_path / "board")
    (section,) = summary.sections
    row = next(row for row in section.rows if row.encoder.name == "ours")
    assert row.standing is None and row.reason == "self-reported, aggregate only; missing: lesions"
    place = [task.name for task in section.tasks].index("own_lesions")
    stated = json.loads(next(iter(read_pack(figures).contents.values())))["metrics"]["auroc"]
    cell = row.cells[place]
    assert (cell.value, cell.low, cell.high) == (stated["value"], stated["low"], stated["high"])
    assert (cell.origin, cell.difference, cell.num_runs) == ("self_reported", None, 3)
    assert all(other.standing is not None for other in section.rows if other is not row)
    assert section.tasks[place].claim is False
    assert (tmp_path / "board" / "tasks" / "own_lesions.html").is_file()
    without = build_leaderboard([own], tmp_path / "without").sections[0]
    assert [one.standing for one in section.rows if one is not row] == [one.standing for one in without.rows]


def test_aggregates_alone_make_a_board(figures: Path, tmp_path: Path) -> None:
    verify_packs([figures], accept=tmp_path / "accepted")
    summary = build_leaderboard([tmp_path / "accepted"], tmp_path / "board")
    assert [row.reason for row in summary.sections[0].rows] == ["self-reported, aggregate only"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_test_groups": 10}, "greater than or equal to 20"),
        ({"num_test": 204}, "not rounded to 10"),
        ({"primary_metric": "dice"}, "is not among metrics"),
        ({"extra": 1}, "extra"),
    ],
)
def test_aggregates_that_say_too_much_are_refused(
    figures: Path, tmp_path: Path, fields: dict[str, object], reason: str
) -> None:
    assert reason in find_refusal(rewrite(figures, tmp_path / "p.zip", change_results(**fields)))


def test_an_aggregate_beside_predictions_of_the_same_cell_is_refused(
    results: Path, packed: Path, tmp_path: Path
) -> None:
    summed = pack(results, tmp_path / "figures.zip", aggregate_only=True).path
    verify_packs([packed], accept=tmp_path / "accepted")
    assert "once with predictions and once as an aggregate" in find_refusal(summed, against=[tmp_path / "accepted"])


def test_an_aggregate_that_is_put_beside_accepted_ones_is_refused(figures: Path, tmp_path: Path) -> None:
    verify_packs([figures], accept=tmp_path / "accepted")
    (path,) = (tmp_path / "accepted").rglob(f"*{AGGREGATE_SUFFIX}")
    path.rename(path.with_name(f"linear_probe-default-f0.5{AGGREGATE_SUFFIX}"))
    with pytest.raises(UserError, match="does not name it"):
        compute_standings([tmp_path / "accepted"])


def test_trained_on_names_the_sources(results: Path) -> None:
    result: Result = read_results([results])[0][1]
    known = result.encoder.model_copy(update={"sources": (TrainedOn(source="ham10000", data_hash="d", num_kept=5),)})
    (declared,) = declare_encoders([("a", known), ("b", known.model_copy(update={"contamination": "excluded"}))])
    assert declared.trained_on == ("ham10000",)
    assert declared.contamination == {"a": "unknown", "b": "excluded"}


@pytest.mark.slow
def test_a_large_committed_fold_with_levels_goes_the_whole_way(tmp_path: Path) -> None:
    for draw in range(2):
        write_committed(tmp_path / "r", "ours", 1.0, task=LARGE, draw=draw, fraction=0.1, levels=True)
    outgoing = build_pack([tmp_path / "r"])
    assert "about each unit besides its class: sex" in outgoing.lines
    (report,) = verify_packs([write_pack(tmp_path / "p.zip", outgoing).path], accept=tmp_path / "accepted")
    assert [one.origin for one in report.findings] == ["recomputed", "recomputed"]
    assert find_cells(compute_standings([tmp_path / "accepted"]).summary) == {("ours", LARGE): "recomputed"}
