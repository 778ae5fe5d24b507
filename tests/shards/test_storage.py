"""Where shards lie: what counts as a place, and how bytes come from one that fails now and then."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from panfm.errors import UserError
from panfm.shards import storage
from panfm.shards.storage import ShardUrl, copy, fetch, get_size, open_regular, parse_folder, parse_location
from tests.shards.range_server import RangeServer, serve

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    (tmp_path / "file").write_bytes(CONTENT)
    with serve(tmp_path) as running:
        yield running


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "time", FastClock)


class FastClock:
    """The clock, without the waiting; what would have been waited is added up."""

    slept: float = 0.0

    @staticmethod
    def monotonic() -> float:
        return FastClock.slept

    @staticmethod
    def sleep(seconds: float) -> None:
        FastClock.slept += seconds


def test_paths_stay_paths_and_urls_are_urls() -> None:
    for path in ("shards/a", "/data/a", ".", "./pipe:x", "data/2024:01/a", Path("b")):
        assert parse_location(path) == Path(path)
    for url in (
        "s3://bucket/a/b",
        "gs://bucket.of.mine/a",
        "gcs://b/a",
        "https://host:8443/a%20b/c",
        "http://[::1]:80/a",
    ):
        location = parse_location(f"{url}/")
        assert location == ShardUrl(url) == pickle.loads(pickle.dumps(location)) and str(location) == url
        assert f"{location / 'index.json'}" == f"{url}/index.json" and location.name == url.rsplit("/", 1)[-1]
        assert parse_location(location) is location


@pytest.mark.parametrize(
    "text",
    [
        "pipe:cat /etc/passwd",
        "pipe:curl -s https://host/x.tar |",
        "file:///data/shards",
        "local:///data/shards",
        "simplecache::s3://bucket/a",
        "zip://a.tar::s3://bucket/b",
        "ftp://host/a",
        "git://host/a",
        "javascript:x",
        "C:\\shards",
    ],
)
def test_other_schemes_are_refused_before_anything_happens(text: str) -> None:
    with pytest.raises(
        UserError, match=r"not a place that shards are read from; give a folder, or a URL of s3:"
    ) as error:
        parse_location(text)
    assert "passwd" not in str(error.value) and "curl" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a::zip://b",
        "s3://",
        "https:///a",
        "https://host/a/../../b",
        "https://host/a b",
        "https://host/a\n/b",
        "https://ho$(id)st/a",
        "memory://",
        "s3://bucket//a",
    ],
)
def test_urls_of_no_folder_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="not the URL of a folder"):
        parse_location(text)


@pytest.mark.parametrize(
    "text",
    [
        "https://anna:geheim@host/a",
        "s3://AKIA123:gehe/im@bucket/a",
        "https://host/a?X-Amz-Signature=geheim",
        "https://host/a?sv=2&sig=geheim@x",
        "https://host/a#geheim",
    ],
)
def test_keys_in_urls_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match="holds no user, password, query or signature") as error:
        parse_location(text)
    assert "geheim" not in str(error.value) and "im@" not in str(error.value) and "AKIA" not in str(error.value)


def test_a_url_that_went_through_a_path_is_named() -> None:
    with pytest.raises(UserError, match=r"s3:/bucket/a: a URL has two slashes behind s3:"):
        parse_location(Path("s3://bucket/a"))


def test_what_is_written_goes_into_folders() -> None:
    assert parse_folder("shards/a", "panfm shards forget") == Path("shards/a")
    with pytest.raises(UserError, match=r"s3://bucket/a: panfm shards forget changes a shard set.*download the set"):
        parse_folder("s3://bucket/a", "panfm shards forget")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    descriptor = open_regular(tmp_path / "file")
    os.close(descriptor)
    assert get_size(tmp_path / "file") == 4 and get_size(tmp_path / "none") is None
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(UserError, match=rf"{name}: is no regular file"):
            open_regular(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: is no regular file"):
            get_size(tmp_path / name)
    with pytest.raises(UserError, match="none: no such file; the shard set is not whole"):
        open_regular(tmp_path / "none")


def test_ranges_come_as_asked_for(server: RangeServer, tmp_path: Path) -> None:
    url = parse_location(f"{server.url}/file")
    assert isinstance(url, ShardUrl)
    assert fetch(url, 5, 300) == CONTENT[5:300]
    assert fetch(url, 10_200, 99_999, exact=False) == CONTENT[10_200:]
    assert fetch(url, 99_999, 100_000, exact=False) == b""  # HTTP 416
    assert all(headers["Accept-Encoding"] == "identity" for headers in server.headers)
    with (tmp_path / "copy").open("wb") as file:
        copy(url, file, len(CONTENT))
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_what_may_go_away_is_tried_again(server: RangeServer) -> None:
    url = ShardUrl(f"{server.url}/file")
    server.fail_every, server.cut_every = 2, 3
    for start in range(0, 1000, 100):
        assert fetch(url, start, start + 100) == CONTENT[start : start + 100]
    assert server.num_failed >= 10


def test_what_does_not_go_away_is_one_line(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = ShardUrl(f"{server.url}/file")
    server.fail_every = 1
    FastClock.slept = 0.0
    with pytest.raises(UserError, match=r"/file: not to be had in \d+ s of trying \(HTTP 503\); see whether") as error:
        fetch(url, 0, 10)
    assert server.num_requests == len(storage.PATIENT) + 1 and 40 < FastClock.slept < 80
    assert "secret" not in str(error.value)  # of the server's page
    server.forget()
    server.status = 403
    with pytest.raises(UserError, match=r"/file: refused \(HTTP 403\); give the store's credentials in its own way"):
        fetch(url, 0, 10)
    server.fail_every = 0
    with pytest.raises(UserError, match=r"/other: no such file"):
        fetch(ShardUrl(f"{server.url}/other"), 0, 10)
    assert server.num_requests == 2  # neither is asked for twice
    with pytest.raises(UserError, match=r"100 of 200 bytes came from byte 10140 on"):
        fetch(url, 10_140, 10_340)
    server.delay = 5.0
    monkeypatch.setattr(storage, "SECONDS_A_TRY", 0.1)
    with pytest.raises(UserError, match=r"\(\w*TimeoutError\)"):
        fetch(url, 0, 10, pauses=())


def test_a_server_without_ranges_is_named(server: RangeServer) -> None:
    server.ignores_ranges = True
    with pytest.raises(UserError, match=r"sends more than the bytes that were asked for.*must answer Range requests"):
        fetch(ShardUrl(f"{server.url}/file"), 0, 10)


def test_a_dead_address_is_one_line() -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:9/a: not to be had in \d s of trying \(ClientConnectorError\)"):
        fetch(ShardUrl("http://127.0.0.1:9/a"), 0, 10, pauses=(2.0,))


def test_headers_of_the_users_configuration_are_sent(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer x"}})
    assert fetch(ShardUrl(f"{server.url}/file"), 0, 10) == CONTENT[:10]
    assert server.headers[0]["Authorization"] == "Bearer x"


def test_a_store_in_memory_is_read_like_any_other() -> None:
    fsspec.filesystem("memory").pipe("/place/file", CONTENT)
    url = ShardUrl("memory://place/file")
    assert fetch(url, 5, 300) == CONTENT[5:300] and fetch(url, 99_999, 100_000, exact=False) == b""
    with pytest.raises(UserError, match="memory://place/none: no such file"):
        fetch(ShardUrl("memory://place/none"), 0, 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(scheme: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", refuse)
    with pytest.raises(UserError, match=r's3:// needs a package.*not installed; run pip install "panfm\[cloud\]"'):
        fetch(ShardUrl("s3://bucket/a"), 0, 1)
