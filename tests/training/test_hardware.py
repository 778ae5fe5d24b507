import torch

from panfm.training.hardware import GPUS, find_gpu, find_peak, measure_matrix_rate


def test_gpus_are_found_by_the_names_that_drivers_give() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert find_gpu("NVIDIA H100 PCIe") is GPUS["H100 PCIe"]
    assert find_gpu("NVIDIA A100-SXM4-80GB") is GPUS["A100"]
    assert find_gpu("NVIDIA A100 80GB PCIe") is GPUS["A100 80GB PCIe"]
    assert find_gpu("Tesla V100-SXM2-32GB") is GPUS["V100"]
    assert find_gpu("NVIDIA A10") is GPUS["A10"]


def test_a_gpu_that_is_not_known_has_no_peak() -> None:
    assert find_gpu("NVIDIA A10G") is None  # no A10
    assert find_gpu("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None  # a slice is not the card
    assert find_gpu("Quadro P600") is None


def test_half_precision_is_faster_than_fp32_in_every_row() -> None:
    assert all(gpu.half > gpu.fp32 and gpu.watts > 0 for gpu in GPUS.values())


def test_the_rate_of_a_cpu_is_measured() -> None:
    rate = measure_matrix_rate(torch.float32, torch.device("cpu"), seconds=0.05)
    assert 1e8 < rate < 1e14
    peak = find_peak(torch.device("cpu"), "fp32", seconds=0.05)
    assert peak is not None and 1e8 < peak < 1e14
