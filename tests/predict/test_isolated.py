"""panfm_predict in an environment of its own: what its pyproject names and nothing else; no socket, no written file.

The environment is made of links to what is installed here, by the names that panfm_predict and its dependencies
declare: nothing is downloaded, and what is not declared is not there.
"""

import json
import platform
import signal
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import panfm_predict
from panfm_predict import load_classifier
from tests.predict.made import draw_bytes, draw_page, make_classifier

# Runs in the environment: arguments are what to forbid, the folder, and images. Nothing here may need more than it has.
PROGRAM = r"""
import ctypes, json, os, platform, struct, sys

opened_for_writing, forbidden = [], []

def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        forbidden.append(event)
        raise RuntimeError("a network connection: " + event)
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        opened_for_writing.append(str(arguments[0]))
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        forbidden.append(event)
        raise RuntimeError("another program: " + event)

def forbid_sockets_in_the_kernel():
    # A filter on system calls: a socket of C code, which Python's audit does not see, ends the process by SIGSYS.
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    kill, allow = 0x80000000, 0x7FFF0000
    steps = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, kill), (0x06, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps), 8 * len(steps))
    rules = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    system = ctypes.CDLL(None)
    assert system.prctl(38, 1, 0, 0, 0) == 0 and system.prctl(22, 2, rules, 0, 0) == 0, "no filter"

how, folder, *images = sys.argv[1:]
if how == "kernel":
    forbid_sockets_in_the_kernel()
else:
    sys.addaudithook(watch)
if folder == "connect":
    import socket
    socket.create_connection(("127.0.0.1", 9))
from dataclasses import asdict
from importlib.util import find_spec
from panfm_predict import load_classifier
classifier = load_classifier(folder, threads=1)
predictions = [asdict(one) for one in classifier.predict(images, {"melanoma": 0.05})]
similar = [[case.label, case.similarity] for case in classifier.find_similar(classifier.embed(images[:1])[0])]
tops = sorted({name.partition(".")[0] for name in sys.modules})
absent = [name for name in ("panfm", "torch", "onnx", "scipy", "pydantic", "typer") if find_spec(name) is None]
json.dump({"predictions": predictions, "similar": similar, "modules": tops, "absent": absent,
           "written": opened_for_writing, "forbidden": forbidden}, sys.stdout)
"""
ABSENT = ["panfm", "torch", "onnx", "scipy", "pydantic", "typer"]


def list_needed(name: str, found: set[str]) -> set[str]:
    """The declared dependencies of a distribution, theirs too, without extras."""
    if name in found:
        return found
    found.add(name)
    for requirement in map(Requirement, distribution(name).requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            list_needed(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    environment = tmp_path_factory.mktemp("isolated") / "environment"
    venv.create(environment, symlinks=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    for name in list_needed("panfm-predict", set()) - {"panfm-predict"}:
        one = distribution(name)
        for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(str(one.locate_file(top))))
    (packages / "panfm_predict").symlink_to(Path(panfm_predict.__file__).parent)
    return environment / "bin" / "python"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("classifier") / "clinic", num_cases=6)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("images")
    (out / "a.jpg").write_bytes(draw_bytes(0))
    (out / "b.png").write_bytes(draw_page())
    return [str(out / "a.jpg"), str(out / "b.png")]


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -I: no path of ours and no user's packages; -B: byte code that is missing is not written beside the sources.
    return subprocess.run([python, "-I", "-B", *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_it_predicts_there_what_it_predicts_here(python: Path, folder: Path, images: list[str]) -> None:
    ended = run(python, "-c", PROGRAM, "audit", str(folder), *images)
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    found = json.loads(ended.stdout)
    classifier = load_classifier(folder, threads=1)
    expected = classifier.predict(images, {"melanoma": 0.05})
    for there, here in zip(found["predictions"], expected, strict=True):
        assert there["probabilities"] == pytest.approx(here.probabilities, abs=1e-9)
        assert there["outlier_score"] == pytest.approx(here.outlier_score, rel=1e-9)
        assert (there["top"], there["is_outlier"], there["flagged"]) == (here.top, here.is_outlier, here.flagged)
        assert there["corrected_for"] == here.corrected_for and tuple(there["notes"]) == here.notes
    similar = classifier.find_similar(classifier.embed(images[:1])[0])
    assert [label for label, _ in found["similar"]] == [case.label for case in similar]
    assert found["absent"] == ABSENT and not set(ABSENT) & set(found["modules"])
    assert found["forbidden"] == [] and found["written"] == []


def test_the_audit_would_notice(python: Path) -> None:
    ended = run(python, "-c", PROGRAM, "audit", "connect")
    assert ended.returncode == 1 and "a network connection: socket." in ended.stderr


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="a filter of Linux's"
)
def test_no_c_code_opens_a_socket_either(python: Path, folder: Path, images: list[str]) -> None:
    noticed = run(python, "-c", PROGRAM, "kernel", "connect")
    if "no filter" in noticed.stderr:
        pytest.skip("this kernel lets nobody filter system calls")
    assert noticed.returncode == -signal.SIGSYS, noticed
    ended = run(python, "-c", PROGRAM, "kernel", str(folder), *images)
    assert ended.returncode == 0, (ended.returncode, ended.stderr)
    assert len(json.loads(ended.stdout)["predictions"]) == 2


def test_the_command_runs_there(python: Path, folder: Path, images: list[str]) -> None:
    ended = run(python, "-m", "panfm_predict.cli", str(folder), *images, "--json")
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    answers = json.loads(ended.stdout)
    assert [row["image"] for row in answers["predictions"]] == images and "gives no diagnosis" in answers["warning"]


def test_the_pages_of_the_app_are_there(python: Path) -> None:
    ended = run(python, "-m", "panfm_predict.cli", "app", "--help")
    assert ended.returncode == 0 and "--no-browser" in ended.stdout, ended.stderr


def test_the_two_distributions_have_one_version_and_one_licence() -> None:
    import panfm

    root = Path(__file__).resolve().parents[2]
    assert panfm_predict.__version__ == panfm.__version__ == distribution("panfm-predict").version
    assert (root / "LICENSE").read_bytes() == (root / "predict/LICENSE").read_bytes()
