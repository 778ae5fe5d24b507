"""Commands that read take a set at a URL; commands that write refuse one; nobody gets a command line by it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from panfm.cli.main import main
from tests.data.conftest import build_source
from tests.shards.range_server import RangeServer, serve


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"patient": f"p{n}", "lesion": "", "day": "", "modality": "clinical"} for n in range(4)]
    return build_source(tmp_path_factory.mktemp("built"), "alpha", rows)


@pytest.fixture
def server(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    monkeypatch.setenv("PANFM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serve(built.parent) as running:
        yield running


def panfm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Run a command line in this process: its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["panfm", *words])
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out + err


def test_commands_that_read_take_urls(
    server: RangeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/alpha"
    code, text = panfm(capsys, monkeypatch, "shards", "verify", url, "--processes", "1")
    assert code == 0 and f"{url}: 4 samples in 1 shards: all as the index says" in text
    code, text = panfm(capsys, monkeypatch, "shards", "inspect", url, "--sheet", "sheet.png", "--croissant", "c.json")
    assert code == 0 and "4 images" in text and "screened: not known of a set at a URL" in text
    assert Path("sheet.png").is_file() and Path("c.json").is_file()
    code, text = panfm(capsys, monkeypatch, "report", "--privacy", url)
    assert code == 0 and "not known of a set at a URL" in Path("privacy.md").read_text()


@pytest.mark.slow
def test_an_audit_takes_urls(
    server: RangeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = panfm(capsys, monkeypatch, "audit", "--pretrain", f"{server.url}/alpha", "--tasks", "all")
    assert code == 0 and "inside the pretraining sets" in text and Path("audit/audit.json").is_file()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("shards", "forget", "URL", "--patient", "p0"), marks=pytest.mark.slow),
        ("shards", "review", "URL", "--no-screen", "--all"),
        ("shards", "build", "synthetic", "--root", ".", "--out", "URL"),
    ],
)
def test_commands_that_write_refuse_urls(
    words: tuple[str, ...], server: RangeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/alpha"
    code, text = panfm(capsys, monkeypatch, *(url if word == "URL" else word for word in words))
    assert code == 2 and f"panfm: {url}: panfm shards" in text and "download the set, change it there" in text
    assert server.num_requests == 0 and not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ("shards", "inspect", "pipe:touch ran"),
        ("shards", "verify", "pipe:touch ran"),
        ("report", "--privacy", "pipe:touch ran"),
        *(
            pytest.param(words, marks=pytest.mark.slow)  # loads torch
            for words in (
                ("shards", "forget", "pipe:touch ran", "--patient", "p0"),
                ("audit", "--pretrain", "pipe:touch ran"),
                ("embed", "timm:vit_tiny_patch16_224@random:0", "pipe:touch ran"),
                ("evaluate", "run", "--encoder", "timm:vit_tiny_patch16_224@random:0", "--shards", "pipe:touch ran"),
                ("pretrain", "debug_cpu", "data.shards=['pipe:touch ran']"),
            )
        ),
    ],
)
def test_pipes_are_refused_everywhere(
    words: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = panfm(capsys, monkeypatch, *words)
    assert code == 2 and "panfm: pipe:...: not a place that shards are read from" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_keys_in_a_url_are_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (("shards", "inspect", "URL"), ("pretrain", "debug_cpu", "data.shards=['URL']", "--out", "run")):
        for url in ("s3://KEY:geheim@bucket/a", "https://host/a?sig=geheim"):
            code, text = panfm(capsys, monkeypatch, *(word.replace("URL", url) for word in words))
            assert code == 2 and "geheim" not in text and "holds no user, password, query or signature" in text
    assert not list(tmp_path.iterdir())  # no run folder with the config in it
