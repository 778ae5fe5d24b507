"""A build that is killed, wherever that is, goes on to the same bytes; so does one whose cluster loses a worker."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from panfm.errors import UserError
from panfm.shards.index import open_shard_set
from panfm.shards.privacy import create_key
from panfm.shards.writer import BuildOptions, build_shards

# One process that forks a build for every kill: starting Python anew would take longer than the builds.
FORKING = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import pandas, pyarrow.parquet, pyarrow.compute  # imported once here, not in each build by pyarrow
from panfm.shards.cards import SourceCard
from panfm.shards.writer import BuildOptions, build_shards

card, root, base, how, samples_per_shard = sys.argv[1:]
card, root, base = SourceCard.model_validate_json(card), Path(root), Path(base)
options = BuildOptions(samples_per_shard=int(samples_per_shard))

def fork(out, kill_after=None):
    child = os.fork()
    if child:
        return child
    if kill_after is not None:  # renames and removals are the moments at which the state on disk changes
        done = [0]
        def count(function):
            def counted(*arguments, **named):
                function(*arguments, **named)
                done[0] += 1
                if done[0] == kill_after:
                    os.kill(os.getpid(), signal.SIGKILL)
            return counted
        os.replace, os.unlink = count(os.replace), count(os.unlink)
    build_shards(card, root, out, options=options)
    os._exit(0)

def read(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

def finish(child):
    return os.waitpid(child, 0)[1]

start = time.monotonic()
assert finish(fork(base / "whole")) == 0
seconds = time.monotonic() - start
whole = read(base / "whole")
assert "index.json" in whole
out, kills, states = base / "out", 0, set()

def resume():
    global kills
    kills += 1
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} if out.exists() else set()
    states.add("index" if "index.json" in names else "samples" if "samples.parquet" in names else
               "shards" if any(name.endswith(".tar") for name in names) else "plan" if names else "nothing")
    assert finish(fork(out)) == 0
    assert read(out) == whole, sorted(set(read(out)) ^ set(whole))
    shutil.rmtree(out)

if how == "moments":
    rng = random.Random(0)
    while kills < 20:
        child = fork(out)
        time.sleep(seconds * (kills + rng.random()) / 20)
        os.kill(child, signal.SIGKILL)
        if finish(child) == 0:  # it was faster than the first time
            seconds *= 0.9
            shutil.rmtree(out)
            continue
        resume()
else:
    while True:
        child = fork(out, kill_after=kills + 1)
        if finish(child) == 0:
            break
        resume()
print(json.dumps([kills, sorted(states)]))
"""


def read_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def kill_again_and_again(archive: Any, tmp_path: Path, how: str, samples_per_shard: int) -> tuple[int, set[str]]:
    arguments = [archive.card.model_dump_json(), str(archive.root), str(tmp_path), how, str(samples_per_shard)]
    answer = subprocess.run([sys.executable, "-c", FORKING, *arguments], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    kills, states = json.loads(answer.stdout)
    return kills, set(states)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    kills, states = kill_again_and_again(make_archive(30, size=(400, 300)), tmp_path, "moments", 3)
    assert kills == 20 and {"nothing", "shards"} & states


@pytest.mark.slow
def test_killed_after_every_change_on_disk(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(8)
    (archive.root / "images/photo7.jpg").unlink()
    archive.rows.pop()  # else more than the limit is rejected
    archive.write_table()
    kills, states = kill_again_and_again(archive, tmp_path, "changes", 3)
    # 3 tars, their rows, samples, quarantine and index; then the rows of .build are removed
    assert kills >= 3 + 3 + 3 + 3 and states >= {"shards", "samples", "index"}


@pytest.mark.slow
def test_killed_while_slides_are_planned(make_slides: Callable[..., Any], tmp_path: Path) -> None:
    kills, states = kill_again_and_again(make_slides((448, 224), (336, 224)), tmp_path, "changes", 8)
    # 2 overlays and plans, 2 shards and their rows, samples, quarantine and index
    assert kills >= 2 * 2 + 2 * 2 + 3 and states >= {"plan", "shards", "samples"}


# ------------------------------------------------------------------------------------------------ a cluster

ON_A_CLUSTER = """
import json, os, signal, sys, threading, time
from pathlib import Path
from distributed import LocalCluster
from panfm.shards.cards import SourceCard
from panfm.shards.writer import BuildOptions, build_shards

def kill_one(cluster, out):
    while len(list((out / ".build").glob("*.parquet"))) < 2:
        time.sleep(0.002)
    os.kill(cluster.workers[0].pid, signal.SIGKILL)

if __name__ == "__main__":
    card, (root, out, key) = SourceCard.model_validate_json(sys.argv[1]), map(Path, sys.argv[2:5])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pids = {worker.pid for worker in cluster.workers.values()}
        killer = threading.Thread(target=kill_one, daemon=True, args=(cluster, out))
        killer.start()
        options = BuildOptions(samples_per_shard=2, executor="dask", scheduler=cluster.scheduler_address, key_file=key)
        report = build_shards(card, root, out, options=options)
        killer.join()
        lost = pids - {worker.pid for worker in cluster.workers.values()}
    print(json.dumps([report.num_samples, len(lost)]))
"""


@pytest.mark.slow
def test_a_cluster_loses_a_worker(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(30, size=(2000, 1500))
    archive.values["identifiers"] = "private"
    key = tmp_path / "key"
    secret = create_key(key, shard_folder=tmp_path / "cluster").secret.hex()
    script = tmp_path / "cluster.py"  # a file: its workers are spawned, and import it
    script.write_text(ON_A_CLUSTER)
    command = [
        sys.executable,
        str(script),
        archive.card.model_dump_json(),
        *map(str, (archive.root, tmp_path / "cluster", key)),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == [30, 1]
    assert secret not in answer.stdout + answer.stderr and "P1" not in answer.stderr
    build_shards(
        archive.card, archive.root, tmp_path / "local", options=BuildOptions(samples_per_shard=2, key_file=key)
    )
    assert read_folder(tmp_path / "cluster") == read_folder(tmp_path / "local")
    assert open_shard_set(tmp_path / "cluster").num_samples == 30


def test_a_cluster_that_is_not_there(make_archive: Callable[..., Any], tmp_path: Path) -> None:
    archive = make_archive(3)
    with pytest.raises(UserError, match=r"executor: dask needs the scheduler of a running cluster; give --scheduler"):
        build_shards(archive.card, archive.root, tmp_path / "s", options=BuildOptions(executor="dask"))
