import pytest

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


def test_track_yields_everything_in_order() -> None:
    assert list(progress.track(iter([3, 1, 2]), "items")) == [3, 1, 2]
