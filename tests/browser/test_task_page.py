"""The pages of tasks in a real browser; every test also fails on a console error or a request to anywhere."""

from pathlib import Path

import pytest
from playwright.sync_api import Page

from panfm.board.build import build_leaderboard
from panfm.shards.index import ShardSet
from tests.board.fabricated import GOOD, write_own_results, write_trial
from tests.browser.boards import FORMULA, MALICIOUS
from tests.browser.conftest import Open
from tests.evaluation.conftest import clinic

__all__ = ["clinic"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of pages of two tasks, with a level of few groups and an encoder whose name is a script."""
    root = tmp_path_factory.mktemp("task_pages")
    sex = ["other" if group < 3 else ("female", "male")[group % 2] for group in range(90) for _ in range(3)]
    for encoder, strength in ((GOOD, 1.5), (MALICIOUS, 0.8), (FORMULA, 0.4)):
        write_trial(root / "results", encoder, "lesions", strength, num_groups=90, subgroups={"sex": sex})
        write_trial(root / "results", encoder, "diagnoses", strength, classes=5, num_groups=90)
        write_trial(
            root / "results", encoder, "wounds", strength, settings={"split_notes": ["of task " + "long_name_" * 12]},
        )  # fmt: skip
    build_leaderboard([root / "results"], root / "board")
    return root / "board/tasks"


def wait_for_drawings(page: Page) -> int:
    """Wait until every place of a drawing has one, and count them."""
    page.wait_for_function(
        "[...document.querySelectorAll('.drawing')].every(place => place.querySelector('.picture svg path'))"
    )
    return page.locator(".drawing .picture svg").count()


def test_drawings_appear_and_names_stay_text(tasks: Path, open_page: Open) -> None:
    page = open_page(tasks / "lesions.html")
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert wait_for_drawings(page) == 5
    for place in ("roc", "precision-recall", "reliability", "decision", "by-sex"):
        drawing = page.locator(f"#drawing-{place}")
        assert drawing.locator(".picture").get_attribute("aria-label")
        assert drawing.locator("svg").bounding_box()["width"] > 150  # type: ignore[index]
        assert MALICIOUS in drawing.locator("svg").text_content()  # type: ignore[operator]
    lines = page.locator("#drawing-roc svg .mark-line path").evaluate_all(
        "all => all.map(one => one.getAttribute('d'))"
    )
    assert len(lines) == 4 and len(set(lines)) == 4  # three encoders and chance
    strokes = page.locator("#drawing-roc svg .mark-line path").evaluate_all(
        "all => all.map(one => one.getAttribute('stroke'))"
    )
    assert len(set(strokes)) == 4
    assert dialogs == [] and page.locator("script").count() == 3  # the library, the data, the page's own
    page.locator("nav a", has_text="Where from").click()
    assert page.locator("#provenance").is_visible() and page.url.endswith("#provenance")


@pytest.mark.parametrize("task", ["lesions", "diagnoses", "wounds"])
def test_a_telephone_scrolls_in_tables_only(tasks: Path, open_page: Open, task: str) -> None:
    page = open_page(tasks / f"{task}.html", viewport={"width": 360, "height": 740})
    assert wait_for_drawings(page) > 0
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for drawing in page.locator(".drawing").all():
        inside = drawing.locator("svg").bounding_box()
        assert inside is not None and inside["x"] >= 0 and inside["x"] + inside["width"] <= 360


def test_without_a_script_the_tables_stand(tasks: Path, open_page: Open) -> None:
    page = open_page(tasks / "lesions.html", java_script_enabled=False)
    assert page.locator("noscript p", has_text="Drawings need JavaScript").is_visible()
    assert not page.locator("#drawing-roc").is_visible()
    for region in ("Sensitivity at fixed specificities", f"What {GOOD} takes for what", "Net benefit", "Reliability"):
        assert page.get_by_role("region", name=region, include_hidden=True).locator("tbody tr").count() >= 2
    rows = page.locator("#curves tbody tr")
    assert rows.count() == 4 and "0.200" in rows.last.inner_text()


def test_without_the_library_the_page_says_so(tasks: Path, open_page: Open, tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/vega.js").write_text("")  # a missing file would be a failed request
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/lesions.html").write_text((tasks / "lesions.html").read_text())
    page = open_page(tmp_path / "tasks/lesions.html")
    assert page.get_by_text("The drawing needs the file assets/vega.js").count() == 5


# Relative luminance and contrast of WCAG 2.2; text on a background that the browser mixed.
CONTRAST = """() => { const draw = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const read = colour => { draw.clearRect(0, 0, 1, 1); draw.fillStyle = colour; draw.fillRect(0, 0, 1, 1);
    const parts = [...draw.getImageData(0, 0, 1, 1).data].slice(0, 3).map(part => part / 255)
      .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
    return .2126 * parts[0] + .7152 * parts[1] + .0722 * parts[2]; };
  return [...document.querySelectorAll('table.confusion td, table.confusion td small')].map(cell => {
    const back = getComputedStyle(cell.closest('td')).backgroundColor, ink = getComputedStyle(cell).color;
    const [low, high] = [read(back), read(ink)].sort((a, b) => a - b); return (high + .05) / (low + .05); }); }"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_stay_readable_and_drawings_take_the_scheme(tasks: Path, open_page: Open, scheme: str) -> None:
    page = open_page(tasks / "diagnoses.html", color_scheme=scheme)
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 50 and min(contrasts) >= 4.5
    page = open_page(tasks / "lesions.html", color_scheme=scheme)
    wait_for_drawings(page)
    first = page.locator("#drawing-roc svg .mark-line path").nth(1)
    before = first.get_attribute("stroke")
    assert before == page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--s0').trim()")
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    page.wait_for_function("before => { const line = document.querySelectorAll('#drawing-roc svg .mark-line path')[1];"
                           " return line && line.getAttribute('stroke') !== before; }", arg=before)  # fmt: skip


def test_images_show_under_the_policy(clinic: ShardSet, tmp_path: Path, open_page: Open) -> None:
    results = write_own_results(tmp_path / "results", clinic.table["key"].to_pylist())
    build_leaderboard([results], tmp_path / "board", images=[clinic.folder])
    page = open_page(tmp_path / "board/tasks/own.html")
    sizes = page.locator("ol.mistakes img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(sizes) > 3 and min(sizes) > 0
    assert "images of patients" in page.locator("header .banner").last.inner_text()
