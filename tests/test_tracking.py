import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from panfm.errors import UserError
from panfm.tracking import (
    append_metrics,
    compute_running_mean,
    compute_ticks,
    describe_record,
    draw_curve,
    read_metrics,
    trim_metrics,
    write_loss_curve,
)


def test_metrics_are_json_lines_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1, "loss": 0.5, "grad_norm": float("nan")})
    append_metrics(path, {"step": 2, "loss": float("inf")})
    assert path.read_text() == '{"step": 1, "loss": 0.5, "grad_norm": null}\n{"step": 2, "loss": null}\n'


def test_a_record_is_shown_with_a_dash_for_what_is_not_known() -> None:
    shown = describe_record(
        {"loss": 0.5, "lr": 1e-3, "images_per_second": 12.34, "mfu": None, "data_wait_share": 0.021}
    )
    assert (shown["loss"], shown["lr"], shown["images/s"]) == ("0.5000", "1.00e-03", "12.3")
    assert (shown["MFU"], shown["data wait"], shown["memory"]) == ("-", "2.1%", "-")


def test_a_torn_last_line_is_left_out_and_a_torn_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_metrics(path)


def test_trim_drops_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, {"step": step})
    trim_metrics(path, 2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    trim_metrics(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_ticks_are_round_and_inside() -> None:
    assert compute_ticks(0.13, 0.98) == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert compute_ticks(0, 12_000) == [0, 2000, 4000, 6000, 8000, 10_000, 12_000]
    assert compute_ticks(3.0, 3.0) == [3.0]


def test_running_mean() -> None:
    assert compute_running_mean([1.0, 3.0, 5.0, 1.0], 2) == [1.0, 2.0, 4.0, 3.0]


def test_the_curve_falls_where_the_loss_falls(tmp_path: Path) -> None:
    image = draw_curve([0, 50, 100], [2.0, 1.0, 0.0], title="falling")
    dark = [
        (across, down)
        for across in range(image.width)
        for down in range(image.height)
        if image.getpixel((across, down)) == (0x1F, 0x4E, 0x9C)
    ]
    left = [down for across, down in dark if across < 100]
    right = [down for across, down in dark if across > image.width - 60]
    assert left and right and max(left) < min(right)  # rows count downwards

    metrics = tmp_path / "metrics.jsonl"
    append_metrics(metrics, {"step": 1, "samples_seen": 8, "loss": 1.0})
    write_loss_curve(metrics, tmp_path / "loss.png", title="one point")
    assert not (tmp_path / "loss.png").exists()
    append_metrics(metrics, {"step": 2, "samples_seen": 16, "loss": 0.5})
    write_loss_curve(metrics, tmp_path / "loss.png", title="two points")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (900, 480)


@pytest.mark.slow
def test_wandb_offline_stays_inside_the_run_folder(tmp_path: Path) -> None:
    home, run, work = tmp_path / "home", tmp_path / "run", tmp_path / "work"
    for folder in (home, run, work):
        folder.mkdir()
    code = (
        "from pathlib import Path; from panfm.tracking import TrackingConfig, open_wandb\n"
        "from PIL import Image\n"
        f"with open_wandb(TrackingConfig(), Path({str(run)!r}), {{'a': 1}}) as log:\n"
        "    log({'step': 2, 'loss': 0.5, 'pictures': Image.new('RGB', (4, 4))})\n"
        "    log({'step': 1, 'loss': 0.6})\n"  # after a rollback
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "XDG"))}
    environment |= {"HOME": str(home), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True, check=True
    )
    (session,) = (run / "wandb").glob("offline-run-*")
    assert len(list((session / "files" / "media").rglob("*.png"))) == 1
    assert [str(path) for path in (*home.rglob("*"), *work.rglob("*"))] == []
    assert "loss" not in result.stdout and "step" not in result.stderr  # no record was refused for going back
