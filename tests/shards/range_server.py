"""A web server for tests: files of a folder with Range requests, counted, and made to fail as stores do."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class RangeServer:
    """What is served, how it misbehaves, and what it was asked for."""

    folder: Path
    url: str = ""
    fail_every: int = 0  # of the requests each k-th is answered with `status`
    status: int = 503
    cut_every: int = 0  # each k-th body ends in the middle, with the connection
    delay: float = 0.0  # seconds before each answer
    ignores_ranges: bool = False
    stalled: threading.Event | None = None  # set once a body has stopped in its middle; it never goes on
    num_requests: int = 0
    num_bytes: int = 0
    num_failed: int = 0
    ranges: Counter[tuple[str, int, int]] = field(default_factory=Counter)  # name, first byte, last byte
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def forget(self) -> None:
        """Count from zero."""
        with self.lock:
            self.num_requests = self.num_bytes = self.num_failed = 0
            self.ranges.clear()
            self.headers.clear()

    @property
    def pieces(self) -> Counter[tuple[str, int, int]]:
        """The ranges of shards that were delivered, without the two bytes by which their sizes are checked."""
        return Counter({key: n for key, n in self.ranges.items() if key[0].endswith(".tar") and key[2] > key[1] + 1})


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder on a free port until the block ends."""
    state = RangeServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            with state.lock:
                state.num_requests += 1
                number = state.num_requests
                state.headers.append(dict(self.headers))
            if state.delay:
                time.sleep(state.delay)
            path = state.folder / self.path.lstrip("/")
            if state.fail_every and number % state.fail_every == 0:
                state.num_failed += 1
                return self.answer(
                    state.status, b"<html>a page about https://user:secret@host/?signature=secret</html>"
                )
            if not path.is_file():
                return self.answer(404, b"")
            data, wanted = path.read_bytes(), self.headers.get("Range")
            if wanted is None or state.ignores_ranges:
                return self.answer(200, data)
            first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            if first >= len(data):
                return self.answer(416, b"")
            body = data[first : last + 1]
            cut = state.cut_every and number % state.cut_every == 0
            if not cut:
                with state.lock:
                    state.ranges[path.name, first, first + len(body) - 1] += 1
            self.answer(206, body, cut=bool(cut), place=f"bytes {first}-{first + len(body) - 1}/{len(data)}")

        def answer(self, status: int, body: bytes, *, cut: bool = False, place: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if place:
                self.send_header("Content-Range", place)
            self.end_headers()
            stall = state.stalled is not None and len(body) > 2000
            sent = body[: len(body) // 2] if cut or stall else body
            with state.lock:
                state.num_bytes += len(sent)
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked has given up
                self.wfile.write(sent)
            if stall:
                self.wfile.flush()
                state.stalled.set()
                time.sleep(60)
            if cut:
                state.num_failed += 1
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
