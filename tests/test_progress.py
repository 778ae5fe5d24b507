from io import StringIO

import pytest
from rich.console import Console

from panfm import progress


def test_without_a_terminal_long_work_prints_sparse_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 20.0, 20.0, 21.0, 21.0, 21.0, 30.0, 30.0, 30.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.progress_bar("building", 30, done=10) as advance:
        advance(5)  # at 1 s: silent
        advance(5, "loss 0.5")  # at 20 s: a line
        advance(1)  # a second later: silent
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("building: 20/30 images, ")
    assert lines[0].endswith("loss 0.5")
    assert lines[-1].startswith("building: 21/30 images in ")
    assert len(lines) == 2


def test_lines_say_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 20.0, 20.0, 20.0, 20.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.run_view("pretraining", 1000, done=500) as show:
        show(100, {"loss": "0.5000", "MFU": "31 %"})  # 5 a second, 400 to go
    line = capsys.readouterr().err.splitlines()[0]
    assert line == "pretraining: 600/1000 images, 5.0 images/s, 0:01:20 left loss 0.5000, MFU 31 %"


def test_on_a_terminal_a_run_shows_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", console)
    with progress.run_view("pretraining", 1000) as show:
        show(10, {"loss": "9.9999"})
        show(10, {"loss": "0.1234", "data wait": "2.0%", "MFU": "31.0%", "memory": "2.1 GiB"})
        console.print("a line above")
    shown = screen.getvalue()
    for text in ("20/1000", "0.1234", "data wait", "31.0%", "2.1 GiB", "a line above"):
        assert text in shown
    assert "\x1b[" in shown


def test_track_yields_everything_in_order() -> None:
    assert list(progress.track(iter([3, 1, 2]), "items")) == [3, 1, 2]
