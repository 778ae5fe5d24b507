"""The board of fabricated Results: the numbers are those of `measures`, the bytes stable, refusals name the file."""

import csv
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy.special import stdtrit

from panfm.board.build import LeaderboardSummary, build_leaderboard, format_table
from panfm.board.ranking import compute_borda
from panfm.board.summary import Row, Section
from panfm.errors import UserError
from panfm.evaluation.contamination_list import AUDIT_SCHEMA, AUDIT_VERSION
from panfm.evaluation.results import (
    TrainedOn,
    get_scores,
    read_predictions,
    read_results,
    write_predictions,
    write_result,
)
from panfm.files import compute_file_sha256
from panfm.measures.by_family import compute_chance
from panfm.measures.metrics import METRICS, compute_metric
from panfm.measures.outcomes import Outcome
from panfm.measures.statistics import compare_paired, compute_bootstrap_seed, estimate_metrics
from tests.board.fabricated import GOOD, MIDDLE, RANDOM, write_trial
from tests.board.pages import read_page_data


def write_board(root: Path) -> Path:
    for encoder, strength in ((GOOD, 2.0), (MIDDLE, 1.9), (RANDOM, 0.4)):
        write_trial(root, encoder, "lesions", strength)
        write_trial(root, encoder, "diagnoses", strength, classes=4)
        for draw in range(3):
            write_trial(root, encoder, "lesions", strength / 2, fraction=0.1, draw=draw)
        write_trial(root, encoder, "drawn", strength, synthetic=True, group_kind="sample")
    write_trial(root, GOOD, "lesions", 2.5, evaluated_on="development")
    return root


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_board(tmp_path_factory.mktemp("board") / "results")


@pytest.fixture(scope="module")
def board(results: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LeaderboardSummary, Path]:
    out = tmp_path_factory.mktemp("page")
    return build_leaderboard([results], out), out


@pytest.fixture
def own_results(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results, tmp_path / "results"))


def find_row(section: Section, encoder: str) -> Row:
    return next(row for row in section.rows if row.encoder.name == encoder)


def test_sections_keep_real_synthetic_and_fractions_apart(board: tuple[LeaderboardSummary, Path]) -> None:
    summary = board[0]
    found = [(s.synthetic, s.protocol, s.label_fraction, [t.name for t in s.tasks]) for s in summary.sections]
    assert found == [
        (False, "linear_probe", 1.0, ["diagnoses", "lesions"]),
        (False, "linear_probe", 0.1, ["lesions"]),
        (True, "linear_probe", 1.0, ["drawn"]),
    ]
    assert [(entry.encoder, entry.task) for entry in summary.development] == [(GOOD, "lesions")]


def test_cells_are_the_numbers_of_measures(results: Path, board: tuple[LeaderboardSummary, Path]) -> None:
    section = board[0].sections[0]
    by_encoder = {}
    for path, result in read_results([results]):
        if result.task == "diagnoses":
            by_encoder[result.encoder.name] = read_predictions(path.parent / result.predictions)
    table = by_encoder[GOOD]
    labels, groups = table.column("label").to_numpy(), table.column("group").to_pylist()
    seed = compute_bootstrap_seed("diagnoses", "split-diagnoses")
    place = [task.name for task in section.tasks].index("diagnoses")
    estimate = estimate_metrics(["auroc"], labels, get_scores(table), groups, seed=seed)["auroc"]
    cell = find_row(section, GOOD).cells[place]
    assert (cell.value, cell.low, cell.high) == pytest.approx((estimate.value, estimate.low, estimate.high), abs=1e-12)
    gap = compare_paired("auroc", labels, get_scores(table), get_scores(by_encoder[RANDOM]), groups, seed=seed)
    assert section.reference == RANDOM
    assert cell.difference is not None
    assert (cell.difference.difference, cell.difference.low, cell.difference.high) == pytest.approx(
        (gap.difference, gap.low, gap.high), abs=1e-12
    )
    assert find_row(section, RANDOM).cells[place].difference is None


def test_draws_are_averaged_and_their_choice_is_in_the_interval(
    results: Path, board: tuple[LeaderboardSummary, Path]
) -> None:
    section = board[0].sections[1]
    cell = find_row(section, GOOD).cells[0]
    tables = [
        read_predictions(path.parent / result.predictions)
        for path, result in read_results([results])
        if (result.task, result.encoder.name, result.label_fraction) == ("lesions", GOOD, 0.1)
    ]
    seed = compute_bootstrap_seed("lesions", "split-lesions")
    estimates = [
        estimate_metrics(
            ["auroc"], t.column("label").to_numpy(), get_scores(t), t.column("group").to_pylist(), seed=seed
        )
        for t in tables
    ]
    values = [estimate["auroc"].value for estimate in estimates]
    assert (cell.num_runs, cell.value) == (3, pytest.approx(np.mean(values)))
    assert cell.spread == pytest.approx(np.std(values, ddof=1)) and cell.method == "delong_logit+draws"
    # The patients are the same for all draws, so little of their part averages out; the draws' own part comes on top.
    patients = np.mean([estimate["auroc"].high - estimate["auroc"].low for estimate in estimates])
    draws = 2 * stdtrit(2, 0.975) * np.std(values, ddof=1) / np.sqrt(3)
    assert cell.high - cell.low == pytest.approx(np.hypot(patients, draws), rel=0.3)
    assert cell.high - cell.low > draws


def test_encoders_that_the_data_cannot_tell_apart_share_a_rank(board: tuple[LeaderboardSummary, Path]) -> None:
    section = board[0].sections[0]
    standings = {row.encoder.name: row.standing for row in section.rows}
    assert [standings[name].rank for name in (GOOD, MIDDLE, RANDOM)] == [1, 1, 3]
    assert (standings[RANDOM].rank_low, standings[RANDOM].rank_high) == (3, 3)
    assert standings[GOOD].rank_low == 1 and standings[GOOD].rank_high == 2
    row = find_row(section, GOOD)
    assert standings[GOOD].score == pytest.approx(np.mean([(cell.value - 0.5) / 0.5 for cell in row.cells]))
    assert standings[RANDOM].borda == 0
    assert standings[GOOD].borda + standings[MIDDLE].borda == pytest.approx(1.5)


def test_clearly_better_encoder_ranks_alone(tmp_path: Path) -> None:
    for encoder, strength in (("a", 0.3), ("b", 1.5), ("c", 4.0)):
        write_trial(tmp_path / "r", encoder, "lesions", strength)
    summary = build_leaderboard([tmp_path / "r"], tmp_path)
    assert [(row.encoder.name, row.standing.rank) for row in summary.sections[0].rows] == [("c", 1), ("b", 2), ("a", 3)]
    assert summary.sections[0].reference == "a"  # the first by name, as none has random weights
    assert "c leads" in (tmp_path / "LEADERBOARD.md").read_text()


def test_lower_is_better_metrics_rank_the_lower_value_first(tmp_path: Path) -> None:
    for encoder, strength in (("a", 4.0), ("b", 0.3)):
        write_trial(tmp_path / "r", encoder, "lesions", strength, metric="brier")
    section = build_leaderboard([tmp_path / "r"], tmp_path).sections[0]
    assert [row.encoder.name for row in section.rows] == ["a", "b"]
    assert section.rows[0].cells[0].value < section.rows[1].cells[0].value
    assert section.tasks[0].chance == pytest.approx(0.25)


def test_missing_task_leaves_an_encoder_unranked(own_results: Path, tmp_path: Path) -> None:
    write_trial(own_results, "newcomer", "lesions", 5.0)
    section = build_leaderboard([own_results], tmp_path).sections[0]
    row = section.rows[-1]
    assert (row.encoder.name, row.standing, row.reason) == ("newcomer", None, "missing: diagnoses")
    assert [cell.value is None for cell in row.cells] == [True, False]
    data = read_page_data(tmp_path / "index.html")
    (plain,) = [one for one in data["sections"][0]["rows"] if one["encoder"] == "newcomer"]
    assert plain["reason"] == "missing: diagnoses" and "standing" not in plain
    assert data["texts"][plain["cells"][0]["reason"]] == "not evaluated"
    assert find_row(section, GOOD).standing.rank == 1


def test_undefined_metric_is_no_number(tmp_path: Path) -> None:
    for encoder in ("a", "b"):
        write_trial(tmp_path / "r", encoder, "lesions", 1.0)
        write_trial(tmp_path / "r", encoder, "one_patient", 1.0, num_groups=1)
    section = build_leaderboard([tmp_path / "r"], tmp_path).sections[0]
    cell = section.rows[0].cells[1]
    assert (cell.value, cell.reason) == (None, "no test image of class 1")
    assert section.rows[0].standing is not None  # undefined for everyone: it counts for none
    assert "no test image of class 1" in (tmp_path / "leaderboard.csv").read_text()


def test_same_results_give_the_same_bytes(
    results: Path, board: tuple[LeaderboardSummary, Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(results, tmp_path / "elsewhere"))
    build_leaderboard([moved], tmp_path / "two")
    names = sorted(str(path.relative_to(board[1])) for path in board[1].rglob("*.*"))
    pages = [f"tasks/{name}.html" for name in ("diagnoses", "drawn", "lesions")]
    assets = ["assets/vega-licences.txt", "assets/vega.js"]
    tables = ["LEADERBOARD.md", *assets, "index.html", "leaderboard.csv", "leaderboard.json"]
    assert names == [*tables, *pages]
    for name in names:
        assert (board[1] / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_processes_give_the_same_bytes(results: Path, board: tuple[LeaderboardSummary, Path], tmp_path: Path) -> None:
    build_leaderboard([results], tmp_path, processes=2)
    for path in board[1].rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(board[1])).read_bytes()


def test_tables_hold_the_same_numbers(board: tuple[LeaderboardSummary, Path]) -> None:
    section = board[0].sections[0]
    with (board[1] / "leaderboard.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if (line["images"], line["label_fraction"]) == ("real", "1.0")]
    plain = json.loads((board[1] / "leaderboard.json").read_text())["sections"][0]
    for row, plain_row in zip(section.rows, plain["rows"], strict=True):
        for place, task in enumerate(section.tasks):
            (line,) = [one for one in lines if (one["encoder"], one["task"]) == (row.encoder.name, task.name)]
            assert float(line["value"]) == plain_row["cells"][place]["value"] == round(row.cells[place].value, 6)
            assert f"{row.cells[place].value:.3f}" in (board[1] / "LEADERBOARD.md").read_text()


def test_page_is_whole_safe_and_offline(own_results: Path, tmp_path: Path) -> None:
    name = "<script>alert(1)</script> | =1+1"
    write_trial(own_results, name, "lesions", 1.0)
    write_trial(own_results, "=HYPERLINK(0)", "lesions", 1.0)
    build_leaderboard([own_results], tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; | =1+1" in page  # without JavaScript
    data = read_page_data(tmp_path / "index.html")
    assert name in [row["encoder"] for row in data["sections"][0]["rows"]]
    assert "default-src 'none'" in unescape(page) and "connect-src" not in page
    assert not re.findall(r"""(?:src|href|action|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", page)
    assert re.findall(r'<script[^>]*src="([^"]*)"', page) == ["assets/vega.js"] and "<link" not in page
    assert page.startswith("<!doctype html>")
    assert page.count("<th>") == 0 and 'scope="col"' in page and 'scope="row"' in page
    assert "For research only" in page and "drawn by a program" in page
    badges = [words for task in data["tasks"] for _, words, _ in task["badges"]]
    said = [words for row in data["sections"][0]["rows"] for _, words in row["contamination"]]
    assert "patients unknown" in badges and "test patients kept out of pretraining" in said
    markdown = (tmp_path / "LEADERBOARD.md").read_text()
    assert "<script>" not in markdown and "&lt;script&gt;alert(1)&lt;/script&gt; \\| =1+1" in markdown
    assert "'=HYPERLINK(0)" in (tmp_path / "leaderboard.csv").read_text()


def write_audit(folder: Path, results: Path, keys: list[str]) -> Path:
    """An audit of one source that the good encoder was trained on, listing `keys` of task lesions."""
    rows = [
        {
            "pretrain_source": "atlas", "pretrain_key": f"a{number}", "evaluation_source": "clinic",
            "evaluation_key": key, "method": "phash", "score": 0.9, "task": "lesions", "distance": 10,
            "pretrain_test_tasks": [],
        }
        for number, key in enumerate(keys)
    ]  # fmt: skip
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=AUDIT_SCHEMA), folder / "audit.parquet")
    manifest = {
        "audit_version": AUDIT_VERSION, "audit_sha256": compute_file_sha256(folder / "audit.parquet"),
        "pretrain": [{"source": "atlas", "data_hash": "ab"}],
        "evaluation": [{"source": "c", "data_hash": "of the whole set"}],
        "tasks": [{"task": "lesions", "source": "c", "data_hash": "data-lesions"}],
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(manifest))
    for path, result in read_results([results]):
        if result.encoder.name == GOOD:
            source = TrainedOn(source="atlas", data_hash="ab", num_kept=9)
            card = result.encoder.model_copy(update={"sources": (source,)})
            path.write_text(result.model_copy(update={"encoder": card}).model_dump_json())
    return folder


def test_an_audit_flags_cells_and_shows_them_without_what_was_seen(own_results: Path, tmp_path: Path) -> None:
    seen = [f"k{number:04d}" for number in range(0, 90)]
    audit = write_audit(tmp_path / "audit", own_results, seen)
    summary = build_leaderboard([own_results], tmp_path / "board", audit)
    section = summary.sections[0]
    place = [task.name for task in section.tasks].index("lesions")
    cell = find_row(section, GOOD).cells[place]
    assert cell.audit is not None and (cell.audit.num_seen, cell.audit.num_test, cell.audit.choice) == (
        90,
        180,
        "flagged",
    )
    path, result = next(
        (path, result)
        for path, result in read_results([own_results])
        if (result.task, result.encoder.name, result.label_fraction) == ("lesions", GOOD, 1.0)
        and result.evaluated_on == "test"
    )
    table = read_predictions(path.parent / result.predictions)
    kept = np.array([key not in seen for key in table.column("key").to_pylist()])
    point = compute_metric("auroc", table.column("label").to_numpy()[kept], get_scores(table)[kept])
    assert cell.audit.value == pytest.approx(point.value, abs=1e-12) and cell.audit.value != cell.value
    assert (
        cell.value
        == find_row(build_leaderboard([own_results], tmp_path / "plain").sections[0], GOOD).cells[place].value
    )
    other = find_row(section, GOOD).cells[1 - place].audit
    assert other is not None and (other.num_seen, other.reason) == (None, "the audit is not of this task")
    stranger = find_row(section, MIDDLE).cells[place].audit
    assert stranger is not None and stranger.reason == "pretraining data unknown"
    page, text = ((tmp_path / "board" / name).read_text() for name in ("index.html", "LEADERBOARD.md"))
    words = f"audit: 90 of 180 test images (50 %) in pretraining; without them {cell.audit.value:.3f}"
    assert words in page and words in text and summary.audit is not None and summary.audit[:12] in page
    lines = list(csv.DictReader((tmp_path / "board" / "leaderboard.csv").read_text().splitlines()))
    flagged = [line for line in lines if line["audit_choice"] == "flagged"]
    assert {line["task"] for line in flagged} == {"lesions"} and flagged[0]["seen_test_images"] == "90"


def test_an_audit_of_images_does_not_speak_of_cases(own_results: Path, tmp_path: Path) -> None:
    audit = write_audit(tmp_path / "audit", own_results, ["k0001"])
    for path, result in read_results([own_results]):
        if result.task == "lesions":
            path.write_text(result.model_copy(update={"unit": "case"}).model_dump_json())
    section = build_leaderboard([own_results], tmp_path / "board", audit).sections[0]
    place = [task.name for task in section.tasks].index("lesions")
    found = find_row(section, GOOD).cells[place].audit
    assert found is not None and found.num_seen is None
    assert found.reason == "the audit lists images of this task, which scores each case as one"


def test_terminal_table_shows_every_encoder(board: tuple[LeaderboardSummary, Path]) -> None:
    console = Console(width=200, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(format_table(board[0]))
    text = capture.get()
    assert text.count(GOOD) == 3 and "=1 [1–2]" in text and "Linear probe, 10 % of labels" in text


def test_changed_predictions_are_refused(own_results: Path, tmp_path: Path) -> None:
    path, result = next((p, r) for p, r in read_results([own_results]) if r.encoder.name == MIDDLE)
    file = path.parent / result.predictions
    table = read_predictions(file)
    labels = table.column("label").to_pylist()
    perfect = pa.array(np.eye(len(result.classes), dtype=np.float32)[labels].tolist(), type=pa.list_(pa.float32()))
    sha256 = write_predictions(file, table.set_column(6, "scores", perfect))
    with pytest.raises(UserError, match=f"{file}: these are not the predictions"):
        build_leaderboard([own_results], tmp_path / "out")
    write_result(
        own_results, result.model_copy(update={"predictions_sha256": sha256})
    )  # and a forger who fixes the hash
    with pytest.raises(UserError, match=r"auroc is .* but 1\.0 follows from its predictions"):
        build_leaderboard([own_results], tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"predictions of .* are missing"):
        build_leaderboard([own_results], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_test_images_are_refused(own_results: Path, tmp_path: Path) -> None:
    write_trial(own_results, "other", "lesions", 1.0, key_prefix="x")
    with pytest.raises(UserError, match="hold other images"):
        build_leaderboard([own_results], tmp_path)


def test_same_result_twice_and_one_name_for_two_encoders_are_refused(own_results: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(own_results, tmp_path / "copy"))
    with pytest.raises(UserError, match="the same result as"):
        build_leaderboard([own_results, copy], tmp_path / "out")
    write_trial(own_results, GOOD, "others", 1.0, encoder_hash="another")
    with pytest.raises(UserError, match="one name stands for one encoder"):
        build_leaderboard([own_results], tmp_path / "out")


def test_another_split_is_refused(own_results: Path, tmp_path: Path) -> None:
    path, result = next((p, r) for p, r in read_results([own_results]) if r.encoder.name == RANDOM)
    write_result(own_results, result.model_copy(update={"split_hash": "older"}))
    with pytest.raises(UserError, match=f"{path}: split_hash of task"):
        build_leaderboard([own_results], tmp_path)


def test_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="panfm evaluate run"):
        build_leaderboard([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("metric", list(METRICS))
def test_chance_is_what_the_class_shares_reach(metric: str) -> None:
    labels = np.repeat([0, 1], [700, 300])
    constant, right = np.tile([0.7, 0.3], (1000, 1)), np.eye(2)[labels]
    groups = np.arange(1000).astype(str)
    outcome = Outcome(labels, constant, groups, np.zeros((1000, 0)))
    chance, perfect = compute_chance("classification", metric, outcome)
    assert compute_metric(metric, labels, right).value == pytest.approx(perfect, abs=1e-9)
    if metric not in ("ece", "sensitivity_at_90_specificity", "sensitivity_at_95_specificity"):
        assert compute_metric(metric, labels, constant).value == pytest.approx(chance, abs=1e-9)


def test_borda_counts_ties_half() -> None:
    scores = np.array([[0.9, 0.5], [0.7, 0.5], [0.1, 0.8]])
    np.testing.assert_allclose(compute_borda(scores), [(1 + 0.25) / 2, (0.5 + 0.25) / 2, (0 + 1) / 2])
