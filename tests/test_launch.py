"""The launch files parse, and the commands, options, configs and files that they name exist."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml

from panfm.cli.main import app
from panfm.config import load_config
from panfm.evaluation.run_config import EvaluateConfig
from panfm.files import CHECKOUT, find_resource
from panfm.training.endings import EXIT_CODES, EXIT_HUNG, EXIT_LOST
from panfm.training.plan import PretrainConfig

LAUNCH = CHECKOUT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
FILES = sorted(path for path in LAUNCH.rglob("*") if path.is_file())
FOLDERS = {"pretrain": "configs/pretrain", "evaluate": "configs/evaluate"}


def read(name: str) -> str:
    return (LAUNCH / name).read_text(encoding="utf-8")


def find_commands(text: str) -> list[list[str]]:
    """Words after `panfm` (or `-m panfm`, `--module panfm`) in each command of a file, comments included."""
    joined = re.sub(r"\\\n\s*#?\s*", " ", text)
    found = re.findall(r"(?:-m |--module |podman run [^\n]* |exec |`)panfm ((?:[a-z]+)[^\n`;|&]*)", joined)
    return [shlex.split(re.sub(r"[()'\"]|\$\w+|\$\{[^}]*\}", " ", command)) for command in found]


def get_options(words: list[str]) -> tuple[str, set[str]]:
    """The command that the words name, and the options that it knows."""
    command = typer.main.get_command(app)
    name = []
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]  # type: ignore[attr-defined]
        name.append(word)
    assert not hasattr(command, "commands"), f"panfm {' '.join(words)}: no such command"
    return " ".join(name), {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert path.stat().st_mode & 0o111, "not executable"


def test_there_are_commands_to_check() -> None:
    assert len([command for path in FILES for command in find_commands(path.read_text())]) >= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_options_and_configs_exist(path: Path) -> None:
    for words in find_commands(path.read_text(encoding="utf-8")):
        name, options = get_options(words)
        for word in words:
            assert not word.startswith("--") or word.partition("=")[0] in options, f"panfm {name} has no {word}"
        arguments = words[len(name.split()) :]
        folder = FOLDERS.get(name.split()[0])
        if folder and arguments and re.fullmatch(r"[a-z][a-z0-9_]+", arguments[0]):
            find_resource(folder, arguments[0])
        kind = EvaluateConfig if name == "evaluate run" else PretrainConfig
        base = "default" if name == "evaluate run" else "panfm_vitb"
        for key in re.findall(r"(?<!\S)([a-z_]+(?:\.[a-z_]+)*)=", " ".join(arguments)):
            _check_key(kind, base, key)


def _check_key(kind: type, base: str, key: str) -> None:
    """An unknown key is refused; a value of the wrong type names the key, which then exists."""
    from panfm.errors import UserError

    try:
        load_config(
            kind, base, [f"{key}=[]"], folder="configs/evaluate" if kind is EvaluateConfig else "configs/pretrain"
        )
    except UserError as error:
        assert "unknown key" not in str(error), error


def test_files_that_are_named_exist() -> None:
    for path in FILES:
        for named in re.findall(r"\b((?:launch|docs|configs|src)/[\w./]+\.\w+)", path.read_text(encoding="utf-8")):
            assert (CHECKOUT / named).is_file(), f"{path.name} names {named}"


def test_slurm_requeues_what_was_saved_and_not_what_wants_a_person() -> None:
    text = read("slurm.sbatch")
    requeued = {int(code) for codes in re.findall(r"^([\d| ]+)\)$", text, re.MULTILINE) for code in codes.split("|")}
    assert EXIT_CODES["interrupted"] in requeued
    assert {EXIT_HUNG, EXIT_LOST} <= requeued
    assert not requeued & {EXIT_CODES[outcome] for outcome in ("finished", "diverged", "alarmed", "unreadable")}
    assert "#SBATCH --requeue" in text
    assert re.search(r"^#SBATCH --signal=USR1@\d+", text, re.MULTILINE)


@pytest.mark.parametrize(("code", "requeues"), [(75, True), (6, True), (4, False), (5, False), (0, False), (2, False)])
def test_slurm_script_with_ranks_that_end(tmp_path: Path, code: int, requeues: bool) -> None:
    """The script itself, with stand-ins for SLURM's two commands."""
    for name, body in {
        "srun": f"exit {code}",
        "scontrol": 'echo "$@" >> "$LOG"; [ "$1" != show ] || echo node1',
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    run = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "panfm_vitb"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"},
        check=False,
    )
    assert run.returncode == code
    assert ("requeue 7" in log.read_text()) == requeues


def test_kubernetes_job_is_consistent() -> None:
    job = yaml.safe_load(read("kubernetes/pytorchjob.yaml"))
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    assert command[:4] == ["torchrun", "-m", "panfm", "pretrain"]
    overrides = [word for word in container["args"][1:] if "=" in word]
    config = load_config(PretrainConfig, container["args"][0], overrides, folder="configs/pretrain")
    num_ranks = worker["replicas"] * int(job["spec"]["nprocPerNode"])
    assert config.engine.global_batch_size % (config.engine.micro_batch_size * num_ranks) == 0
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in worker["template"]["spec"]["volumes"]}
    grace = worker["template"]["spec"]["terminationGracePeriodSeconds"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(given["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace, "the pod would be killed while a rank still saves"


def test_the_image_copies_what_the_package_is_built_from() -> None:
    text = read("Containerfile")
    copied = set(re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE))
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src", "configs", "data_shards", "evaluation"} <= names
    assert all((CHECKOUT / name).exists() for name in names)
    assert "USER panfm" in text
