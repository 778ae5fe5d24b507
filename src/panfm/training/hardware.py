"""What a device could do at best: its peak rate of matrix products, and the power that it is built for.

    GPU   ->  published figures, by the name that the driver gives it   ->  operations a second, watts, GiB
    CPU   ->  matrix products, measured here                            ->  operations a second
    what a run holds of it                                              ->  GiB

MFU, predicted hours and estimated energy stand on these numbers. A device that is in no table has none: null, not a
guess. The rate of a CPU is measured, because its datasheet says nothing about bf16 in software or a shared machine.
"""

import time
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

Precision = Literal["bf16", "fp16", "fp32"]
MATRIX_SIZE = 1024  # rows and columns of the matrices that are multiplied; smaller ones stay below the peak
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Gpu:
    """Published figures of one model: dense matrix products (no sparsity), fp32 without TF32."""

    half: float  # operations a second in bf16 and fp16
    fp32: float  # operations a second
    watts: float  # limit of the board
    memory: int  # GiB
    has_bf16: bool = True


# NVIDIA's datasheets, half the rates printed "with sparsity". The first name that is in the driver's name counts, so
# that longer names stand before shorter ones. A "MIG" slice of a card is none of these.
GPUS: dict[str, Gpu] = {
    "B200": Gpu(2250e12, 75e12, 1000, 180),
    "H200": Gpu(989e12, 67e12, 700, 141),
    "H100 PCIe": Gpu(756e12, 51e12, 350, 80),
    "H100 NVL": Gpu(835e12, 60e12, 400, 94),
    "H100": Gpu(989e12, 67e12, 700, 80),  # SXM
    "A100-PCIE-40GB": Gpu(312e12, 19.5e12, 250, 40),
    "A100 80GB PCIe": Gpu(312e12, 19.5e12, 300, 80),
    "A100-SXM4-40GB": Gpu(312e12, 19.5e12, 400, 40),
    "A100": Gpu(312e12, 19.5e12, 400, 80),  # SXM
    "L40S": Gpu(362e12, 91.6e12, 350, 48),
    "A40": Gpu(149.7e12, 37.4e12, 300, 48),
    "A30": Gpu(165e12, 10.3e12, 165, 24),
    "A10": Gpu(125e12, 31.2e12, 150, 24),
    "V100-PCIE": Gpu(112e12, 14e12, 250, 16, has_bf16=False),
    "V100": Gpu(125e12, 15.7e12, 300, 32, has_bf16=False),  # SXM2
    "T4": Gpu(65e12, 8.1e12, 70, 16, has_bf16=False),
}


def find_gpu(name: str) -> Gpu | None:
    """The figures of a GPU by the name that torch gives it ("NVIDIA H100 80GB HBM3"); None: not known."""
    if "MIG" in name:
        return None
    words = name.replace("-", " ").split()
    for known, gpu in GPUS.items():
        wanted = known.replace("-", " ").split()
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return gpu
    return None


def find_device_gpu(device: torch.device) -> Gpu | None:
    """The figures of the GPU that `device` is; None for a CPU and for a GPU that is not known."""
    return find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def find_peak(device: torch.device, precision: Precision, seconds: float = 0.2) -> float | None:
    """Operations a second of `device` at best: published for a GPU (None: not known), measured for a CPU.

    seconds: how long a CPU is measured. Ranks that share a machine should measure at the same time: what they reach
    together is what the machine has.
    """
    if device.type == "cpu":
        return measure_matrix_rate(DTYPES[precision], device, seconds)
    gpu = find_device_gpu(device)
    if gpu is None or (precision == "bf16" and not gpu.has_bf16):
        return None
    return gpu.fp32 if precision == "fp32" else gpu.half


def measure_matrix_rate(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Operations a second of square matrix products: of the fastest of those that fit into `seconds`.

    The fastest, not the mean: other work on the machine must not pass for a small peak.
    """
    left, right = torch.ones(2, MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=device)
    (left @ right).sum().item()
    started, fastest = time.perf_counter(), float("inf")
    while time.perf_counter() - started < seconds or fastest == float("inf"):
        began = time.perf_counter()
        (left @ right)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * MATRIX_SIZE**3 / fastest


def measure_memory(device: torch.device) -> float:
    """Memory of this rank in GiB: the most that tensors took on a GPU, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30
