"""Energy: counters that go round, an estimate where there are none, and what a resumed run adds to."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from panfm.encoder.facts import EncoderFacts, TransformFacts, write_facts
from panfm.tracking import append_metrics
from panfm.training.energy import WATTS_PER_CORE, EnergyMeter, ProcessorTime, open_rapl
from panfm.training.meters import read_energy

CPU = torch.device("cpu")


def make_zone(root: Path, zone: str, name: str, microjoules: int, limit: int = 1_000_000) -> Path:
    """A counter as the kernel shows it."""
    folder = root / zone
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_counters_of_packages_and_memory_are_added_up_also_when_they_go_round(tmp_path: Path) -> None:
    first = make_zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = make_zone(tmp_path, "intel-rapl:0:1", "dram", 0)
    make_zone(tmp_path, "intel-rapl:0:0", "core", 0)  # is in the package already
    make_zone(tmp_path, "intel-rapl:1", "psys", 0)  # holds the package
    meter = EnergyMeter(CPU, powercap=tmp_path)
    assert meter.source == "RAPL counters"
    assert meter.read(0) == 0.0
    first.write_text("100000\n")  # over the top: 100,000 up to the limit and 100,000 more
    second.write_text("300000\n")
    assert meter.read(0) == pytest.approx(0.5)
    first.write_text("200000\n")
    assert meter.read(0) == pytest.approx(0.6)


def test_counters_that_nobody_may_read_are_none(tmp_path: Path) -> None:
    make_zone(tmp_path, "intel-rapl:0", "package-0", 5).unlink()
    assert open_rapl(tmp_path) == []
    assert open_rapl(tmp_path / "absent") == []


def test_without_counters_busy_cores_are_estimated_and_it_says_so(tmp_path: Path) -> None:
    meter = EnergyMeter(CPU, powercap=tmp_path)
    assert meter.source == f"estimate: {WATTS_PER_CORE:.0f} W a busy core"
    began = time.process_time()
    while time.process_time() - began < 0.3:
        sum(range(1000))
    joules = meter.read(0)
    assert joules is not None
    assert 0.9 * 0.3 * WATTS_PER_CORE < joules < 3 * WATTS_PER_CORE


def test_a_reading_is_taken_again_only_after_a_while(tmp_path: Path) -> None:
    counter = make_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    counter.write_text("500000\n")
    assert meter.read(least_seconds=60) == 0.0
    assert meter.read(least_seconds=0) == 0.5


def test_time_of_processes_that_ended_stays_counted() -> None:
    watch = ProcessorTime()
    code = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert watch.read() >= 0.35
    child.communicate(b"\n")
    assert watch.read() >= 0.35


def make_checkpoint(folder: Path, kwh: float | None) -> Path:
    folder.mkdir(parents=True)
    transform = TransformFacts(
        image_size=32, resize_size=37, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    facts = EncoderFacts(timm_name="x", transform=transform, samples_seen=0, step=0, code_version="0", energy_kwh=kwh)
    write_facts(folder / "encoder.json", facts)
    return folder


def test_a_resumed_run_adds_to_what_was_spent_also_on_steps_that_come_again(tmp_path: Path) -> None:
    assert read_energy(tmp_path, None) == 0.0
    checkpoint = make_checkpoint(tmp_path / "step-00000002", 1.5)
    assert read_energy(tmp_path, checkpoint) == 1.5
    append_metrics(tmp_path / "metrics.jsonl", {"step": 3, "energy_kwh": 1.75})
    assert read_energy(tmp_path, checkpoint) == 1.75


def test_what_was_never_measured_stays_unknown(tmp_path: Path) -> None:
    assert read_energy(tmp_path, make_checkpoint(tmp_path / "step-00000002", None)) is None
