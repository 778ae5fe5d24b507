"""The documentation: every page can be found, every command that is shown exists with its options, nothing is fetched.

`make docs` builds the site and ends at a broken link or anchor; what needs no build is tested here, without mkdocs.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from docs_hooks.links import ROOT, convert_notebook, find_site_path, list_sources, read_source, rewrite_links
from docs_hooks.resources import list_outside_resources
from panfm.cli.main import app

COMMAND = typer.main.get_command(app)
SHELL_FENCE = re.compile(r"^ *```(?:sh|bash|shell|console)?\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(?P<text>panfm [^`]+)`")
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]  # of click, which some versions of typer carry inside
LAUNCHERS = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:torchrun\b.*?-m |python -m )?(?=panfm\b)")
SCRIPTS = re.compile(r"^.*\blaunch/(?:torchrun\.sh|slurm\.sbatch) ")  # hand their arguments on


def list_commands(text: str) -> Iterator[tuple[str, bool]]:
    """List the panfm commands of Markdown: lines of shell blocks (continued ones joined), and spans (True)."""
    for block in SHELL_FENCE.finditer(text):
        for line in block["text"].replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|(?!\|)|;", line.strip().removeprefix("$ ").removeprefix("- run: ")):
                command = SCRIPTS.sub("panfm pretrain ", LAUNCHERS.sub("", part.strip()))
                if command.startswith("panfm "):
                    yield command, False
    for span in SPAN.finditer(SHELL_FENCE.sub("", text)):
        yield " ".join(span["text"].split()), True


def check_command(line: str, *, is_span: bool = False) -> None:
    """Walk to the command and let its own parser read the rest; AssertionError where a user would get a usage error.

    A span in a sentence, or a line with `...`, may leave out what the command needs.
    """
    words = shlex.split(line, comments=True)[1:]
    stop = next((place for place, word in enumerate(words) if word in {"|", ">"} or word.startswith("2>")), len(words))
    words = [word.rstrip(",") for word in words[:stop]]
    found: Any = COMMAND
    while hasattr(found, "commands"):
        if not words or words[0].startswith("-") or words[0].isupper():  # `panfm --help`, `panfm COMMAND --help`
            return
        if words[0] not in found.commands:
            raise AssertionError(f"{line}: no command {words[0]!r}; there are {', '.join(found.commands)}")
        found = found.commands[words.pop(0)]
    try:
        found.parse_args(typer.Context(found, info_name=found.name), [word for word in words if word != "--debug"])
    except SystemExit:  # --help
        pass
    except USAGE_ERROR as error:
        whole = "..." not in words and not is_span
        if whole or type(error).__name__ not in {"MissingParameter", "BadParameter", "BadOptionUsage"}:
            raise AssertionError(f"{line}: {error.format_message()}") from None


def list_pages() -> list[Path]:
    return [ROOT / "README.md", *(ROOT / source for source in list_sources() if not source.endswith(".ipynb"))]


def read_nav() -> set[str]:
    """The pages of mkdocs.yml's nav."""

    def walk(node: Any) -> Iterator[str]:
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, str):
                yield value
            else:
                yield from walk(value)

    return set(walk(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))


def list_helps(command: Any = COMMAND, name: str = "panfm") -> Iterator[tuple[str, Any]]:
    """Every command without subcommands, by its whole name."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from list_helps(inner, f"{name} {word}")


HELPS = dict(list_helps())
PAGES = [path.relative_to(ROOT).as_posix() for path in list_pages()]


def test_every_page_is_in_the_nav_and_every_entry_is_a_page() -> None:
    assert read_nav() == {find_site_path(source) for source in list_sources()}


@pytest.mark.parametrize("page", PAGES)
def test_commands_shown_exist_with_their_options(page: str) -> None:
    for line, is_span in list_commands((ROOT / page).read_text(encoding="utf-8")):
        check_command(line, is_span=is_span)


@pytest.mark.parametrize("name", HELPS)
def test_examples_in_help_texts_exist_with_their_options(name: str) -> None:
    help_text = HELPS[name].help or ""
    examples = re.findall(r"Example: (.*?)(?:\n\n|\n(?=Example: )|, then\n|\Z)", help_text, re.DOTALL)
    assert examples, f"{name} --help has no example"
    for example in examples:
        line = LAUNCHERS.sub("", " ".join(example.split()))
        assert line.startswith(name), f"the example of {name} is of another command: {line}"
        check_command(line)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("panfm shards built x", "no command 'built'"),
        ("panfm shards build x --root a --out b --proceses 2", "No such option"),
        ("panfm shards build x --root a", "Missing option"),
        ("panfm export a b --out c", "unexpected extra argument"),
        ("panfm shards inspect a --sheet", "requires an argument"),
        ("panfm export runs/first --to pdf --out c", "Invalid value"),
    ],
)
def test_a_command_that_no_longer_exists_is_found(line: str, fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_command(line)


def test_commands_are_found_in_markdown() -> None:
    text = (
        "`panfm runs` and\n\n```sh\nNNODES=2 torchrun --nproc_per_node=8 -m panfm pretrain x \\\n  --out y  # why\n"
        "$ panfm synth a && panfm demo\nsbatch --nodes=4 launch/slurm.sbatch a --out b\n```\n\n"
        "```python\npanfm = 1\n```\n"
    )
    found = [(" ".join(line.split()), is_span) for line, is_span in list_commands(text)]
    assert found == [
        ("panfm pretrain x --out y # why", False),
        ("panfm synth a", False),
        ("panfm demo", False),
        ("panfm pretrain a --out b", False),
        ("panfm runs", True),
    ]


def test_make_docs_builds_and_counts_warnings() -> None:
    """A folder has the name docs, which make would take for the result; and --quiet hides warnings from --strict."""
    planned = subprocess.run(["make", "-n", "docs"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in planned.splitlines() if "mkdocs build" in line]
    assert "--strict" in line
    assert not re.search(r"--quiet|-q\b", line)


def test_links_of_the_checkout_become_links_of_the_site() -> None:
    text, files, faults = rewrite_links(
        "[a](tasks.md#families) [b](../configs/pretrain/debug_cpu.yaml) [c](../launch)"
        " [d](../notebooks/1_features.ipynb)"
        " [e](../CHANGELOG.md) [f](../../secrets.txt) [g](../nowhere.py)\n```\n[i](../nowhere.py)\n```",
        "docs/index.md",
    )
    assert files == ["configs/pretrain/debug_cpu.yaml"]
    assert [fault.split(": ")[0] for fault in faults] == [
        "docs/index.md links to ../../secrets.txt",
        "docs/index.md links to ../nowhere.py",
    ]
    assert text.startswith(
        "[a](tasks.md#families) [b](files/configs/pretrain/debug_cpu.yaml.txt) c [d](notebooks/1_features.md)"
        " [e](CHANGELOG.md) "
    )
    assert text.endswith("```\n[i](../nowhere.py)\n```")


def test_links_of_a_notebook_are_seen_from_its_place() -> None:
    text, _, faults = rewrite_links(
        "[a](../docs/tasks.md#families) [b](2_few_labels.ipynb)", "notebooks/1_features.ipynb"
    )
    assert (text, faults) == ("[a](../tasks.md#families) [b](2_few_labels.md)", [])


def test_no_link_of_any_page_is_broken() -> None:
    for source in [*list_sources(), "README.md"]:
        assert rewrite_links(read_source(source), source)[2] == []


def test_a_notebook_becomes_a_page() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
    ]
    page = convert_notebook({"cells": cells}, "notebooks/x.ipynb")
    assert page.startswith("# Title\ntext\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n")


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://elsewhere.example/x.js"></script>',
        '<img src="//elsewhere.example/x.png">',
        '<img srcset="a.png 1x, https://elsewhere.example/x.png 2x">',
        '<link rel="stylesheet" href="https://elsewhere.example/x.css">',
        '<p style="background: url(https://elsewhere.example/x.png)">',
        "<style>@import 'https://elsewhere.example/x.css';</style>",
        '<pre class="mermaid">graph</pre>',
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_found(page: str) -> None:
    assert list_outside_resources(page)


def test_links_for_readers_and_files_of_the_site_are_no_fault() -> None:
    assert not list_outside_resources(
        '<a href="https://elsewhere.example">x</a><script src="assets/a.js"></script><link href="../a.css">'
        '<svg xmlns="http://www.w3.org/2000/svg"></svg><img src="data:image/png;base64,AAAA//">'
    )
    assert not list_outside_resources("a{background:url(data:image/svg+xml,x)}", is_style=True)
    assert list_outside_resources("@font-face{src:url(https://elsewhere.example/f.woff2)}", is_style=True)
