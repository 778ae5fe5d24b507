"""The server behind the page: this computer's own browser sends an image and gets a prediction; nothing else happens.

    http://127.0.0.1:PORT/TOKEN/           the page (files of the package, listed once; no path is ever opened)
                         .../card          what the classifier is                                  JSON
                         .../predict       POST, the image's bytes  --answer-->  the prediction    JSON

Who could ask besides the person at this computer, and why it does not work:

- another computer: the socket listens on 127.0.0.1 alone, and no option changes that;
- a page of another origin in the same browser: it does not know the token; Origin and Sec-Fetch-Site name it, and are
  checked as well; no answer carries a CORS header, so that it could read nothing and not send the type of `predict`;
- a name that is rebound to 127.0.0.1 (DNS rebinding): Host is then that name, and only 127.0.0.1:PORT is answered;
- another person's program on this computer: it does not know the token, 256 random bits, new at each start;
- a page that frames this one, or text in a class's name: Content-Security-Policy allows our own files and nothing else.

Images stay in memory and are forgotten with the answer. Nothing is logged: not even an address or a time.
"""

import json
import math
import os
import secrets
import socket
import socketserver
import sys
import threading
import webbrowser
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from panfm_predict.app.replies import answer, describe_card
from panfm_predict.classifier import Classifier, load_classifier
from panfm_predict.errors import PredictError

ADDRESS = "127.0.0.1"
MAX_BYTES = 64 << 20  # of an image: a whole camera file, also an uncompressed one
MAX_DIGITS = 12  # of a length: longer ones are not even turned into a number
MAX_PORT = 65_535
SECONDS_IDLE = 30.0  # a connection that says nothing for so long is closed
IMAGE_TYPE = "application/octet-stream"  # one that no form and no script of another origin may send unasked
PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "Cache-Control": "no-store",  # a browser's cache is a disk
}


class AppServer(ThreadingHTTPServer):
    """One classifier behind one page; `address` is what the person opens."""

    daemon_threads = True  # a browser that keeps a connection open must not keep the program from ending
    # On Windows the option would let another program listen on the same port.
    allow_reuse_address = os.name != "nt"

    def __init__(self, classifier: Classifier, port: int = 0) -> None:
        """Listen on 127.0.0.1; port 0 takes a free one. Raises PredictError where the port is taken."""
        self.classifier = classifier
        self.token = secrets.token_urlsafe(32)
        self.one_image = threading.Lock()  # two at once are not faster on a few cores, and take twice the memory
        folder = files("panfm_predict.app") / "page"
        self.page = {file.name: file.read_bytes() for file in folder.iterdir() if Path(file.name).suffix in PAGE_TYPES}
        num_cases = 0 if classifier.cases is None else len(classifier.cases.labels)
        self.card = describe_card(classifier.card, num_cases, MAX_BYTES)
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise PredictError(
                f"--port {port}: {error.strerror or error}; leave --port out to take a free one"
            ) from None

    def server_bind(self) -> None:
        """Bind without asking for this computer's name, as http.server would: that may ask a name server."""
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def authority(self) -> str:
        """The one Host that is answered."""
        return f"{ADDRESS}:{self.server_port}"

    @property
    def address(self) -> str:
        """The page's address, token and all."""
        return f"http://{self.authority}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Name the kind of a fault, and stay silent where the browser has just gone away."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            sys.stderr.write(f"panfm-predict app: {type(error).__name__} while answering the page\n")


class Handler(BaseHTTPRequestHandler):
    """One request. A connection carries one (HTTP/1.0), so that what is refused unread cannot be taken for a second."""

    server: AppServer
    timeout = SECONDS_IDLE

    def do_GET(self) -> None:
        """Send a file of the page, or the card."""
        name = self._admit()
        if name is None:
            return
        name = name or "index.html"
        if name == "card":
            self._send_json(self.server.card)
        elif name in self.server.page:
            self._send(HTTPStatus.OK, f"{PAGE_TYPES[Path(name).suffix]}; charset=utf-8", self.server.page[name])
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Predict the image in the body; `?share=0.05` also at this share of the class of interest."""
        name = self._admit()
        if name is None:
            return
        share = _parse_share(self.path.partition("?")[2])
        refusal = self._find_refusal(share) if name == "predict" else HTTPStatus.NOT_FOUND
        if refusal is not None:
            self.send_error(refusal)
            return
        length = int(self.headers["Content-Length"])
        with self.server.one_image:
            data = self.rfile.read(length)
            if len(data) < length:  # the browser went away
                return
            try:
                reply = answer(self.server.classifier, data, share)
            except PredictError as error:  # the folder's fault, not the image's
                sys.stderr.write(f"panfm-predict app: {error}\n")
                self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR)
                return
        self._send_json(reply)

    def _admit(self) -> str | None:
        """The name behind the token, "" for the page itself; None where the request was refused and answered."""
        if self.headers.get_all("Host") != [self.server.authority]:
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        # Every browser of today sends it; "none" is a person who typed or opened the address.
        from_where = self.headers.get("Sec-Fetch-Site", "none")
        origin = self.headers.get("Origin")
        if from_where not in ("none", "same-origin") or origin not in (None, f"http://{self.server.authority}"):
            self.send_error(HTTPStatus.FORBIDDEN)
            return None
        parts = self.path.partition("?")[0].split("/")  # "/TOKEN/name"
        if len(parts) != 3 or not secrets.compare_digest(parts[1].encode(), self.server.token.encode()):
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        return parts[2]

    def _find_refusal(self, share: float | None) -> HTTPStatus | None:
        """Why an image is not even read; None where it is."""
        # The page's own script sends both; a form of another origin could not, nor a script without being asked first.
        if self.headers.get_all("Origin") != [f"http://{self.server.authority}"]:
            return HTTPStatus.FORBIDDEN
        if self.headers.get("Content-Type") != IMAGE_TYPE:
            return HTTPStatus.UNSUPPORTED_MEDIA_TYPE
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            return HTTPStatus.LENGTH_REQUIRED
        if len(length) > MAX_DIGITS or int(length) > MAX_BYTES:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if share is not None and not 0 < share < 1:  # not a number neither; the page's own field lets none through
            return HTTPStatus.BAD_REQUEST
        return None

    def _send_json(self, value: dict[str, Any]) -> None:
        self._send(HTTPStatus.OK, "application/json", json.dumps(value, allow_nan=False).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse in our own words: http.server would repeat what was asked."""
        del message, explain
        self._send(code, "text/plain; charset=utf-8", f"{code} {HTTPStatus(code).phrase}\n".encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: an address holds the token, and when somebody was looked at is nobody's business."""

    def version_string(self) -> str:
        """Name neither Python nor its version."""
        return "panfm_predict"


def _parse_share(query: str) -> float | None:
    """The share in ?share=0.05; None where there is none, not-a-number where it is no number."""
    shares = parse_qs(query).get("share")
    try:
        return None if shares is None else float(shares[0])
    except ValueError:
        return math.nan


def run_app(folder: Path | str, port: int = 0, open_browser: bool = True, threads: int = 0) -> None:
    """Serve the page of a classifier folder until Ctrl-C. threads: of the processor; 0 = as many as there are cores.

    Raises PredictError for a folder or a port that will not do.
    """
    if not 0 <= port <= MAX_PORT:
        raise PredictError(f"--port {port}: must lie in 0 to {MAX_PORT}; leave it out to take a free one")
    classifier = load_classifier(folder, threads)
    with AppServer(classifier, port) as server:
        card = classifier.card
        # Flushed: who starts it from another program waits for the address.
        _say(f"{card.name}, version {card.version}. {card.warning}")
        _say(f"Open on this computer until Ctrl-C: {server.address}")
        if open_browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            _say("Closed. No image was kept.")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
