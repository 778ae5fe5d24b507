"""The last step of the way: Result files in (and, where asked for, images), static pages and their tables out.

    results/ --verify--> standings --report-------> index.html, LEADERBOARD.md, leaderboard.csv, leaderboard.json
                             `-----task_report--> tasks/TASK.html

A pure function of its inputs: the same Results give the same bytes, wherever and whenever it runs.
"""

from collections.abc import Sequence
from pathlib import Path

from panfm.board.page import read_asset, render_page
from panfm.board.render import format_table, render_csv, render_json, render_markdown
from panfm.board.standings import compute_standings
from panfm.board.summary import LeaderboardSummary
from panfm.board.task_errors import open_image_sets, show_mistakes
from panfm.board.task_report import render_task_page
from panfm.board.vega import read_bundle
from panfm.evaluation.contamination_list import read_audit
from panfm.files import write_text

__all__ = ["LeaderboardSummary", "build_leaderboard", "format_table"]


def build_leaderboard(
    result_roots: Sequence[Path],
    out: Path,
    audit: Path | None = None,
    *,
    task_audits: Sequence[Path] = (),
    images: Sequence[Path] = (),
    processes: int = 1,
) -> LeaderboardSummary:
    """Build the board of all Results below `result_roots` in the folder `out` and return what it shows.

    audit: a folder that `panfm audit` wrote; cells then say how many of their test images pretraining may have seen.
    task_audits: folders that `panfm evaluate audit` wrote: how well features tell the institution.
    images: shard sets; the pages of their tasks then show the surest mistakes, and must stay where the shards may lie.
    processes: tasks are worked through side by side; the bytes are the same.

    Everything is computed before the first file is written. Raises UserError for Results that cannot be trusted or
    compared (see `verify`), naming the file.
    """
    seen = None if audit is None else read_audit(audit)
    image_sets = open_image_sets(images)
    board = compute_standings(result_roots, seen, task_audits=task_audits, processes=processes)
    summary = board.summary
    texts = {
        "leaderboard.json": render_json(summary),
        "leaderboard.csv": render_csv(summary),
        "LEADERBOARD.md": render_markdown(summary),
        "index.html": render_page(board),
        "assets/vega.js": read_bundle(),
        "assets/vega-licences.txt": read_asset("vega-licences.txt"),  # its terms: they go where it goes
        **{
            f"tasks/{page.task.slug}.html": render_task_page(
                summary,
                page,
                show_mistakes({one.encoder: one.mistakes for one in page.encoders}, page.source, image_sets),
            )
            for page in board.pages
        },
    }
    for name, text in texts.items():
        write_text(Path(out) / name, text)
    return summary
