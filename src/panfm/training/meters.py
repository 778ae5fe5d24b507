"""What a run's speed and energy come to, for its records: MFU, kilowatt-hours and CO2.

    counted operations of a sample (flops.py), peak of all ranks (hardware.py), images a second  ->  mfu
    joules of every rank (energy.py), what earlier parts of the run took                         ->  energy_kwh, co2_kg
    samples, seconds, seconds of waiting since the last record  --SpeedWindow-->  images a second, data_wait_share

Every rank has Meters; only rank 0's sums are written down. What is not known is None.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from panfm.distributed import all_reduce_mean, barrier, get_world_size, is_main
from panfm.encoder.facts import read_facts
from panfm.tracking import read_metrics
from panfm.training.energy import JOULES_PER_KWH, LEAST_SECONDS, EnergyMeter
from panfm.training.flops import compute_run_cost
from panfm.training.hardware import find_peak

if TYPE_CHECKING:
    from panfm.training.plan import PretrainConfig

# A CPU's peak is measured where the run starts, when the machine is often busy with other things (once it came out at
# two fifths of the real one), and a few times more in the first minute; the best counts.
FIRST_SECONDS = 60.0
AGAIN_SECONDS = 0.02


class Meters:
    """Speed beside what is possible, and energy. Every rank must build it at the same time."""

    def __init__(self, config: "PretrainConfig", device: torch.device, *, kwh_before: float | None = 0.0) -> None:
        """kwh_before: what earlier parts of this run took, on rank 0; None: not known."""
        self.sample_flops = compute_run_cost(config).sample_flops if is_main() else 0.0
        self._device, self._precision = device, config.engine.precision
        barrier()  # ranks measure their peak together: what they reach beside each other is what the machine has
        self._peak_here = find_peak(device, self._precision)
        self._peak_at = self._started = time.monotonic()
        self.hardware = f"{get_world_size()} x {_name(device)}"
        self.peak: float | None = sum_over_ranks(self._peak_here, device)
        """Operations a second of all ranks together, at best."""
        self._meter = EnergyMeter(device)
        self._grams_per_kwh = config.tracking.co2_g_per_kwh
        self._kwh_before = kwh_before
        self._joules: float | None = 0.0

    def measure(self, *, now: bool = False) -> tuple[float, float]:
        """Joules of this rank so far and its peak, to be summed over ranks; NaN: not known.

        now: joules that are not a few seconds old.
        """
        joules = self._meter.read(0.0 if now else LEAST_SECONDS)
        return math.nan if joules is None else joules, math.nan if self._peak_here is None else self._peak_here

    def set_totals(self, joules: float, peak: float) -> None:
        """Take the sums over ranks of what they measured. To be called by all of them at the same time."""
        self._joules = joules if math.isfinite(joules) else None
        self.peak = peak if math.isfinite(peak) else None
        now = time.monotonic()
        if self._device.type == "cpu" and now - self._peak_at >= LEAST_SECONDS and now - self._started < FIRST_SECONDS:
            again = find_peak(self._device, self._precision, AGAIN_SECONDS)
            self._peak_here, self._peak_at = max(self._peak_here or 0.0, again or 0.0), now

    @property
    def energy_kwh(self) -> float | None:
        """Energy of the whole run, earlier parts and thrown away steps included; None: not known."""
        if self._joules is None or self._kwh_before is None:
            return None
        return self._kwh_before + self._joules / JOULES_PER_KWH

    @property
    def source(self) -> str | None:
        """How the energy was got: counters, or an estimate and what it assumes."""
        return self._meter.source

    def read(self, images_per_second: float) -> dict[str, float | str | None]:
        """What a record says: the share of the peak (`mfu`), energy and how it was got, CO2.

        A share above 1 is none: the peak was measured while other work had the cores.
        """
        kwh = self.energy_kwh
        share = math.inf if self.peak is None else self.sample_flops * images_per_second / self.peak
        return {
            "mfu": share if share <= 1 else None,
            "energy_kwh": kwh,
            "energy_source": self.source,
            "co2_kg": None if kwh is None or self._grams_per_kwh is None else kwh * self._grams_per_kwh / 1e3,
        }


class SpeedWindow:
    """Between two records: the samples of all ranks, and how long this one took and waited for its data."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._started, self._waited, self.num_samples = time.monotonic(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what is inside as waiting for data."""
        asked = time.monotonic()
        yield
        self._waited += time.monotonic() - asked

    def read(self) -> tuple[float, float]:
        """Images a second and the share of the time that was waited; the next window begins."""
        seconds = time.monotonic() - self._started
        speed, share = self.num_samples / seconds, self._waited / seconds
        self._begin()
        return speed, share


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU process with {threads} thread{'s' if threads > 1 else ''}"


def read_energy(run: Path, checkpoint: Path | None) -> float | None:
    """Kilowatt-hours that a run folder has cost so far: its last record, steps that come again included.

    checkpoint: the one that the run goes on from, where its records are gone; None: the run begins.
    """
    known = [record.get("energy_kwh") for record in read_metrics(run / "metrics.jsonl")[-1:]]
    if checkpoint is not None:
        known.append(read_facts(checkpoint / "encoder.json").energy_kwh)
    values = [value for value in known if value is not None]
    return max(values) if values else (0.0 if checkpoint is None else None)


def sum_over_ranks(value: float | None, device: torch.device) -> float | None:
    """Sum over ranks of a number; None where a rank has none. Every rank must call it."""
    total = all_reduce_mean(torch.tensor(math.nan if value is None else value, dtype=torch.float64, device=device))
    return float(total) * get_world_size() if math.isfinite(float(total)) else None
