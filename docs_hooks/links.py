"""Second step of the site: what the checkout links to becomes a page, a file or a word of the site.

    docs/*.md, notebooks/*.ipynb, CONTRIBUTING.md, CHANGELOG.md  ->  pages
    [text](../configs/x.yaml)                                    ->  a copy of that file below files/, as plain text
    [text](../launch)                                            ->  the text alone: a folder has no page

So one relative link works where the file lies in a checkout and on the site, and no host is guessed. A link to a file
that does not exist ends the build. Only standard library at import: tests/test_docs.py reads this without mkdocs.
"""

import json
import logging
import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOP_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")
TEXT_SUFFIXES = {".yaml", ".yml", ".py", ".toml", ".md", ".sh", ".sbatch", ".json", ".csv", ".txt", ""}
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
log = logging.getLogger("mkdocs.hooks.links")


def find_site_path(path: str) -> str | None:
    """Say where a file of the checkout (`docs/tasks.md`) is on the site (`tasks.md`); None for a folder.

    Raises FileNotFoundError for a path that is not in the checkout, ValueError for one that is no text.
    """
    where = ROOT / path
    if path.startswith("..") or not where.exists():
        raise FileNotFoundError(path)
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if where.is_dir():
        return None
    if path in TOP_PAGES:
        return path
    if where.suffix == ".ipynb":
        return str(Path(path).with_suffix(".md"))
    if where.suffix not in TEXT_SUFFIXES:
        raise ValueError(f"{path} is no text; link to a page that shows it")
    return f"files/{path}.txt"


def rewrite_links(markdown: str, source: str) -> tuple[str, list[str], list[str]]:
    """Rewrite the links of a page that lies at `source` in the checkout.

    Returns the text, the files of the checkout that it links to and that are no pages, and the faults.
    """
    faults: list[str] = []
    files: list[str] = []
    here = find_site_path(source) or ""

    def replace(match: re.Match[str]) -> str:
        target = normpath((Path(source).parent / match["path"]).as_posix())
        try:
            place = find_site_path(target)
        except (FileNotFoundError, ValueError) as error:
            faults.append(f"{source} links to {match['path']}: {error} ({type(error).__name__})")
            return match[0]
        if place is None:
            return match["text"]
        if place.startswith("files/"):
            files.append(target)
        return f"[{match['text']}]({relpath(place, Path(here).parent.as_posix())}{match['anchor'] or ''})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code is not rewritten
        parts += [LINK.sub(replace, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replace, markdown[end:])]), files, faults


def convert_notebook(notebook: dict[str, Any], name: str) -> str:
    """Write a notebook (format 4) as Markdown: its texts, its code, and what the code printed."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"]).rstrip()
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        printed = "".join(_read_output(output) for output in cell["outputs"]).rstrip()
        if printed:
            parts.append(f"```text\n{printed}\n```")
    parts.append(f"*[{name}](../{name}), run by the tests; its outputs are held to what it prints there.*")
    return "\n\n".join(parts) + "\n"


def _read_output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return "".join(output["text"])
    return "".join(output["data"]["text/plain"]) + "\n"


def read_source(source: str) -> str:
    """Read a page of the checkout as Markdown."""
    text = (ROOT / source).read_text(encoding="utf-8")
    return convert_notebook(json.loads(text), source) if source.endswith(".ipynb") else text


def list_sources() -> list[str]:
    """List the files of the checkout that are pages of the site."""
    found = [*ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    return [*sorted(path.relative_to(ROOT).as_posix() for path in found), *TOP_PAGES]


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages from outside of docs/, and copies of the files that pages link to."""
    from mkdocs.structure.files import File

    for source in list_sources():
        text, linked, faults = rewrite_links(read_source(source), source)
        for fault in faults:
            log.warning(fault)
        if not source.startswith("docs/"):
            files.append(File.generated(config, find_site_path(source), content=text))
        for path in linked:
            place = f"files/{path}.txt"
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page of docs/."""
    if page.file.generated_by:
        return markdown
    return rewrite_links(markdown, f"docs/{page.file.src_uri}")[0]
