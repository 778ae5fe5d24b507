"""The page of `panfm app` in a real browser, used as a resident would; what it shows must be what Python predicts.

Every test also fails on a console message, on a dialog and on a request to anywhere but the page's own address.
"""

import functools
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from panfm_predict import Classifier, load_classifier
from panfm_predict.app.server import MAX_BYTES, AppServer
from tests.browser.conftest import PATIENCE
from tests.predict.made import draw_image, make_classifier

HOSTILE = "<img src=x onerror=alert(1)>"  # a class; and, as far as a file may be called so, a file
CLASSES = ("melanoma", "nevus", HOSTILE)
Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = make_classifier(
        tmp_path_factory.mktemp("app") / "classifier",
        classes=CLASSES,
        modalities=None,  # with random weights an image may look like anything
        num_cases=8,
        card={"name": f"clinic {HOSTILE}"},
    )
    return load_classifier(folder, threads=1)


@pytest.fixture(scope="module")
def server(classifier: Classifier) -> Iterator[AppServer]:
    with AppServer(classifier) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three usual pictures (a wide one, a high one, one with a hostile name) and one unlike all that was fitted."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / name for name in ("wide.jpg", "high.png", "<img src=x onerror=alert(1)>.png", "unlike.png")]
    for seed, (path, size) in enumerate(zip(paths[:3], ((640, 400), (300, 500), (64, 64)), strict=True)):
        draw_image(seed, size).save(path)
    Image.effect_noise((96, 96), 120).convert("RGB").save(paths[3])
    return paths


@pytest.fixture
def visit(browser: Browser, server: AppServer) -> Iterator[Visit]:
    """Open the page in a window of its own, at once with images if they are given."""
    wrong: list[str] = []
    contexts = []

    def open_page(*files: Path, language: str = "en-GB", **settings: Any) -> Page:
        context = browser.new_context(locale=language, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("request", lambda request: wrong.append(request.url) if not is_own(request.url, server) else None)
        page.goto(server.address)
        page.locator("#about h3").first.wait_for()
        if files:
            page.locator("#file").set_input_files(files)
            expect(page.locator("article .probabilities")).to_have_count(len(files))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def is_own(url: str, server: AppServer) -> bool:
    """An address of the server, or bytes that the page already holds."""
    return url.startswith((server.address, f"blob:http://{server.authority}/", "data:image/"))


def read_numbers(article: Locator) -> dict[str, float]:
    script = "rows => rows.map(row => [row.cells[0].textContent, Number(row.dataset.value)])"
    return dict(article.locator(".probabilities tbody tr").evaluate_all(script))


def drop(page: Page, paths: list[Path], target: str) -> None:
    """Drop files as a file manager does: by an event that the browser itself makes."""
    box = page.locator(target).bounding_box()
    assert box is not None
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


def test_an_image_that_is_dropped_is_predicted(visit: Visit, images: list[Path], classifier: Classifier) -> None:
    page = visit()
    drop(page, images[:2], "#drop")
    articles = page.locator("article")
    expect(articles.locator(".probabilities")).to_have_count(2)
    assert articles.locator("h2").all_inner_texts() == ["Image 2", "Image 1"]  # the newest first
    drop(page, images[3:], "aside")  # beside the field too: the browser would open the file instead
    expect(articles.locator(".probabilities")).to_have_count(3)
    assert page.url.startswith("http://127.0.0.1")
    for article, prediction in zip(reversed(articles.all()), classifier.predict([*images[:2], images[3]]), strict=True):
        assert read_numbers(article) == pytest.approx(prediction.probabilities, abs=1e-9)


def test_a_drop_that_holds_no_file_is_said(visit: Visit) -> None:
    page = visit()
    script = "new DragEvent('drop', { bubbles: true, cancelable: true, dataTransfer: new DataTransfer() })"
    assert (
        page.locator("aside").evaluate(f"aside => aside.dispatchEvent({script})") is False
    )  # the browser opens nothing
    expect(page.locator("#status")).to_have_text(re.compile("That was no file"))
    assert page.locator("#status.heard").count() == 0


def test_bars_and_numbers_are_those_of_python(visit: Visit, images: list[Path], classifier: Classifier) -> None:
    page = visit(*images[:3])
    rule = classifier.card.threshold_card
    assert rule is not None
    seen = set()
    for article, prediction in zip(
        reversed(page.locator("article").all()), classifier.predict(images[:3]), strict=True
    ):
        numbers = read_numbers(article)
        assert numbers == pytest.approx(prediction.probabilities, abs=1e-9)
        assert list(numbers.values()) == sorted(numbers.values(), reverse=True)
        texts = article.locator(".probabilities .value").all_inner_texts()
        assert texts == [f"{100 * value:.1f}%" for value in numbers.values()]
        script = "bar => bar.firstChild.getBoundingClientRect().width / bar.getBoundingClientRect().width"
        drawn = [bar.evaluate(script) for bar in article.locator(".probabilities .bar").all()]
        assert drawn == pytest.approx(list(numbers.values()), abs=0.005)
        [mark] = article.locator(".probabilities b").evaluate_all("marks => marks.map(mark => mark.style.left)")
        assert float(mark.rstrip("%")) == pytest.approx(100 * rule.threshold)
        verdict = article.locator(".verdict").inner_text()
        value = 100 * prediction.probabilities["melanoma"]
        assert verdict.startswith("Flagged" if prediction.flagged else "Not flagged") and f"{value:.1f}%" in verdict
        assert ("This does not rule it out" in article.inner_text()) == (not prediction.flagged)
        seen.add(prediction.flagged)
    assert seen == {True, False}


def test_it_says_when_an_image_is_unlike_the_fitted_ones(
    visit: Visit, images: list[Path], classifier: Classifier
) -> None:
    usual, unlike = classifier.predict([images[0], images[3]])
    assert (usual.is_outlier, unlike.is_outlier) == (False, True)
    page = visit(images[0], images[3])
    newest, first = page.locator("article").all()
    assert "Unlike the images it was fitted on" in newest.locator(".alert").first.inner_text()
    assert "Do not rely on the numbers" in newest.locator(".alert").first.inner_text()
    assert f"Outlier score {unlike.outlier_score:.2f}" in newest.inner_text()
    assert first.locator(".told .alert").count() == 0
    assert "Unlike" in page.locator("#status").inner_text()  # heard as well


def test_it_says_when_an_image_is_of_another_modality(visit: Visit, images: list[Path], server: AppServer) -> None:
    page = visit()
    answer = json.loads(json.dumps(ask_python(server, images[0])))
    answer |= {"modality": "clinical", "modality_unexpected": True}
    page.route("**/predict", lambda route: route.fulfill(json=answer))
    page.locator("#file").set_input_files(images[0])
    alert = page.locator("article .told .alert")
    expect(alert).to_contain_text("Looks like a clinical image; the classifier was fitted on dermoscopic images")
    page.locator("[data-language=fr]").click()
    expect(alert).to_contain_text("Ressemble à une image clinique")


def ask_python(server: AppServer, path: Path) -> dict[str, Any]:
    from panfm_predict.app.replies import answer

    return answer(server.classifier, path.read_bytes(), None)


def test_similar_cases_stand_with_their_diagnoses(visit: Visit, images: list[Path], classifier: Classifier) -> None:
    page = visit(images[0])
    wanted = classifier.find_similar(classifier.embed([images[0]])[0], 5)
    cases = page.locator("article .similar li")
    assert cases.locator("strong").all_inner_texts() == [case.label for case in wanted]
    assert cases.locator("small").all_inner_texts() == [f"similarity {case.similarity:.2f}" for case in wanted]
    assert all(cases.locator("img").evaluate_all("images => images.map(image => image.naturalWidth > 0)"))


def test_the_square_is_what_the_classifier_sees(visit: Visit, images: list[Path], classifier: Classifier) -> None:
    page = visit(images[0])  # 640 x 400
    transform = classifier.card.transform
    share = transform.image_size / transform.resize_size
    page.locator(".square").wait_for()
    script = "square => { const a = square.getBoundingClientRect(), b = square.parentElement.getBoundingClientRect(); "
    script += (
        "return [a.width / b.width, a.height / b.height, a.width - a.height, (a.left + a.right) - (b.left + b.right)] }"
    )
    width, height, uneven, off = page.locator(".square").evaluate(script)
    assert (width, height) == pytest.approx((share * 400 / 640, share), abs=0.01)
    assert abs(uneven) < 1 and abs(off) < 1


def test_a_share_of_this_clinic_corrects_what_is_shown(
    visit: Visit, images: list[Path], classifier: Classifier
) -> None:
    page = visit(images[0])
    [plain], [corrected] = classifier.predict(images[:1]), classifier.predict(images[:1], {"melanoma": 0.025})
    article, field = page.locator("article"), page.locator("#share")
    flag = article.locator(".verdict").inner_text()
    field.fill("120")
    field.press("Enter")
    expect(page.locator("#share-problem")).to_have_text("Give a number above 0 and below 100.")
    field.fill("2.5")
    field.press("Enter")
    expect(article.locator(".corrected")).to_have_text(
        "Corrected for your clinic, where 2.5% of the images show melanoma"
    )
    assert read_numbers(article) == pytest.approx(corrected.probabilities, abs=1e-9)
    assert article.locator(".verdict").inner_text() == flag  # decided as it was measured
    assert article.locator(".probabilities b").count() == 0
    page.get_by_role("button", name="As fitted").click()
    expect(article.locator(".corrected")).to_have_count(0)
    assert read_numbers(article) == pytest.approx(plain.probabilities, abs=1e-9)


def test_the_language_can_be_switched(visit: Visit, images: list[Path]) -> None:
    page = visit(images[0])
    root, status = page.locator("html"), page.locator("#status")
    before = read_numbers(page.locator("article"))
    assert (
        root.get_attribute("lang") == "en"
        and "Research only. Not a diagnosis." in page.locator(".research").inner_text()
    )
    page.get_by_role("button", name="Français").click()
    assert root.get_attribute("lang") == "fr"
    assert "Recherche uniquement. Pas un diagnostic." in page.locator(".research").inner_text()
    text = page.locator("article").inner_text()
    assert "Probabilités" in text and "Écart avec les images" in text and re.search(r"\d,\d\s%", text)
    assert "Recherche uniquement" in status.inner_text()
    assert read_numbers(page.locator("article")) == before
    english = ("Research", "fitted", "Threshold", "Choose", "Share of", "When not", "Similar")
    assert not [word for word in english if word in page.locator("body").inner_text()]
    page.reload()  # stays in the language, in which the browser itself is not
    expect(root).to_have_attribute("lang", "fr")
    assert visit(language="fr-CH").locator("html").get_attribute("lang") == "fr"


def test_both_languages_have_every_word(visit: Visit) -> None:
    page = visit()
    script = "import('./words.js').then(module => ['en', 'fr'].map(l => Object.entries(module.speak(l).words)"
    script += ".map(([key, word]) => [key, typeof word, String(word.length)])))"
    english, french = page.evaluate(script.replace("./", f"{page.url}"))
    assert [word[:2] for word in english] == [word[:2] for word in french] and len(english) > 60
    assert not [key for key, kind, length in english + french if kind == "string" and length == "0"]


def test_the_keyboard_is_enough(visit: Visit, images: list[Path]) -> None:
    page = visit()
    page.on("filechooser", lambda chooser: chooser.set_files(images[0]))  # early: the browser learns of it late if busy

    def tab_to(selector: str, key: str = "Tab") -> None:
        for _ in range(20):
            page.keyboard.press(key)
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"{selector} is not reached")

    tab_to("[data-language=fr]")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert page.locator("html").get_attribute("lang") == "en"
    tab_to("#choose")
    outline = page.locator("#choose").evaluate("button => getComputedStyle(button).outlineStyle")
    assert outline == "solid"  # where the focus is can be seen
    page.keyboard.press("Enter")
    expect(page.locator("article .probabilities")).to_have_count(1)
    tab_to("article .buttons button:last-child")
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(0)
    assert page.evaluate("document.activeElement.id") == "choose"  # and not the top of the page


def test_a_hostile_name_stays_text(visit: Visit, images: list[Path]) -> None:
    page = visit(images[2])
    assert images[2].name in page.locator(".file").inner_text()
    assert HOSTILE in page.locator("h1").inner_text() and page.title().startswith(f"clinic {HOSTILE}")
    places = ("article .probabilities", "#about", "#doubts", "article .similar")
    assert all(HOSTILE in page.locator(place).inner_text() for place in places)
    page.locator("[data-language=fr]").click()
    assert page.locator("img[src=x], [onerror], body script").count() == 0  # and `visit` heard no dialog


@pytest.mark.parametrize("language", ["en-GB", "fr-FR"])
def test_it_fits_a_telephone(visit: Visit, images: list[Path], language: str) -> None:
    page = visit(images[0], images[3], language=language, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.locator("article").last.scroll_into_view_if_needed()
    assert page.locator(".research").is_visible()
    box = page.locator(".research").bounding_box()
    assert box is not None and box["y"] == 0 and box["height"] < 740 / 5  # stays in sight, and leaves room
    small = "all => all.map(e => e.getBoundingClientRect()).filter(r => r.height < 24 || r.width < 24).length"
    assert page.locator("button:visible").evaluate_all(small) == 0  # WCAG 2.2, 2.5.8


def test_on_paper_the_warning_stays_and_the_name_of_the_file_goes(visit: Visit, images: list[Path]) -> None:
    page = visit(images[0], images[3], color_scheme="dark")
    page.evaluate("window.print = () => {}")
    page.locator("article").first.get_by_role("button", name="Print").click()
    page.emulate_media(media="print")
    newest, first = page.locator("article").all()
    assert newest.is_visible() and not first.is_visible()
    text = page.locator("body").inner_text()
    assert "Research only. Not a diagnosis." in text and "unlike.png" not in text and "Choose an image" not in text
    assert "Research only" in newest.locator(".printed").inner_text() and "version 1" in newest.inner_text()
    assert page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert first.is_visible()  # the browser's own print prints all


def test_what_cannot_be_read_is_said(visit: Visit, images: list[Path], tmp_path: Path) -> None:
    page = visit()
    (tmp_path / "notes.txt").write_text("no image")
    with (tmp_path / "huge.tif").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    page.locator("#file").set_input_files([tmp_path / "notes.txt", tmp_path / "huge.tif", images[0]])
    expect(page.locator("article .probabilities")).to_have_count(1)  # the others do not stop it
    alerts = page.locator("article > .alert").all_inner_texts()
    assert len(alerts) == 2 and "larger than 64 MB" in alerts[0] and "could not be read as an image" in alerts[1]
    draw_image(5).save(tmp_path / "scan.tiff")  # read by the classifier, not shown by this browser
    page.locator("#file").set_input_files(tmp_path / "scan.tiff")
    expect(page.locator("article .probabilities")).to_have_count(2)
    expect(page.locator(".no-preview")).to_have_count(1)


def test_without_a_threshold_or_cases_it_says_so(browser: Browser, images: list[Path], tmp_path: Path) -> None:
    folder = make_classifier(tmp_path / "classifier", threshold=None, modalities=None)
    with AppServer(load_classifier(folder, threads=1)) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        page = browser.new_page(locale="en-GB")
        page.goto(server.address)
        page.locator("#file").set_input_files(images[0])
        expect(page.locator("article .verdict")).to_have_text("Nothing is flagged: no threshold could be set.")
        assert "12 patients with melanoma; at least 20 are needed" in page.locator("article .flag").inner_text()
        assert "keeps no images to compare with" in page.locator("article").inner_text()
        server.shutdown()
    page.locator("#file").set_input_files(images[1])  # the program has ended
    expect(page.locator("article > .alert")).to_contain_text("the program behind this page has ended")
    page.close()


def test_a_page_of_another_origin_gets_nothing(browser: Browser, server: AppServer, tmp_path: Path) -> None:
    """The worst case: it even knows the token. It may neither read, nor reach the classifier, nor frame the page."""
    (tmp_path / "index.html").write_text("<!doctype html><title>another site</title>")
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    attack = """async address => {
      const told = [], say = promise => promise.then(() => told.push('reached'), () => told.push('failed'));
      const image = type => ({ method: 'POST', body: 'x', headers: { 'Content-Type': type } });
      await say(fetch(address + 'card'));
      await say(fetch(address + 'predict', image('application/octet-stream')));
      await say(fetch(address + 'predict', image('text/plain')));
      await say(import(address + 'words.js'));
      await fetch(address + 'predict', { ...image('text/plain'), mode: 'no-cors' }).catch(() => {});
      const frame = document.createElement('iframe');
      await new Promise(done => { frame.onload = done; frame.src = address; document.body.append(frame); });
      return told;
    }"""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
        threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        for host in ("localhost", "127.0.0.1"):  # another site, and another origin of the same site
            statuses: list[int] = []
            page = browser.new_page()
            page.on("response", lambda r: statuses.append(r.status) if server.authority in r.url else None)  # noqa: B023
            page.goto(f"http://{host}:{other.server_port}/")
            assert page.evaluate(attack, server.address) == ["failed"] * 4
            assert all(status in (403, 501) for status in statuses)
            assert page.frames[-1].locator("#drop").count() == 0
            page.close()
        other.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Another site on this computer."""

    def log_message(self, format: str, *args: Any) -> None:
        pass
