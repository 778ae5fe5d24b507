import pytest

from panfm.training import meters
from panfm.training.meters import SpeedWindow


def test_a_window_counts_from_the_record_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    window = SpeedWindow()
    for waited, samples in ((1.0, 32), (3.0, 64)):
        for _ in range(2):
            with window.waiting():
                now[0] += waited
            now[0] += 4.0 - waited
            window.num_samples += samples
        assert window.read() == (2 * samples / 8.0, waited / 4.0)
