"""`panfm leaderboard submit` and `verify` as a submitter, the keeper of a board and a hospital meet them."""

import json
from pathlib import Path

from panfm.board.packs.format import read_pack
from panfm.board.standings import compute_standings
from tests.board.committed import TASK, write_committed
from tests.board.fabricated import write_trial
from tests.cli.commands import panfm


def test_submit_says_what_leaves_and_verify_what_it_is_worth(tmp_path: Path) -> None:
    write_committed(tmp_path / "results", "ours", 2.0)
    write_committed(tmp_path / "results", "theirs", 1.0)
    pack = tmp_path / "ours.zip"
    code, said, fault = panfm("leaderboard", "submit", tmp_path / "results", "--encoder", "ours", "--out", pack)
    assert (code, fault) == (0, "")
    assert "is to leave this house with:" in said and f"test units of {TASK}, by image: 44 of 44 groups" in said
    assert "encoder: ours (panfm:ours); trained on: unknown" in said and "theirs" not in said
    assert f"{pack}: " in said.splitlines()[-1] and "SHA-256" in said

    report = tmp_path / "report.json"
    code, said, _ = panfm("leaderboard", "verify", pack, "--accept", tmp_path / "accepted", "--json", report)
    assert code == 0
    assert "1 recomputed from its predictions; accepted as" in said
    values = json.loads(report.read_text())
    (finding,) = values["packs"][0]["findings"]
    assert values["refused"] == 0 and finding["origin"] == "recomputed"
    assert finding["images"] == f"all 44 images as in the committed split {TASK}"
    assert compute_standings([tmp_path / "accepted"]).summary.num_results == 1


def test_a_refusal_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    write_committed(tmp_path / "results", "ours", 2.0)
    write_committed(tmp_path / "own", "ours", 0.5)
    pack, report = tmp_path / "ours.zip", tmp_path / "report.json"
    panfm("leaderboard", "submit", tmp_path / "results", "--out", pack)
    words = ("--against", tmp_path / "own", "--accept", tmp_path / "accepted", "--json", report)
    code, said, _ = panfm("leaderboard", "verify", pack, *words)
    assert code == 1 and not (tmp_path / "accepted").exists()
    (line,) = [line for line in said.splitlines() if line.startswith("refused: ")]
    assert "they differ by" in line
    values = json.loads(report.read_text())
    assert (values["refused"], values["packs"][0]["refusals"]) == (1, [line.removeprefix("refused: ")])


def test_a_hospital_is_pointed_to_aggregates_and_sends_them(tmp_path: Path) -> None:
    write_trial(tmp_path / "results", "ours", "our_own_lesions", 2.0, num_groups=60)
    pack = tmp_path / "figures.zip"
    code, _, fault = panfm("leaderboard", "submit", tmp_path / "results", "--out", pack)
    assert code == 2 and "--aggregate-only" in fault and not pack.exists()
    code, said, _ = panfm("leaderboard", "submit", tmp_path / "results", "--aggregate-only", "--out", pack)
    assert code == 0 and "no predictions, no keys, no groups, no subgroups" in said
    assert all(b"k0001" not in data for data in read_pack(pack).contents.values())
    code, said, _ = panfm("leaderboard", "verify", pack)
    assert code == 0 and "1 self-reported" in said


def test_what_is_no_zip_or_no_results_folder_is_said(tmp_path: Path) -> None:
    write_committed(tmp_path / "results", "ours", 2.0)
    code, _, fault = panfm("leaderboard", "submit", tmp_path / "results", "--out", tmp_path / "ours.tar")
    assert code == 2 and "a pack is a zip file" in fault
    code, _, fault = panfm("leaderboard", "submit", tmp_path / "absent", "--out", tmp_path / "p.zip")
    assert code == 2 and "no such results folder" in fault
    code, said, _ = panfm("leaderboard", "verify", tmp_path / "p.zip")
    assert code == 1 and "no such file" in said
    (tmp_path / "p.zip").write_text("x")
    code, _, fault = panfm("leaderboard", "verify", tmp_path / "p.zip", "--against", tmp_path / "absent")
    assert code == 2 and "no such results folder" in fault
