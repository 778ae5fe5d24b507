"""Runs under real torchrun agents, started by launch/torchrun.sh: one machine, and several of which one is lost.

    one machine     SIGKILL to torchrun; SIGTERM or SIGUSR1 to the script, or to all processes of the job at once
    two machines    NNODES=1:2; the second one's agent is killed, or its network goes away, mid-step and mid-save: the
                    first goes on alone, the second comes back and joins, and in the end no sample is lost or repeated
    three machines  the same with NNODES=1:3: the second one is killed mid-step, the third one cut off mid-save

Each machine is a network namespace with a virtual cable to a switch, where this may be set up (root); else all are
processes on loopback, and to be cut off means that all processes of a machine are stopped (SIGSTOP).
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from panfm.files import CHECKOUT, read_json
from panfm.training.checkpoint import list_checkpoints
from panfm.training.endings import EXIT_CODES
from tests.reliability.faults import Trial
from tests.reliability.lives import Life, read_step
from tests.reliability.setting import Setting, compare

PATIENCE = 400.0  # seconds for whatever is awaited: a start under torchrun may take a minute on two busy cores
RENDEZVOUS = "keep_alive_interval=2,keep_alive_max_attempt=5,last_call_timeout=5"
ELASTIC = (
    "encoder.drop_path_rate=0",  # it draws by rank
    "engine.global_batch_size=12",  # in micro batches of 2, so that it divides for one, two and three ranks
    "engine.micro_batch_size=2",
    "schedule.total_samples=1800",  # 150 steps, so that a lost machine has time to come back
    "monitor.hang_seconds=25",
)
STEP_SECONDS = "0.2"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # where torchrun is


class Network:
    """A namespace a machine, each with a cable to a switch in one more; without the right to make them, loopback."""

    def __init__(self, num_machines: int) -> None:
        switch, *self.names = (f"panfm{os.getpid()}{end}" for end in "sabc"[: num_machines + 1])
        self.ends = [f"pf{os.getpid() % 100_000}{end}" for end in "abc"[:num_machines]]
        self._switch = switch
        commands = [
            *(f"ip netns add {name}" for name in (switch, *self.names)),
            f"ip -n {switch} link add bridge0 type bridge",
            f"ip -n {switch} link set bridge0 up",
        ]
        addresses = [f"10.77.0.{number}" for number in range(1, num_machines + 1)]
        for name, end, address in zip(self.names, self.ends, addresses, strict=True):
            commands += [
                f"ip link add {end} netns {name} type veth peer name {end}s netns {switch}",
                f"ip -n {switch} link set {end}s master bridge0 up",
                f"ip -n {name} link set lo up",
                f"ip -n {name} addr add {address}/24 dev {end}",
                f"ip -n {name} link set {end} up",
            ]
        self.has_namespaces = all(run_quietly(command) for command in commands)
        self.addresses = addresses if self.has_namespaces else ["127.0.0.1"] * num_machines
        if not self.has_namespaces:
            self.close()

    def set_cable(self, machine: int, state: str) -> None:
        """Pull or plug a machine's cable: "down" or "up"."""
        assert run_quietly(f"ip -n {self.names[machine]} link set {self.ends[machine]} {state}")

    def close(self) -> None:
        """Take the namespaces away, and the cables with them."""
        for name in (self._switch, *self.names):
            run_quietly(f"ip netns del {name}")


class Agent:
    """launch/torchrun.sh, on one of two machines or alone."""

    def __init__(
        self,
        setting: Setting,
        out: Path,
        log: Path,
        *overrides: str,
        ranks: int,
        environment: dict[str, str] | None = None,
        namespace: str | None = None,
    ) -> None:
        self.log = log
        self.log_start = log.stat().st_size if log.exists() else 0
        before = [] if namespace is None else ["ip", "netns", "exec", namespace]
        script = [str(CHECKOUT / "launch" / "torchrun.sh"), str(setting.config), *overrides, "--out", str(out)]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*before, "bash", *script],
                env={**os.environ, "PATH": PATH, "RANKS": str(ranks), "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.known: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """The script and all below it, and remember them: they cannot be found any more when their parent is dead."""
        with suppress(psutil.NoSuchProcess):
            script = psutil.Process(self.process.pid)
            self.known |= {process.pid: process for process in [script, *script.children(recursive=True)]}
        return list(self.known.values())

    def find_torchrun(self) -> psutil.Process:
        """The agent: the script's child."""
        (agent,) = psutil.Process(self.process.pid).children()
        return agent

    def read_log(self) -> str:
        """What this start printed."""
        return self.log.read_bytes()[self.log_start :].decode(errors="replace")

    def kill_all(self) -> None:
        """SIGKILL to whatever of it is left."""
        for process in self.look():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def run_trials(setting: Setting, folder: Path, kinds: list[str], seed: int) -> Counter[tuple[str, str]]:
    """One of each kind: (kind, verdict) -> moments."""
    counts: Counter[tuple[str, str]] = Counter()
    for kind in kinds:
        began = time.monotonic()
        out = folder / kind
        count, verdict = TRIALS[kind](setting, out, random.Random(f"{seed}/{kind}"))
        counts[kind, verdict if verdict in ("bit-identical", "within tolerance") else "failed"] += count
        print(f"{kind}: {count} moments, {verdict} ({time.monotonic() - began:.0f} s, {out})", flush=True)
    return counts


def run_one_machine(setting: Setting, out: Path, rng: random.Random) -> tuple[int, str]:
    """Two ranks under one agent: kill the agent; signal the script; signal the whole job at once."""
    whole = train_whole(setting, out.with_name("whole-agent"), rng)
    slow = {"PANFM_TEST_STEP_SECONDS": "0.05"} | HOOKED
    log, count = out.with_suffix(".log"), 0
    for how in ("agent killed", "script signalled", "job signalled"):
        agent = Agent(setting, out, log, ranks=2, environment=slow)
        step = read_step(out) + rng.randint(2, 6)
        try:
            wait_until(lambda step=step: read_step(out) >= step, agent)
            time.sleep(rng.uniform(0, 0.1))
            family = agent.look()
            count += 1
            if how == "agent killed":
                agent.find_torchrun().kill()
            elif how == "script signalled":
                agent.process.send_signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
            else:
                for process in family:
                    process.terminate()
            code = agent.process.wait(PATIENCE)
            psutil.wait_procs(family, timeout=10)
            left = [process.pid for process in family if process.is_running() and process.status() != "zombie"]
        finally:
            agent.kill_all()
        expected = 128 + signal.SIGKILL if how == "agent killed" else EXIT_CODES["interrupted"]
        if code != expected or left:
            return count, f"{how}: code {code}, {len(left)} processes are left"
        saved = list_checkpoints(out)[-1].name
        if how != "agent killed" and saved != f"step-{read_step(out):08d}":
            return count, f"{how}: {read_step(out)} steps done, saved {saved}"
    agent = Agent(setting, out, log, ranks=2)
    try:
        code = agent.process.wait(PATIENCE)
    finally:
        agent.kill_all()
    return count, compare(out, whole) if code == 0 else f"code {code} at the end"


def run_machines(
    setting: Setting, out: Path, rng: random.Random, *, num_machines: int, losses: tuple[str, str]
) -> tuple[int, str]:
    """One rank each on several machines; one is lost and comes back, mid-step, and then another one, mid-save.

    losses: how each is lost, "killed" (its agent, and its rank with it) or "cut off" (from the network).
    """
    whole = train_whole(setting, out.with_name("whole-elastic"), rng, *ELASTIC)
    network = Network(num_machines)
    if not network.has_namespaces:
        print("no network namespaces may be made here: all machines are on loopback", flush=True)
    port = find_port()
    started: list[Agent] = []
    count = 0

    def start(machine: int) -> Agent:
        own = {} if not network.has_namespaces else {"GLOO_SOCKET_IFNAME": network.ends[machine]}
        environment = {
            "NNODES": f"1:{num_machines}",
            "HEAD": network.addresses[0],
            "PORT": str(port),
            "ADDRESS": network.addresses[machine],
            "RDZV_CONF": f"is_host={int(machine == 0)},{RENDEZVOUS}",
            "PANFM_TEST_STEP_SECONDS": STEP_SECONDS,
            **own,
            **HOOKED,
        }
        namespace = network.names[machine] if network.has_namespaces else None
        log = out.with_name(f"{out.name}-{'abc'[machine]}.log")
        started.append(Agent(setting, out, log, *ELASTIC, ranks=1, environment=environment, namespace=namespace))
        return started[-1]

    try:
        agents = [start(machine) for machine in range(num_machines)]
        wait_until(lambda: read_world_size(out) == num_machines, agents[0])
        for number, (when, how) in enumerate(zip(("step", "save"), losses, strict=True)):
            lost = 1 + number % (num_machines - 1)  # never the first, which holds the rendezvous
            wait_for_moment(out, when, agents[0], rng)
            count += 1
            if how == "killed":
                agents[lost].look()
                agents[lost].find_torchrun().kill()
            elif network.has_namespaces:
                network.set_cable(lost, "down")
            else:
                for process in agents[lost].look():
                    process.suspend()
            wait_until(lambda: read_world_size(out) == num_machines - 1, agents[0])
            agents[lost].kill_all()
            if how == "cut off" and network.has_namespaces:
                network.set_cable(lost, "up")
            agents[lost] = start(lost)
            wait_until(lambda: read_world_size(out) == num_machines, agents[0])
        codes = [agent.process.wait(PATIENCE) for agent in agents]
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        return max(count, 1), str(error)
    finally:
        for agent in started:
            agent.kill_all()
        network.close()
    return count, compare(out, whole) if codes[0] == 0 else f"codes {codes} at the end"


def train_whole(setting: Setting, out: Path, rng: random.Random, *overrides: str) -> Path:
    """The run that nothing interrupts, on two ranks."""
    if not out.exists():
        life: Life = Trial(setting, out, rng, 2, overrides).start()
        codes = life.wait()
        assert set(codes) == {0}, life.read_log()
    return out


def wait_for_moment(out: Path, when: str, agent: Agent, rng: random.Random) -> None:
    """A random moment in a step, or in the writing of a checkpoint."""
    if when == "save":
        folder = out / "checkpoints"
        newest = max((path.name for path in folder.glob("step-*")), default="")
        wait_until(lambda: any(path.name > newest for path in folder.glob("step-*.tmp")), agent, pause=0.001)
        time.sleep(rng.uniform(0, 0.02))
    else:
        step = read_step(out) + rng.randint(1, 5)
        wait_until(lambda: read_step(out) >= step, agent)
        time.sleep(rng.uniform(0, 0.2))


def wait_until(is_there: Callable[[], bool], agent: Agent, pause: float = 0.01) -> None:
    """Wait while the agent runs. Raises TimeoutError with the end of its log."""
    deadline = time.monotonic() + PATIENCE
    while not is_there():
        if time.monotonic() > deadline or agent.process.poll() is not None:
            raise TimeoutError(f"{agent.log}: {agent.process.poll()} ... {agent.read_log()[-600:]!r}")
        time.sleep(pause)


def read_world_size(out: Path) -> int:
    """Ranks that wrote the newest checkpoint; 0 where it is being taken away at this moment."""
    with suppress(ValueError, OSError, IndexError):
        return int(read_json(list_checkpoints(out)[-1] / "training.json")["world_size"])
    return 0


def find_port() -> int:
    """One that is free on loopback; in a namespace of its own any is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_quietly(command: str) -> bool:
    """Whether a command could be run and succeeded."""
    with suppress(FileNotFoundError):
        return subprocess.run(command.split(), capture_output=True, check=False).returncode == 0
    return False


TRIALS: dict[str, Callable[[Setting, Path, random.Random], tuple[int, str]]] = {
    "one_machine": run_one_machine,
    "two_machines_killed": partial(run_machines, num_machines=2, losses=("killed", "killed")),
    "two_machines_cut": partial(run_machines, num_machines=2, losses=("cut off", "cut off")),
    "three_machines": partial(run_machines, num_machines=3, losses=("killed", "cut off")),
}
HOOKED = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "site"), os.environ.get("PYTHONPATH", "")])}
