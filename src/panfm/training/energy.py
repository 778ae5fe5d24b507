"""Energy that a run takes: counters where the machine has them, a named estimate where it has not.

    GPU of this rank         ->  NVML's energy counter (millijoules), else its board's watts x time
    CPUs of this machine     ->  RAPL's counters (microjoules), else processor time x an assumed power a core
                             ->  EnergyMeter.read: joules of this rank since it was built

Counters count whatever runs on the machine. Cooling, power supplies, network and storage are in none of these.
codecarbon reads the same counters, with fourteen packages (pandas among them) and a thread of its own; here it is a
file and a function of the driver. The GPU part was never run on a GPU.
"""

import ctypes
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from panfm.distributed import get_local_rank
from panfm.training.hardware import find_device_gpu

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6
# Assumed for a core that is busy, its share of memory and board included: server processors of 64 to 96 cores are built
# for 280 to 400 W, 4 to 6 W a core, and what stands around them takes about as much again.
WATTS_PER_CORE = 10.0
LEAST_SECONDS = 5.0  # between two readings: walking over the processes costs milliseconds


@dataclass
class RaplCounter:
    """One energy counter of the kernel; it starts again at 0 after `limit`."""

    path: Path
    limit: int  # microjoules
    last: int = field(init=False)
    total: int = 0  # microjoules since it was opened

    def __post_init__(self) -> None:
        self.last = self._read()

    def read(self) -> float:
        """Joules since it was opened. It must be read before it has gone round twice: every few minutes."""
        now = self._read()
        self.total += now - self.last if now >= self.last else now + self.limit - self.last
        self.last = now
        return self.total / 1e6

    def _read(self) -> int:
        return int(self.path.read_text())


def open_rapl(root: Path = POWERCAP) -> list[RaplCounter]:
    """The counters of this machine's processor packages and their memory; []: none, or not readable for this user."""
    counters = []
    for zone in sorted(root.glob("*rapl:*")):
        with suppress(OSError, ValueError):  # readable for root only, since the counters leak what others compute
            name = (zone / "name").read_text().strip()
            if name.startswith(("package", "dram")):
                limit = int((zone / "max_energy_range_uj").read_text())
                counters.append(RaplCounter(zone / "energy_uj", limit))
    return counters


class ProcessorTime:
    """Seconds of processor time of this process and everything that it started, ended processes included."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, float], float] = {}
        self._before = 0.0
        self._before = self.read()

    def read(self) -> float:
        """Seconds since it was built."""
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.Error):  # ended meanwhile; what it had taken when last seen stays counted
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system
        return sum(self._seconds.values()) - self._before


class EnergyMeter:
    """Energy of one rank: its GPU, its own processor time or, on the first rank of a machine, the machine's CPUs."""

    def __init__(self, device: torch.device, *, powercap: Path = POWERCAP) -> None:
        self._started = self._last = time.monotonic()
        self._joules: float | None = 0.0
        self._gpu = None if device.type == "cpu" else _open_nvml(device)
        self._gpu_watts = 0.0
        sources = []
        if device.type == "cuda":
            published = find_device_gpu(device)
            if self._gpu is not None:
                sources.append("NVML counters")
            elif published is not None:
                self._gpu_watts = published.watts
                sources.append(f"estimate: {published.watts:.0f} W a GPU")
            else:
                self._joules = None
        self._rapl = open_rapl(powercap)
        self._time = None if self._rapl else ProcessorTime()
        sources.append("RAPL counters" if self._rapl else f"estimate: {WATTS_PER_CORE:.0f} W a busy core")
        self.source: str | None = None if self._joules is None else ", ".join(sources)
        """How the number comes about; None: it is not known, for want of a counter and of published watts."""
        self._is_first = get_local_rank() == 0

    def read(self, least_seconds: float) -> float | None:
        """Joules since the meter was built, read at most `least_seconds` ago; None: not known."""
        now = time.monotonic()
        if self._joules is None or now - self._last < least_seconds:
            return self._joules
        self._last = now
        joules = self._gpu_watts * (now - self._started)
        if self._gpu is not None:
            joules += self._gpu.read()
        if self._time is not None:
            joules += WATTS_PER_CORE * self._time.read()
        elif self._is_first:
            joules += sum(counter.read() for counter in self._rapl)
        self._joules = joules
        return joules


class _NvmlCounter:
    """The energy counter of one GPU, through the driver's own library."""

    def __init__(self, library: Any, handle: ctypes.c_void_p) -> None:
        self._library, self._handle = library, handle
        self._before = 0
        self._before = self._read()

    def read(self) -> float:
        """Joules since it was opened."""
        return (self._read() - self._before) / 1e3

    def _read(self) -> int:
        millijoules = ctypes.c_ulonglong()
        code = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        if code != 0:
            raise OSError(f"NVML error {code}")
        return millijoules.value


def _open_nvml(device: torch.device) -> _NvmlCounter | None:
    """The counter of `device`; None where the driver has none (before Volta, slices of a card)."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        # By its identity: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
        identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(handle)) == 0:
            return _NvmlCounter(library, handle)
    return None
