"""Last step of the site: nothing in it is loaded from another host.

In: the built folder. Out: an error that names page and address. Links that a reader follows are not looked at. The
theme's script holds addresses of its own, which it asks for only where a page has diagrams or names a repository;
neither may occur. Only standard library at import: tests/test_docs.py reads this without mkdocs.
"""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)
LOADING = {"src", "srcset", "poster", "data", "action", "formaction", "background"}
FETCHED_BY_THEME = {"mermaid": "a diagram loads mermaid", "md-source": "a repository's figures are asked for"}


class _Finder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        loading = LOADING | ({"href", "imagesrcset"} if tag in {"link", "use", "image", "base"} else set())
        for name in loading & values.keys():
            parts = values[name].split(",") if name.endswith("srcset") else [values[name]]
            self.found += [part.strip() for part in parts if OUTSIDE.match(part)]
        self.found += IN_STYLE.findall(values.get("style", ""))
        for name in FETCHED_BY_THEME.keys() & set(values.get("class", "").split()):
            self.found.append(f"class {name}: {FETCHED_BY_THEME[name]}")


def list_outside_resources(text: str, *, is_style: bool = False) -> list[str]:
    """List what a page (HTML) or a style sheet loads from elsewhere."""
    if is_style:
        return IN_STYLE.findall(text)
    finder = _Finder()
    finder.feed(text)
    return finder.found + IN_STYLE.findall(text)


def on_post_build(*, config: Any) -> None:
    """End the build where the site is not whole in itself."""
    from mkdocs.exceptions import PluginError

    site = Path(config["site_dir"])
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        for found in list_outside_resources(path.read_text(encoding="utf-8"), is_style=path.suffix == ".css"):
            raise PluginError(f"{path.relative_to(site)} loads {found}; everything must lie in the site itself")
