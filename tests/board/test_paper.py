"""The paper's numbers are the board's or follow from the predictions; what nobody recorded is said, never invented."""

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from panfm.board import verify
from panfm.board.reports.checklists import BY_AUTHORS, NAMES, read_checklist
from panfm.board.reports.counts import FEW
from panfm.board.reports.document import (
    NO_DIAGNOSIS,
    NOT_RECORDED,
    Document,
    Section,
    Table,
    render_html,
    render_markdown,
    write_files,
)
from panfm.board.reports.paper import build_paper
from panfm.board.reports.paper_facts import PaperFacts, collect_paper_facts
from panfm.board.reports.paper_figures import Step, compute_mean_ranks, draw_flow, find_bars
from panfm.board.reports.paper_tables import (
    compute_hanley_variance,
    compute_width,
    describe_patients,
    find_measured_split,
    plan_widths,
    scale_variance,
)
from panfm.board.words import describe_cell
from panfm.cli.main import app
from panfm.evaluation.results import read_result
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.measures.intervals import compute_area_parts, estimate_area
from panfm.shards.index import ShardSet
from tests.board.fabricated import GOOD, MIDDLE, RANDOM, write_trial
from tests.board.test_task_pages import NUM_GROUPS, make_levels

EVIL = "<script>alert(1)</script>"
NOTE = "3 images without the label malignant"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper") / "results"
    for encoder, strength in ((GOOD, 1.6), (EVIL, 1.5), (RANDOM, 0.2)):
        for fraction in (0.1, 1.0):
            settings = {"split_notes": [NOTE], "num_replicates": 2000, "recipe": {"num_folds": 5}}
            write_trial(root, encoder, "lesions", strength * fraction**0.2, fraction=fraction, settings=settings)
            write_trial(root, encoder, "diagnoses", strength * fraction**0.2, fraction=fraction, classes=3)
    return root


@pytest.fixture(scope="module")
def found(results: Path) -> PaperFacts:
    return collect_paper_facts([results])


@pytest.fixture(scope="module")
def document(found: PaperFacts) -> Document:
    return build_paper(found)


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> verify.TestSet:
    root = tmp_path_factory.mktemp("one")
    path = write_trial(root, MIDDLE, "levels", 1.0, num_groups=NUM_GROUPS, subgroups=make_levels())
    return verify.read_test_set(path, read_result(path))


def test_every_value_is_the_boards(found: PaperFacts, document: Document) -> None:
    text = render_markdown(document).replace("\\", "")
    main = found.board.summary.sections[0]
    assert main.label_fraction == 1.0
    for row in main.rows:
        for cell in row.cells:
            assert f"{describe_cell(cell)} |" in text
    forest = next(figure for figure in document.figures if figure.name == f"forest-{main.slug}")
    drawn = {(line["encoder"], line["task"]): line for line in csv.DictReader(forest.csv.splitlines())}
    for row in main.rows:
        for task, cell in zip(main.tasks, row.cells, strict=True):
            line = drawn[row.encoder.name, f"{task.title} ({task.metric_title})"]
            assert float(line["value"]) == pytest.approx(cell.value, abs=1e-6)
            assert float(line["low"]) == pytest.approx(cell.low, abs=1e-6)


def test_methods_are_filled_in_from_the_results(document: Document) -> None:
    text = render_markdown(document).replace("\\", "")
    assert "| Linear probe | 10 %, 100 % | 1, 1 | 1 | 12 |" in text
    assert "compared with random weights" in text and "Holm" in text
    assert "DeLong's variance held together by patient" in text
    assert "2,000 of whole groups on the board" in text


def test_the_flow_holds_what_was_recorded_and_no_more(found: PaperFacts, document: Document) -> None:
    figure = next(figure for figure in document.figures if figure.name == "flow-lesions")
    rows = list(csv.DictReader(figure.csv.splitlines()))
    assert {"left_out_before_it": "without the label malignant", "how_many": "3 images"}.items() <= rows[2].items()
    assert rows[0]["number"].startswith(NOT_RECORDED) and rows[-1]["number"] == "180 images, 60 patients"
    texts = " ".join(node.text or "" for node in ElementTree.fromstring(figure.svg).iter() if node.tag.endswith("text"))
    assert "3 images" in texts and "180 images" in texts
    numbers = {int(one.replace(",", "")) for one in re.findall(r"\d[\d,]*", texts)}
    assert numbers <= {3, 180, 60, 300, 100}  # left out, test, its groups, training, its groups or percent
    assert any(blank.startswith("Data and flow: not recorded: Files of") for blank in document.blanks)


def test_the_flow_reads_what_a_build_rejected(found: PaperFacts, clinic: ShardSet) -> None:
    from panfm.board.reports.paper_facts import _trace
    from tests.evaluation.conftest import make_task

    index = clinic.index | {"num_rejected": {"undecodable": 4, "duplicate": 2, "unreadable_region": 9}}
    card = make_task()
    split = load_split(card, clinic)
    task = found.tasks[0]
    steps = _trace(task.task, card, task.results, split, replace(clinic, index=index))
    assert steps[0].number.startswith("78 read") and steps[1].number == "72 images"
    assert dict(steps[1].left_out) == {"undecodable": "4", "duplicate": "2", "unreadable region": "9"}
    assert steps[2].number.startswith(f"{len(split.keys)} images")


def test_a_task_cannot_name_a_file_elsewhere(document: Document, tmp_path: Path) -> None:
    figure = replace(document.figures[0], name="flow-../../outside")
    section = Section("One", (figure, Table(("a", "b"), (("=1", "2"),), name="table1-../../outside")))
    write_files(replace(document, sections=(section,)), tmp_path / "out")
    assert {path.parent.parent for path in tmp_path.rglob("*.*")} == {tmp_path / "out"}
    assert next(tmp_path.rglob("table1*")).read_text() == "a,b\n'=1,2\n"  # nor a formula


def test_names_cannot_leave_their_box() -> None:
    figure = draw_flow("flow", "A flow.", (Step(EVIL, "1 < 2"), Step("Test", "5", ((EVIL, "3"),))))
    assert "<script" not in figure.svg
    texts = [node.text for node in ElementTree.fromstring(figure.svg).iter() if node.tag.endswith("text")]
    assert EVIL in texts and f"{EVIL}: 3" in texts


# ------------------------------------------------------------------------------------------------ table 1


def test_table_1_counts_the_test_set_and_hides_few(test_set: verify.TestSet) -> None:
    by_name = {one.attribute: one for one in describe_patients(test_set, None, None)}
    sex = {count.level: count for count in by_name["sex"].test or ()}
    group = np.repeat(np.arange(NUM_GROUPS), 3)
    female = (group % 16 != 15) & (group % 5 < 2)
    assert sex["female"].num_images == female.sum() and sex["female"].num_groups == len(set(group[female]))
    site = {count.level: count for count in by_name["anatomic site"].test or ()}
    assert site["toe"].num_images is None  # 8 groups
    assert sum(count.num_images is None for count in site.values()) >= 2  # nor can they be worked out
    classes = {count.level: count.num_images for count in by_name["class"].test or ()}
    assert classes == {"class_0": 240, "class_1": 240}
    assert by_name["phototype"].test is None and by_name["sex"].train is None


def test_training_patients_come_from_the_measured_split_alone(
    test_set: verify.TestSet, clinic: ShardSet, make_task: Callable[..., TaskCard]
) -> None:
    card = make_task()
    split = load_split(card, clinic)
    result = test_set.result.model_copy(update={"split_hash": split.hash, "classes": card.classes})
    measured = replace(test_set, result=result, subgroups={})
    assert find_measured_split(card, test_set, {"clinic": clinic}) is None  # another split hash
    same = find_measured_split(card, measured, {"clinic": clinic})
    assert same is not None and same.hash == split.hash
    place = split.find("train", "val")
    found = {one.attribute: one for one in describe_patients(measured, same, clinic)}
    groups = {split.groups[one] for one in place if split.labels[one] == 0}
    shown = {count.level: count for count in found["class"].train or ()}
    assert set(shown) == {"naevus", "melanoma"}
    few = len(groups) < 20
    assert few and shown["naevus"].num_images is None
    assert found["age"].train is None  # of nobody: not recorded


def test_small_groups_are_suppressed_in_the_text(tmp_path: Path) -> None:
    write_trial(tmp_path, GOOD, "levels", 1.0, num_groups=NUM_GROUPS, subgroups=make_levels())
    text = render_markdown(build_paper(collect_paper_facts([tmp_path])))
    toe = next(line for line in text.splitlines() if "| toe |" in line)
    assert toe.count(FEW) == 1 and not re.search(r"\d", toe)


# ------------------------------------------------------------------------------------------------ planned widths


def test_widths_agree_with_a_simulation() -> None:
    rng = np.random.default_rng(5)
    number = (60, 180)
    labels, large = np.repeat([1, 0], number), np.repeat([1, 0], (1500, 4500))

    def draw_normal(those: np.ndarray) -> np.ndarray:
        return rng.normal(size=len(those)) + 1.2 * those

    def draw_exponential(those: np.ndarray) -> np.ndarray:  # what Hanley and McNeil's formula is exact for
        return rng.exponential(np.where(those == 1, 4.0, 1.0))

    for draw, is_hanley in ((draw_normal, False), (draw_exponential, True)):
        simulated = [estimate_area(labels, draw(labels), np.arange(len(labels))) for _ in range(150)]
        width = float(np.mean([(one.high or 0) - (one.low or 0) for one in simulated]))
        area = float(np.mean([one.value or 0 for one in simulated]))
        if is_hanley:
            assert area == pytest.approx(0.8, abs=0.02)
            assert compute_width(area, compute_hanley_variance(area, *number)) == pytest.approx(width, rel=0.06)
        parts = compute_area_parts(large, draw(large), np.arange(6000))  # a larger study of such patients
        assert compute_width(parts.area, scale_variance(parts, *number)) == pytest.approx(width, rel=0.06)
        assert scale_variance(parts, 1500, 4500) == pytest.approx(parts.variance, rel=1e-6)


def test_widths_shrink_and_only_two_classes_have_them(test_set: verify.TestSet, found: PaperFacts) -> None:
    planned = plan_widths(test_set)
    assert planned is not None
    area, widths = planned
    assert area == pytest.approx(test_set.result.metrics["auroc"].value, abs=1e-6)
    for which in ("hanley", "scaled"):
        values = [getattr(width, which) for width in widths]
        assert values == sorted(values, reverse=True) and 0 < values[-1] < values[0] < 1
    assert {one.task.name: bool(one.widths) for one in found.tasks} == {"diagnoses": False, "lesions": True}


# ------------------------------------------------------------------------------------------------ ranks, checklists


def test_bars_join_what_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(0)
    spread = np.stack([mean + rng.normal(0, 0.2, 500) for mean in (1.0, 1.1, 3.0, 3.1)])
    assert find_bars(spread) == [(0, 1), (2, 3)]
    assert find_bars(spread[:3]) == [(0, 1)]  # the third stands alone
    values = np.array([[0.9, 0.8], [0.7, 0.9], [0.1, 0.2]])[:, :, None]
    assert compute_mean_ranks(values)[:, 0].tolist() == [1.5, 1.5, 3.0]


@pytest.mark.parametrize(("name", "number", "last"), [("tripod_ai", 52, "27c"), ("claim", 44, "44")])
def test_checklists_are_whole_and_point_at_sections(name: str, number: int, last: str, document: Document) -> None:
    checklist = read_checklist(name)
    assert len(checklist.items) == number and checklist.items[-1].number == last
    assert len({one.number for one in checklist.items}) == number
    titles = {section.title for section in document.sections}
    assert {one.answered for one in checklist.items} - {None} <= titles
    text = render_markdown(document)
    assert text.count(f"| {BY_AUTHORS} |") == sum(
        one.answered is None for listed in NAMES for one in read_checklist(listed).items
    )


def test_the_page_is_text_and_says_what_it_is_not(document: Document) -> None:
    page, text = render_html(document), render_markdown(document)
    assert NO_DIAGNOSIS in page and NO_DIAGNOSIS in text
    assert "<script" not in page and "<script" not in text
    assert "&lt;script&gt;alert(1)" in page
    assert all("<script" not in figure.svg for figure in document.figures)
    assert f"Blanks: {len(document.blanks)} (" in page


def test_the_command_writes_the_same_bytes_twice(tmp_path: Path) -> None:
    for encoder, strength in ((GOOD, 1.6), (RANDOM, 0.2)):
        for task in ("lesions", "moles"):
            write_trial(tmp_path / "results", encoder, task, strength)
    trees = []
    for name in ("one", "two"):
        out = tmp_path / name
        command = ["report", "--paper", str(tmp_path / "results"), "--out", str(out), "--processes", "1"]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        trees.append({str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*"))})
    assert trees[0] == trees[1]
    names = set(trees[0])
    assert {"report.md", "report.html", "tables/checklist-claim.csv", "figures/flow-lesions.svg"} <= names
    assert {path.replace(".svg", ".csv") for path in names if path.endswith(".svg")} <= names
    assert any(path.startswith("figures/ranks-") for path in names)
