"""The notebooks run, and print what they are committed with: the same words, and numbers within a tolerance.

`python -m tests.test_notebooks` writes the outputs anew. All share one kernel, whose names are reset between them, so
that torch is imported once.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
TOLERANCE = 0.11  # another version of torch rounds otherwise, and an image may pass another in a ranking
MAX_PRINTED = 1500  # characters a notebook: outputs are small enough to be read in a diff


def read_notebook(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def run_notebooks(paths: Sequence[Path]) -> dict[str, Any]:
    """Run the notebooks one after the other in one kernel; errors become outputs."""
    every = [read_notebook(path) for path in paths]
    merged = nbformat.v4.new_notebook()
    for notebook in every:
        merged.cells += [*notebook.cells, nbformat.v4.new_code_cell("%reset -f")]
    client = NotebookClient(
        merged, timeout=300, allow_errors=True, resources={"metadata": {"path": str(ROOT / "notebooks")}}
    )
    client.execute()
    return dict(zip((path.stem for path in paths), every, strict=True))


def collect_printed(notebook: Any) -> list[str]:
    """What each code cell wrote to its standard output, and its error; progress on stderr is not kept."""
    printed = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        texts = [output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout"]
        texts += [f"{output.ename}: {output.evalue}\n" for output in cell.outputs if output.output_type == "error"]
        assert not [output for output in cell.outputs if output.output_type in {"execute_result", "display_data"}], (
            f"print what a reader should see, so that it is plain text: {cell.source[-200:]}"
        )
        printed.append("".join(texts))
    return printed


def split_numbers(text: str) -> tuple[str, list[float]]:
    """Take the numbers out of a text, and what their widths did to its columns."""
    return " ".join(NUMBER.sub("#", text).split()), [float(number) for number in NUMBER.findall(text)]


@pytest.fixture(scope="module")
def executed() -> dict[str, Any]:
    return run_notebooks(NOTEBOOKS)


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


@pytest.mark.slow  # 25 s of a processor for all three
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_prints_what_it_is_committed_with(path: Path, executed: dict[str, Any]) -> None:
    committed, now = collect_printed(read_notebook(path)), collect_printed(executed[path.stem])
    for place, (before, after) in enumerate(zip(committed, now, strict=True)):
        words_before, numbers_before = split_numbers(before)
        words_after, numbers_after = split_numbers(after)
        assert words_after == words_before, f"code cell {place}; `python -m tests.test_notebooks` writes it anew"
        assert numbers_after == pytest.approx(numbers_before, abs=TOLERANCE), f"code cell {place}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_plain(path: Path) -> None:
    """Text alone, no counters, no folders of a machine, no progress, nothing that a viewer left behind."""
    notebook = read_notebook(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"}
    assert all(not cell.metadata for cell in notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None for cell in code)
    assert all(output.output_type == "stream" and output.name == "stdout" for cell in code for output in cell.outputs)
    printed = "".join(collect_printed(notebook))
    assert 100 < len(printed) < MAX_PRINTED
    assert not re.search(r"/tmp|/home|/root|/work", printed)
    assert "not a diagnosis" in notebook.cells[-1].source or "do not show that any is safe" in notebook.cells[-1].source


def write_outputs() -> None:
    """Run the notebooks and commit what they print to their files."""
    for path, notebook in zip(NOTEBOOKS, run_notebooks(NOTEBOOKS).values(), strict=True):
        plain = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in plain["cells"] if cell["cell_type"] == "code"]
        for cell, text in zip(code, collect_printed(notebook), strict=True):
            lines = text.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        path.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_outputs()
