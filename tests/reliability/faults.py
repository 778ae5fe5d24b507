"""What can befall a run, one function a kind: begin a life, wait for a random moment, do it, see how the life ends.

    Trial  ->  FAULTS[kind](trial)  ->  None: the run was over before;  "": as it should be;  else what was wrong

After each, the same command goes on (the next life of the trial); the last life of a trial is left alone.
"""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from panfm.training.checkpoint import list_checkpoints
from panfm.training.endings import EXIT_CODES, EXIT_HUNG, EXIT_LOST
from tests.reliability.lives import Life, read_step
from tests.reliability.setting import Setting

INTERRUPTED, UNREADABLE, USER = EXIT_CODES["interrupted"], EXIT_CODES["unreadable"], 2
HANG_SECONDS = 10.0
DISK = "64m"  # of the small disk: some checkpoints


@dataclass
class Trial:
    """One run with its lives."""

    setting: Setting
    out: Path
    rng: Random
    world_size: int
    overrides: tuple[str, ...] = ()
    awaited: str = ""  # what the next life must print
    problems: list[str] = field(default_factory=list)

    def start(self, *overrides: str, environment: dict[str, str] | None = None) -> Life:
        """The same command again."""
        overrides = (*self.overrides, *overrides)
        return Life(self.setting, self.out, *overrides, world_size=self.world_size, environment=environment)

    def check(self, life: Life) -> str:
        """Whether a life printed what was awaited of it."""
        awaited, self.awaited = self.awaited, ""
        return "" if awaited in life.read_log() else f"it did not print {awaited!r}"

    def draw_rank(self) -> int:
        """One rank."""
        return self.rng.randrange(self.world_size)


def kill_one(trial: Trial) -> str | None:
    """SIGKILL to one rank: the others say so in a line, and end."""
    life = trial.start()
    if not life.wait_for_moment(trial.rng):
        return None
    victim = trial.draw_rank()
    life.kill(signal.SIGKILL, victim)
    codes = life.wait()
    others = [code for rank, code in enumerate(codes) if rank != victim]
    if not set(others) <= {EXIT_LOST, 0} or life.read_log().count("another rank ended") != others.count(EXIT_LOST):
        return f"codes {codes}, rank {victim} killed"
    return expect_no_traceback(life)


def kill_all(trial: Trial) -> str | None:
    """SIGKILL to all ranks, as when the machine dies."""
    life = trial.start()
    if not life.wait_for_moment(trial.rng):
        return None
    life.kill(signal.SIGKILL)
    life.wait()
    return trial.check(life)


def terminate(trial: Trial) -> str | None:
    """SIGTERM or SIGUSR1 to some of the ranks: all of them finish the step, save, and end with 75."""
    life = trial.start()
    if not life.wait_for_moment(trial.rng):
        return None
    ranks = trial.rng.sample(range(trial.world_size), trial.rng.randint(1, trial.world_size))
    life.kill(trial.rng.choice([signal.SIGTERM, signal.SIGUSR1]), *ranks)
    codes = life.wait()
    if set(codes) == {0}:  # it was in its last step
        return ""
    saved, step = list_checkpoints(trial.out)[-1].name, read_step(trial.out)
    if set(codes) != {INTERRUPTED} or saved != f"step-{step:08d}":
        return f"codes {codes}, signals to {ranks}, {step} steps done, saved {saved}"
    return expect_no_traceback(life)


def disk_full(trial: Trial) -> str | None:
    """The disk of the run folder is full, as by somebody else's file; then it is not."""
    life = trial.start()
    if not life.wait_for_moment(trial.rng):
        return None
    ballast = trial.out / "ballast"
    fill(ballast)
    codes = life.wait()
    ballast.unlink()
    if set(codes) == {0}:
        return ""
    if set(codes) != {USER} or not has_one_line(life):
        return f"codes {codes}, and not one line about it"
    return expect_no_traceback(life)


def failed_write(trial: Trial) -> str | None:
    """No file may grow beyond some 100 kB any more (RLIMIT_FSIZE, set from outside): a checkpoint fails midway."""
    life = trial.start()
    if not life.wait_for_moment(trial.rng):
        return None
    life.has_rank()
    for rank, pid in life.pids.items():
        if rank not in life.codes:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    codes = life.wait()
    if set(codes) == {0}:
        return ""
    if set(codes) != {USER} or not has_one_line(life):
        return f"codes {codes}, and not one line about it"
    return expect_no_traceback(life)


def corrupt(trial: Trial) -> str | None:
    """All ranks are killed, and a file of the newest checkpoint is cut, has a bit flipped, or is gone."""
    problem = kill_all(trial)
    folders = list_checkpoints(trial.out)
    if problem is None or problem or not folders:
        return problem
    files = sorted(path for path in folders[-1].rglob("*") if path.is_file() and path.name != "manifest.json")
    victim, how = trial.rng.choice(files), trial.rng.choice(["cut", "flipped", "gone"])
    data = bytearray(victim.read_bytes())
    if how == "gone":
        victim.unlink()
    elif how == "cut":
        os.truncate(victim, trial.rng.randrange(len(data)))
    else:
        data[trial.rng.randrange(len(data))] ^= 1 << trial.rng.randrange(8)
        victim.write_bytes(data)
    trial.awaited = f"passing over {folders[-1].name}"
    return ""


def hang_stopped(trial: Trial) -> str | None:
    """One rank is stopped (SIGSTOP): it can say nothing; the others say that it does not."""
    life = trial.start(f"monitor.hang_seconds={HANG_SECONDS}")
    if not life.wait_for_moment(trial.rng):
        return None
    victim = trial.draw_rank()
    life.kill(signal.SIGSTOP, victim)
    life.wait_for(lambda: life.has_rank() and len(life.codes) >= trial.world_size - 1)
    life.kill(signal.SIGKILL)
    codes = life.wait()
    others = [code for rank, code in enumerate(codes) if rank != victim]
    if set(others) == {0}:
        return ""
    if set(others) != {EXIT_HUNG} or f"no word from rank {victim}" not in life.read_log():
        return f"codes {codes}, rank {victim} stopped"
    return ""


def hang_asleep(trial: Trial) -> str | None:
    """One rank sleeps for ever in its own code: every rank leaves its stacks, and the lines name that rank."""
    step = read_step(trial.out) + trial.rng.randint(2, 8)
    victim = trial.draw_rank()
    life = trial.start(f"monitor.hang_seconds={HANG_SECONDS}", environment={"PANFM_TEST_HANG": f"{victim}:{step}"})
    codes = life.wait()
    if set(codes) == {0}:
        return None
    line = f"rank {victim} of {trial.world_size}, step {step + 1}, not done after"
    said = life.read_log()
    if set(codes) != {EXIT_HUNG} or f"hung: {line}" not in said or "does not wait for other ranks" not in said:
        return f"codes {codes}, rank {victim} hangs at step {step + 1}"
    stacks = [(trial.out / f"stacks-{rank}.txt").read_text() for rank in range(trial.world_size)]
    return "" if all("most recent call first" in stack for stack in stacks) else "a rank left no stacks"


def shard_cut(trial: Trial) -> str | None:
    """The shard is truncated while it is read: all ranks save, and one line says what is missing."""
    life = trial.start()
    if not life.wait_for_moment(trial.rng):
        return None
    size = trial.setting.shard.stat().st_size
    os.truncate(trial.setting.shard, trial.rng.randrange(size // 2))
    codes = life.wait()
    trial.setting.restore_shard()
    if set(codes) == {0}:
        return ""
    if set(codes) != {UNREADABLE} or str(trial.setting.shard) not in life.read_log():
        return f"codes {codes}"
    return expect_no_traceback(life)


def shard_gone(trial: Trial) -> str | None:
    """All ranks are killed, and the shard is deleted before the next start, which says so."""
    problem = kill_all(trial)
    if problem is None or problem:
        return problem
    trial.setting.shard.unlink()
    life = trial.start()
    codes = life.wait()
    trial.setting.restore_shard()
    if not set(codes) <= {USER, UNREADABLE} or str(trial.setting.shard) not in life.read_log():
        return f"codes {codes} without the shard"
    return expect_no_traceback(life)


FAULTS: dict[str, Callable[[Trial], str | None]] = {
    "kill_one": kill_one,
    "kill_all": kill_all,
    "terminate": terminate,
    "corrupt": corrupt,
    "disk_full": disk_full,
    "failed_write": failed_write,
    "shard_cut": shard_cut,
    "shard_gone": shard_gone,
    "hang_stopped": hang_stopped,
    "hang_asleep": hang_asleep,
}
NEED_TWO = ("kill_one", "hang_stopped")  # ranks: nobody is left to say something else


def expect_no_traceback(life: Life) -> str:
    """A line is for users; a traceback is for us."""
    return "a traceback" if "Traceback (most recent call last)" in life.read_log() else ""


def has_one_line(life: Life) -> bool:
    """Whether rank 0 spoke once, for all; the others do where nobody ends them, as torchrun does."""
    said = [line for line in life.read_log().splitlines() if line.startswith("panfm: ")]
    return len([line for line in said if not line.startswith("panfm: rank")]) == 1


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def mount_small_disk(folder: Path) -> bool:
    """Mount a tmpfs of DISK bytes over `folder`; False where this may not be done."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    """Take it away again."""
    subprocess.run(["umount", str(folder)], check=True)
