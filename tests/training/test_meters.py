"""Speed between two records, and the share of what the machine could do at best."""

import math
from types import SimpleNamespace

import pytest
import torch

from panfm.config import load_config
from panfm.training import meters
from panfm.training.meters import FIRST_SECONDS, Meters, SpeedWindow
from panfm.training.plan import PretrainConfig

CPU = torch.device("cpu")


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


def test_a_peak_that_was_measured_on_a_busy_machine_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    now, peak = [100.0], [4e9]
    monkeypatch.setattr(meters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meters, "find_peak", lambda *_: peak[0])
    monkeypatch.setattr(meters, "compute_run_cost", lambda _: SimpleNamespace(sample_flops=1e9))
    measured = Meters(load_config(PretrainConfig, "configs/pretrain/debug_cpu.yaml", []), CPU)

    def step(seconds: float) -> object:
        now[0] += seconds
        joules, here = measured.measure()
        measured.set_totals(2 * joules, 2 * here)  # two ranks alike
        return measured.read(5.0)["mfu"]

    assert measured.read(3.0)["mfu"] == pytest.approx(0.75)
    assert measured.read(5.0)["mfu"] is None  # more than the machine can do
    peak[0] = 10e9
    assert step(1.0) == pytest.approx(5 / 8)  # too early for another look
    assert step(5.0) == pytest.approx(5 / 8)  # looks, and tells the other ranks at the next step
    peak[0] = 2e9
    assert step(6.0) == pytest.approx(5 / 20)
    assert step(6.0) == pytest.approx(5 / 20)  # the best counts
    peak[0] = 99e9
    assert [step(FIRST_SECONDS), step(6.0)] == [pytest.approx(5 / 20)] * 2  # only in the first minute
    measured.set_totals(math.nan, math.nan)
    assert measured.read(5.0)["mfu"] is None and measured.energy_kwh is None
