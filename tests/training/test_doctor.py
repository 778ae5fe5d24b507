from pathlib import Path

import torch

from panfm.training.doctor import check_folder, measure_matrix_rate, run_checks


def test_every_check_says_something_and_a_failed_one_says_what_to_do() -> None:
    checks = run_checks()
    assert [check.name for check in checks[:3]] == ["versions", "torch and torchvision", "devices"]
    for check in checks:
        assert check.detail
        assert check.ok == (check.way_out == "")
    assert checks[0].ok and f"torch {torch.__version__.split('+')[0]}" in checks[0].detail
    assert checks[1].ok


def test_a_folder_that_cannot_be_written_is_found() -> None:
    check = check_folder(Path("/proc"))
    assert not check.ok
    assert "change to a folder" in check.way_out


def test_the_matrix_rate_is_plausible() -> None:
    rate = measure_matrix_rate(torch.float32, torch.device("cpu"))
    assert 1e8 < rate < 1e14
