"""What the page's script knows is what the board says; it is safe to embed, small enough, and the same every time."""

import base64
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from panfm.board.page import embed_json, render_page
from panfm.board.page_data import MAX_REPLICATE_VALUES, MIN_REPLICATES, compute_page_data, encode_replicates
from panfm.board.standings import Board, compute_standings
from panfm.board.summary import LeaderboardSummary
from panfm.measures.draws import Floats
from panfm.measures.statistics import NUM_REPLICATES
from tests.board.fabricated import GOOD, MIDDLE, RANDOM, write_trial

MALICIOUS = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    root = tmp_path_factory.mktemp("results")
    for encoder, strength in ((GOOD, 2.0), (MIDDLE, 1.7), (MALICIOUS, 1.0), (RANDOM, 0.4)):
        write_trial(root, encoder, "lesions", strength, num_groups=90)
        write_trial(root, encoder, "drawn", strength, synthetic=True, group_kind="sample")
        if encoder != MIDDLE:
            write_trial(root, encoder, "diagnoses", strength, classes=3)
    return compute_standings([root])


def decode(section: dict) -> Floats:
    """The replicates [E, T, R] of a section, as the script reads them."""
    plain = section["replicates"]
    numbers = np.frombuffer(base64.b64decode(plain["values"]), dtype="<i2").astype(float)
    numbers[numbers == -32768] = np.nan
    return numbers.reshape(len(section["rows"]), len(section["tasks"]), plain["num_replicates"]) * plain["step"]


def test_replicates_decode_to_those_of_the_board(board: Board) -> None:
    for section in compute_page_data(board)["sections"]:
        found, expected = decode(section), board.replicates[section["slug"]]
        assert found.shape == expected.shape and found.shape[2] == NUM_REPLICATES
        np.testing.assert_allclose(found, expected, atol=section["replicates"]["step"], equal_nan=True)
        assert section["replicates"]["step"] < 5e-5  # far below the digits that a reader sees
    real = next(one for one in board.summary.sections if not one.synthetic)
    missing = [row.encoder.name for row in real.rows].index(MIDDLE)
    assert np.isnan(board.replicates[real.slug][missing, 0]).all()


def test_large_boards_keep_fewer_replicates_and_say_so() -> None:
    few = encode_replicates(np.zeros((200, 40, NUM_REPLICATES)))
    assert (few["num_replicates"], few["num_computed"]) == (MIN_REPLICATES, NUM_REPLICATES)
    some = encode_replicates(np.ones((50, 20, NUM_REPLICATES)))
    assert some["num_replicates"] * 50 * 20 == MAX_REPLICATE_VALUES


def test_rows_are_those_of_the_board(board: Board) -> None:
    data = compute_page_data(board)
    assert [one["slug"] for one in data["sections"]] == [one.slug for one in board.summary.sections]
    for plain, section in zip(data["sections"], board.summary.sections, strict=True):
        assert [data["tasks"][place]["slug"] for place in plain["tasks"]] == [task.slug for task in section.tasks]
        for found, row in zip(plain["rows"], section.rows, strict=True):
            assert (found["encoder"], found.get("reason")) == (row.encoder.name, row.reason)
            if row.standing is not None:
                for name, value in asdict(row.standing).items():
                    if name != "reason" and value is not None:
                        assert found["standing"][name] == round(value, 6)
            for small, cell in zip(found["cells"], row.cells, strict=True):
                values = (small.get("value"), small.get("low"), small.get("high"))
                assert values == tuple(x if x is None else round(x, 6) for x in (cell.value, cell.low, cell.high))
                assert (data["texts"][small["reason"]] if "reason" in small else None) == cell.reason
    assert {one["name"] for one in data["encoders"]} == set(board.summary.encoders)


def test_the_tasks_that_count_are_those_of_the_standings(board: Board) -> None:
    real, synthetic = compute_page_data(board)["sections"]
    assert (real["counted"], synthetic["counted"]) == ([0, 1], [0])
    summary = board.summary
    section = summary.sections[0]
    tasks = (replace(section.tasks[0], claim=False), *section.tasks[1:])
    other = replace(summary, sections=(replace(section, tasks=tasks), *summary.sections[1:]))
    changed = compute_page_data(replace(board, summary=other))
    assert changed["sections"][0]["counted"] == [1]
    badges = changed["tasks"][changed["sections"][0]["tasks"][0]]["badges"]
    assert ("caution", "pipeline check only", "supports no claim about encoders") in [tuple(one) for one in badges]


def test_embedded_json_cannot_leave_its_element(board: Board, tmp_path: Path) -> None:
    text = str(embed_json({"name": MALICIOUS + " &amp; \u2028"}))
    assert not set("<>&\u2028") & set(text) and json.loads(text)["name"] == MALICIOUS + " &amp; \u2028"
    page = render_page(board)
    assert MALICIOUS not in page and "<script>alert" not in page
    assert page.count("</script>") == page.count("<script")


def test_same_board_same_bytes(board: Board) -> None:
    assert render_page(board) == render_page(board)


def test_empty_board_has_a_page() -> None:
    empty = Board(LeaderboardSummary((), (), (), 0), (), {}, (), ())
    assert compute_page_data(empty)["sections"] == [] and "board-data" in render_page(empty)
