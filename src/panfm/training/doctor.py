"""Is this machine ready to train? A few checks, each with what to do where it is not well. Nothing is changed.

    this process  ->  run_checks: versions, devices, threads, compiler, memory, disk, matrix rate

Everything together takes a few seconds. What ranks are to each other, and what a run needs: doctor_ranks.py.
"""

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
import torch

from panfm.training.engine import EngineConfig, compute_num_threads
from panfm.training.hardware import measure_matrix_rate

PACKAGES = ("panfm", "torch", "torchvision", "timm", "deepspeed", "webdataset", "pyarrow", "safetensors")
LEAST_DISK_GIB = 5.0
LEAST_MEMORY_GIB = 4.0
MATRIX_SECONDS = 0.3  # a precision


@dataclass(frozen=True)
class Check:
    """One finding. `way_out` says what to do and is empty where ok is True."""

    name: str
    ok: bool
    detail: str
    way_out: str = ""


def run_checks(folder: Path) -> list[Check]:
    """Look at versions, devices, threads, compiler, memory, the disk of `folder`, matrix rate; takes a few seconds."""
    return [
        check_versions(),
        check_torch_pair(),
        check_devices(),
        check_threads(),
        check_compiler(),
        check_memory(),
        check_folder(folder),
        check_matrix_rate(),
    ]


def check_versions() -> Check:
    """Python and the packages that a run stands on."""
    found = find_versions()
    missing = [name for name, version in found.items() if version is None]
    detail = ", ".join(f"{n} {v}" for n, v in found.items() if v)
    return Check("versions", not missing, detail, f"pip install {' '.join(missing)}" if missing else "")


def find_versions() -> dict[str, str | None]:
    """Versions that must be the same on all ranks, by name; None: not installed."""
    return {"Python": platform.python_version(), **{name: _find_version(name) for name in PACKAGES}}


def check_torch_pair() -> Check:
    """torch and torchvision are compiled for each other: a wrong pair fails when an operator of torchvision is used."""
    try:
        import torchvision

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5).tolist()
    except (ImportError, RuntimeError, AttributeError) as error:
        way_out = "pip install --force-reinstall torch torchvision, both in one command"
        return Check("torch and torchvision", False, str(error).splitlines()[0], way_out)
    return Check("torch and torchvision", kept == [1], "work together")


def check_devices() -> Check:
    """GPUs, if there are any; a machine without one trains on its CPU."""
    if not torch.cuda.is_available():
        cards = shutil.which("nvidia-smi") is not None
        way_out = "nvidia-smi is here but torch finds no GPU: install a CUDA build of torch that fits the driver"
        return Check("devices", not cards, "no GPU: training runs on the CPU (gloo)", way_out if cards else "")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    without_bf16 = not torch.cuda.is_bf16_supported()
    way_out = "set engine.precision=fp16: these GPUs have no bf16" if without_bf16 else ""
    return Check("devices", not without_bf16, f"{len(names)} GPUs: {', '.join(sorted(set(names)))} (NCCL)", way_out)


def check_threads() -> Check:
    """Cores, and the threads that a rank started now would take."""
    num_cores, num_threads = os.cpu_count() or 1, compute_num_threads(EngineConfig())
    asked = os.environ.get("OMP_NUM_THREADS")
    detail = f"{num_cores} cores, {num_threads} threads a rank (OMP_NUM_THREADS {asked or 'not set'})"
    too_many = num_threads > num_cores
    return Check("threads", not too_many, detail, f"set OMP_NUM_THREADS to {num_cores} or less" if too_many else "")


def check_compiler() -> Check:
    """A C++ compiler and ninja: not needed, unless engine.compile is set on a machine without a GPU."""
    tools = {name: shutil.which(name) is not None for name in ("g++", "ninja")}
    found = ", ".join(f"{name} {'present' if there else 'absent'}" for name, there in tools.items())
    return Check("compiler", True, f"{found} (needed only for engine.compile=true)")


def check_memory() -> Check:
    """Memory that is free now."""
    free = psutil.virtual_memory().available / 2**30
    ok = free >= LEAST_MEMORY_GIB
    way_out = "" if ok else f"close other programs: a small run wants {LEAST_MEMORY_GIB:.0f} GiB"
    return Check("memory", ok, f"{free:.1f} GiB free", way_out)


def check_folder(folder: Path) -> Check:
    """Whether `folder` can be written to, and what is free on its disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"panfm")
    except OSError as error:
        return Check("disk", False, f"{folder}: {error.strerror}", "change to a folder that you may write to")
    free = shutil.disk_usage(folder).free / 2**30
    ok = free >= LEAST_DISK_GIB
    way_out = "" if ok else f"free some space: shards and checkpoints want {LEAST_DISK_GIB:.0f} GiB and more"
    return Check("disk", ok, f"{folder} is writable, {free:.0f} GiB free", way_out)


def check_matrix_rate() -> Check:
    """Matrix products in bf16 against fp32: some CPUs compute bf16 in software, many times slower."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = {dtype: measure_matrix_rate(dtype, device, MATRIX_SECONDS) for dtype in (torch.float32, torch.bfloat16)}
    ratio = rates[torch.bfloat16] / rates[torch.float32]
    detail = f"fp32 {rates[torch.float32] / 1e9:.0f}, bf16 {rates[torch.bfloat16] / 1e9:.0f} GFLOP/s ({ratio:.1f} x)"
    way_out = "" if ratio >= 1 else "set engine.precision=fp32: bf16 is slower on this machine"
    return Check("matrix rate", ratio >= 1, detail, way_out)


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
