"""Interrupt training at random moments, start it again, and see whether it ends as if nothing had happened.

    python -m tests.reliability                     the long form: every kind, some minutes
    python -m tests.reliability --moments 6 --kinds kill_one,corrupt --seed 7
    python -m tests.reliability --agents            under torchrun: machines that die, join, are cut off (agents.py)

Each trial is one run of 27 steps in which one kind of fault strikes at several random moments; its end is compared with
the same run that nothing interrupted. Exit code 1 where any trial failed; its folder stays, with its log.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.reliability import agents
from tests.reliability.faults import FAULTS, NEED_TWO, Trial, mount_small_disk, unmount
from tests.reliability.lives import import_everything
from tests.reliability.setting import Setting, compare, make_setting

VERDICTS = ("bit-identical", "within tolerance", "failed")


def run_trial(kind: str, trial: Trial, most: int, whole: Path) -> tuple[int, str]:
    """Interrupt a run at up to `most` moments and let it end: (moments that came, how it ended)."""
    count = 0
    try:
        while count < most:
            problem = FAULTS[kind](trial)
            if problem is None:
                break
            count += 1
            if problem:
                return count, problem
        life = trial.start()
        codes = life.wait()
        if set(codes) != {0}:
            return count, f"codes {codes} at the end"
        return count, trial.check(life) or compare(trial.out, whole)
    except TimeoutError as error:
        return max(count, 1), str(error)


def run_trials(
    setting: Setting, folder: Path, kinds: list[str], num_moments: int, most_a_run: int, seed: int
) -> Counter[tuple[str, str]]:
    """Trials of all kinds in turn until so many moments came: (kind, verdict) -> moments."""
    counts: Counter[tuple[str, str]] = Counter()
    wholes: dict[int, Path] = {}
    number = 0
    while sum(counts.values()) < num_moments:
        kind = kinds[number % len(kinds)]
        world_size = 2 if kind in NEED_TWO or (number // len(kinds) + number) % 2 == 0 else 1
        rng = random.Random(f"{seed}/{number}")
        trial = Trial(setting, folder / f"{number:02d}-{kind}", rng, world_size)
        if world_size not in wholes:
            wholes[world_size] = folder / f"whole-{world_size}"
            codes = Trial(setting, wholes[world_size], rng, world_size).start().wait()
            assert set(codes) == {0}, wholes[world_size].with_suffix(".log").read_text()
        has_disk = kind == "disk_full" and mount_small_disk(trial.out)
        number += 1
        if kind == "disk_full" and not has_disk:
            print("disk_full: no tmpfs may be mounted here; failed_write stands in for it", flush=True)
            kinds = [other for other in kinds if other != kind]
            continue
        began = time.monotonic()
        most = min(most_a_run, num_moments - sum(counts.values()))
        count, verdict = run_trial(kind, trial, most, wholes[world_size])
        counts[kind, verdict if verdict in VERDICTS else "failed"] += count
        seconds = time.monotonic() - began
        print(f"{trial.out.name}, ranks {world_size}: {count} moments, {verdict} ({seconds:.0f} s)", flush=True)
        if has_disk:
            unmount(trial.out)
        if verdict in VERDICTS:
            shutil.rmtree(trial.out)
    return counts


def print_counts(counts: Counter[tuple[str, str]]) -> int:
    """The table; returns the number of moments whose run failed."""
    print(f"\n{'moments':28}" + "".join(f"{verdict:>18}" for verdict in VERDICTS))
    for kind in dict.fromkeys(kind for kind, _ in counts):
        print(f"{kind:28}" + "".join(f"{counts[kind, verdict]:>18}" for verdict in VERDICTS))
    sums = [sum(count for (_, was), count in counts.items() if was == verdict) for verdict in VERDICTS]
    print(f"{f'all {sum(sums)}':28}" + "".join(f"{total:>18}" for total in sums), flush=True)
    return sums[-1]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=60, help="random moments in total (default: 60)")
    parser.add_argument(
        "--kinds",
        default=None,
        help=f"of {', '.join(FAULTS)}; with --agents of {', '.join(agents.TRIALS)}; default: all",
    )
    parser.add_argument("--a-run", type=int, default=4, help="moments at most in one run (default: 4)")
    parser.add_argument("--seed", type=int, default=None, help="draws the moments; printed where none is given")
    parser.add_argument("--out", type=Path, default=None, help="folder; a temporary one, removed where nothing failed")
    parser.add_argument("--agents", action="store_true", help="the trials with torchrun instead")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10_000) if options.seed is None else options.seed
    folder = (options.out or Path(tempfile.mkdtemp(prefix="panfm-reliability-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seed {seed}, folder {folder}", flush=True)
    setting = make_setting(folder / "archive")
    import_everything()
    if options.agents:
        kinds = list(agents.TRIALS) if options.kinds is None else options.kinds.split(",")
        counts = agents.run_trials(setting, folder, kinds, seed)
    else:
        kinds = list(FAULTS) if options.kinds is None else options.kinds.split(",")
        counts = run_trials(setting, folder, kinds, options.moments, options.a_run, seed)
    num_failed = print_counts(counts)
    if not num_failed and options.out is None:
        shutil.rmtree(folder)
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
