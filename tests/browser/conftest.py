"""A real browser for the board's pages: headless Chromium, opened on files, as a reader would.

Skipped with a reason where there is no Chromium; PANFM_REQUIRE_BROWSER=1 (set in .ci/run) makes that an error.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from panfm.board.build import build_leaderboard
from tests.browser.boards import write_board_results

Open = Callable[..., Page]
PATIENCE = 30_000  # milliseconds: what never comes fails, what comes late on a busy machine does not


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests; Debian's, as the one of playwright would have to be fetched."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        reason = "no chromium on the PATH; `apt-get install chromium` brings it"
        if os.environ.get("PANFM_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Open a file, with an address's #part, in a window of its own; whatever goes wrong there fails the test."""
    wrong: list[str] = []
    contexts = []

    def open_file(path: Path, part: str = "", **settings: Any) -> Page:
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri() + (f"#{part}" if part else ""))
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of four encoders, one of which lacks a task."""
    return write_board_results(tmp_path_factory.mktemp("browser") / "results")


@pytest.fixture(scope="session")
def board(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of their board."""
    out = tmp_path_factory.mktemp("board")
    build_leaderboard([results], out)
    return out
