"""The app's server without a browser: what it answers, whom it refuses, and that nothing is kept, sent or logged."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from panfm.cli.main import app as command_line
from panfm.errors import UserError
from panfm_predict import PredictError, load_classifier
from panfm_predict.app.server import HEADERS, MAX_BYTES, AppServer, run_app
from panfm_predict.card import Card
from tests.predict.made import draw_bytes, make_classifier

JPEG = draw_bytes(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("server") / "classifier", num_cases=6)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[AppServer]:
    with AppServer(load_classifier(folder, threads=1)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(
    server: AppServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str | None
) -> tuple[int, dict[str, str], bytes]:
    """What the page's own script would send; `headers` replace its headers (name_like_this), None leaves one out."""
    sent: dict[str, str | None] = {"Host": server.authority}
    if method == "POST":
        sent |= {
            "Origin": f"http://{server.authority}",
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(body or b"")),
        }
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path.replace("TOKEN", server.token), skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), content


def predict(server: AppServer, body: bytes = JPEG, query: str = "", **headers: str | None) -> Any:
    status, _, content = ask(server, f"/TOKEN/predict{query}", "POST", body, **headers)
    return json.loads(content) if status == 200 else status


# ------------------------------------------------------------------------------------------------ answers


def test_an_answer_is_what_python_predicts(server: AppServer, folder: Path) -> None:
    classifier = load_classifier(folder, threads=1)
    for seed in range(3):
        data = draw_bytes(seed)
        answer, [wanted] = predict(server, data), classifier.predict([data])
        assert answer["probabilities"] == answer["uncorrected"] == pytest.approx(wanted.probabilities, abs=1e-9)
        assert (answer["top"], answer["flagged"], answer["is_outlier"]) == (
            wanted.top,
            wanted.flagged,
            wanted.is_outlier,
        )
        assert answer["outlier_score"] == pytest.approx(wanted.outlier_score)
        assert (answer["modality"], answer["modality_unexpected"]) == (wanted.modality, wanted.modality_unexpected)
        similar = classifier.find_similar(classifier.embed([data])[0], 5)
        assert [case["label"] for case in answer["similar"]] == [case.label for case in similar]
        assert answer["similar"][0]["thumbnail"].startswith("data:image/jpeg;base64,/9j/")


def test_a_share_corrects_the_probabilities_and_leaves_the_flag(server: AppServer, folder: Path) -> None:
    [wanted] = load_classifier(folder, threads=1).predict([JPEG], {"melanoma": 0.01})
    answer = predict(server, query="?share=0.01")
    assert answer["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-9)
    assert answer["corrected_for"] == wanted.corrected_for
    plain = predict(server)
    assert answer["uncorrected"] == plain["probabilities"] and answer["flagged"] == plain["flagged"]
    for share in ("0", "1", "-0.1", "nan", "inf", "much"):
        assert predict(server, query=f"?share={share}") == 400


def test_what_is_no_image_is_an_answer_too(server: AppServer) -> None:
    for data in (b"", b"no image", JPEG[: len(JPEG) // 2]):
        assert predict(server, data) == {"unreadable": True}


def test_the_card_tells_what_the_page_needs(server: AppServer, folder: Path) -> None:
    status, headers, content = ask(server, "/TOKEN/card")
    card: Card = load_classifier(folder, threads=1).card
    told = json.loads(content)
    assert status == 200 and headers["Content-Type"] == "application/json"
    assert told["classes"] == list(card.classes) and told["num_cases"] == 6 and told["max_bytes"] == MAX_BYTES
    assert told["threshold_card"]["sensitivity"] == {"value": 0.91, "low": 0.72, "high": 0.98, "n": 22}
    assert "address" not in told["encoder"]  # it may hold a path of this computer
    assert str(folder).encode() not in content


# ------------------------------------------------------------------------------------------------ refusals


def test_only_this_computer_can_connect(server: AppServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError):  # another address of the same computer; only Linux answers there at all
        socket.create_connection(("127.0.0.2", server.server_port), timeout=2)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/TOKEN",
        "/wrong/",
        "/wrong/card",
        "/TOKEN/../card",
        "/TOKEN/../../../../etc/passwd",
        "/TOKEN/..%2f..%2fserver.py",
        "/TOKEN/%2e%2e/server.py",
        "/TOKEN//etc/passwd",
        "/TOKEN/server.py",
        "/TOKEN/..\\server.py",
        "/TOKEN/cases/0000.jpg",
        "/TOKEN/encoder.onnx",
        "//[",
        "http://127.0.0.1/TOKEN/card",
    ],
)
def test_nothing_lies_behind_other_paths(server: AppServer, path: str) -> None:
    status, headers, content = ask(server, path)
    assert (status, content) == (404, b"404 Not Found\n")
    assert headers.items() >= HEADERS.items()
    assert ask(server, path.replace("card", "predict"), "POST", JPEG)[0] == 404


def test_a_name_that_was_rebound_is_not_served(server: AppServer) -> None:
    port = server.server_port
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1",
        f"localhost:{port}",
        f"127.0.0.1:{port + 1}",
        None,
    ):
        assert ask(server, "/TOKEN/card", Host=host)[0] == 421
        assert predict(server, Host=host) == 421


def test_another_origin_can_neither_ask_nor_read(server: AppServer) -> None:
    own = f"http://{server.authority}"
    for origin in (
        "http://evil.example",
        "null",
        f"http://127.0.0.1:{server.server_port + 1}",
        f"{own}.evil.example",
        "",
    ):
        assert ask(server, "/TOKEN/card", Origin=origin)[0] == 403
        assert predict(server, Origin=origin) == 403
    assert predict(server, Origin=None) == 403  # every browser sends one with a POST
    for site in ("cross-site", "same-site"):
        assert ask(server, "/TOKEN/", Sec_Fetch_Site=site)[0] == 403
        assert predict(server, Sec_Fetch_Site=site) == 403
    assert ask(server, "/TOKEN/", Sec_Fetch_Site="none")[0] == 200
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", None):
        assert predict(server, Content_Type=kind) == 415
    # What a browser asks before it lets another origin's script send our type: the answer permits nothing.
    status, headers, _ = ask(server, "/TOKEN/predict", "OPTIONS", Origin="http://evil.example")
    assert status == 501 and not any(name.lower().startswith("access-control") for name in headers)


def test_what_is_too_long_is_refused_unread(server: AppServer) -> None:
    for length in (str(MAX_BYTES + 1), "9" * 40):
        assert predict(server, b"", Content_Length=length) == 413
    for length in ("-1", "1e3", "", None):
        assert predict(server, b"", Content_Length=length) == 411
    assert predict(server, b"", Transfer_Encoding="chunked") == 411


def test_every_page_and_refusal_carries_the_policy(server: AppServer) -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for name in ("", "app.js", "app.css", "words.js", "card", "absent"):
        _, headers, content = ask(server, f"/TOKEN/{name}")
        assert headers.items() >= HEADERS.items()
        assert headers["Server"] == "panfm_predict"
        assert not re.search(rb"https?://(?!www\.w3\.org/2000/svg)", content)  # nothing is fetched from elsewhere


def test_the_token_is_new_at_each_start(server: AppServer, folder: Path) -> None:
    with AppServer(server.classifier) as other:
        assert len(server.token) >= 43 and other.token != server.token


def test_nothing_is_logged(server: AppServer, capfd: pytest.CaptureFixture[str]) -> None:
    predict(server), ask(server, "/wrong/"), ask(server, "/TOKEN/card", Host="evil.example")
    with socket.create_connection(("127.0.0.1", server.server_port)) as broken:
        broken.sendall(b"nonsense\r\n\r\n")
        assert b"400" in broken.recv(100)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ command line

# Runs `panfm-predict app` and names whatever is opened for writing, and every connection that it makes itself.
WATCHED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it, and so would we
def watch(event, arguments):
    if event == "open" and arguments[0] != os.devnull:
        mode, flags = arguments[1:]
        if (mode and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            sys.__stderr__.write(f"wrote {arguments[0]}\\n")
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.bind"):
        sys.__stderr__.write(f"{event} {arguments}\\n")
sys.dont_write_bytecode = True
sys.addaudithook(watch)
from panfm_predict.cli import main
main(["app", sys.argv[1], "--no-browser", "--threads", "1"])
"""


@pytest.mark.slow
def test_the_command_keeps_and_sends_nothing(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WATCHED, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            assert "For research only" in process.stdout.readline()
            found = re.search(r"http://(127\.0\.0\.1:\d+)/([\w-]+)/", process.stdout.readline())
            assert found is not None
            for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
                connection = http.client.HTTPConnection(found[1], timeout=60)
                headers = {"Origin": f"http://{found[1]}", "Content-Type": "application/octet-stream"}
                connection.request("POST", f"/{found[2]}/predict", draw_bytes(1, kind=kind), headers)
                assert json.loads(connection.getresponse().read())["top"]
                connection.close()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "Closed. No image was kept.\n", "")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_and_an_absent_folder_are_one_line(server: AppServer, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PredictError, match=r"--port \d+: Address already in use; leave --port out"):
        run_app(folder, server.server_port, open_browser=False, threads=1)
    with pytest.raises(PredictError, match="--port 70000: must lie in 0 to 65535"):
        run_app(folder, 70_000, open_browser=False)
    result = CliRunner().invoke(command_line, ["app", str(tmp_path / "absent"), "--no-browser"])
    assert isinstance(result.exception, UserError) and "no such folder" in str(result.exception)
