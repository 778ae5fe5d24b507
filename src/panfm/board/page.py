"""The board's page: a Board in, one HTML file out that fetches nothing but the drawing library beside it.

    compute_page_data --JSON--> templates/leaderboard.html.j2 <--inlined-- assets/*.js, board.css

The page's policy (Content-Security-Policy) allows the script below by its hash and files beside the page, nothing else:
a script that got in by a name or a note would not run, and nothing is sent anywhere.
"""

import base64
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from panfm.board.page_data import compute_page_data
from panfm.board.render import build_environment, list_board_tasks
from panfm.board.standings import Board
from panfm.board.words import RESEARCH_ONLY, describe_protocol, describe_rank, describe_score, describe_winner

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("ranking.js", "table.js", "drawings.js", "state.js", "columns.js", "views.js", "parts.js", "board.js")


def render_page(board: Board) -> str:
    """Render index.html; its drawings need `vega.read_bundle()` as assets/vega.js beside it."""
    script = join_scripts(read_asset(name) for name in SCRIPTS)
    page = (
        build_environment()
        .get_template("leaderboard.html.j2")
        .render(
            summary=board.summary,
            tasks=list_board_tasks(board.summary),
            data=embed_json(compute_page_data(board)),
            script=Markup(script),  # noqa: S704, our own files
            style=Markup(read_asset("board.css")),  # noqa: S704
            policy=write_policy(script),
            research_only=RESEARCH_ONLY,
            describe_protocol=describe_protocol,
            describe_rank=describe_rank,
            describe_score=describe_score,
            describe_winner=describe_winner,
        )
    )
    return page.rstrip() + "\n"


def read_asset(name: str) -> str:
    """Read a script or style of the page."""
    return (ASSETS / name).read_text(encoding="utf-8")


def join_scripts(scripts: Iterable[str]) -> str:
    """Put scripts into one block, which is their common scope: no name of theirs meets one of the drawing library."""
    return '"use strict";\n{\n' + "\n".join(scripts) + "}\n"


def embed_json(values: Any) -> Markup:
    """Write values as JSON that cannot end the script element that holds it, whatever a name says."""
    text = json.dumps(values, sort_keys=True, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704, no character of markup is left


def write_policy(script: str) -> str:
    """Write the policy: the script by its hash, others from the page's own folder, no network, styles of drawings.

    `file:` beside 'self': some browsers know no origin of their own for a page that was opened from a disk.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return (
        f"default-src 'none'; script-src 'self' file: 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
