"""`panfm demo`: the whole way on a synthetic archive, in minutes, on a computer without a GPU or a network.

    archive -> shards -> pretraining -> export -> linear probe and kNN at 10 % and 100 % of the labels -> board

Every stage calls what the command of the same name calls, and each goes on where an interrupted demo stopped. What
comes out says how the parts fit together; it says nothing about skin: the images are drawn.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from panfm.board.build import build_leaderboard, format_table
from panfm.config import load_config
from panfm.encoder.export import export_encoder
from panfm.evaluation.run import run_evaluation
from panfm.evaluation.run_config import EvaluateConfig
from panfm.evaluation.splits import compute_excluded
from panfm.progress import console, print_output
from panfm.shards.cards import load_card
from panfm.shards.index import open_shard_set
from panfm.shards.synthetic import write_archive
from panfm.shards.writer import BuildOptions, build_shards
from panfm.training.pretrain import PretrainConfig, pretrain

Answer = TypeVar("Answer")

CARDS = ("synthetic", "synthetic_slides")
CONFIG = "demo"  # configs/pretrain/demo.yaml and configs/evaluate/demo.yaml


def run_demo(out: Path, *, num_patients: int = 200, processes: int = 2, overrides: tuple[str, ...] = ()) -> Path:
    """Go the whole way into the folder `out` and return the leaderboard page.

    `overrides` are key.sub=value pairs for configs/pretrain/demo.yaml, for example a shorter schedule.
    """
    started = time.monotonic()
    archive, shards, run, encoder = out / "archive", out / "shards", out / "run", out / "encoder"

    if not (archive / "metadata.csv").is_file():
        _stage(
            f"1/6  a synthetic archive of {num_patients} patients",
            lambda: write_archive(archive, num_patients=num_patients, seed=0, processes=processes),
        )
    for card in CARDS:
        _stage(
            f"2/6  shards of {card}",
            lambda card=card: build_shards(  # type: ignore[misc]
                load_card(card), archive, shards / card, options=BuildOptions(processes=processes)
            ),
        )
    shard_sets = [open_shard_set(shards / card) for card in CARDS]

    folders = ", ".join(str(shards / card) for card in CARDS)
    config = load_config(PretrainConfig, CONFIG, [f"data.shards=[{folders}]", *overrides], folder="configs/pretrain")
    excluded = compute_excluded(config.data.exclude.tasks, shard_sets)
    summary = _stage("3/6  pretraining", lambda: pretrain(config, out=run, excluded=excluded))
    if summary.outcome != "finished":
        raise SystemExit(summary.exit_code)
    _stage("4/6  export", lambda: export_encoder(run, encoder))

    evaluation = load_config(
        EvaluateConfig,
        CONFIG,
        [
            f"shards=[{folders}]",
            f"encoders=[{{name: pretrained in this demo, address: 'panfm:{encoder}'}}, "
            f"{{name: the same at random initialisation, address: 'panfm:{encoder}@random:0'}}]",
            f"out={out / 'results'}",
            f"cache_dir={out / 'cache'}",
        ],
        folder="configs/evaluate",
    )
    measured = _stage("5/6  features, linear probe and kNN", lambda: run_evaluation(evaluation))
    if measured.failures:
        console.print(str(measured), highlight=False, markup=False)
    board = _stage("6/6  leaderboard", lambda: build_leaderboard([out / "results"], out / "leaderboard"))

    print_output(format_table(board))
    page = out / "leaderboard" / "index.html"
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(
        f"\nThe whole way in {minutes} min {seconds} s, on SYNTHETIC images: this shows that the parts fit together, "
        f"and nothing about skin.\nThe page: {page.resolve()}",
        highlight=False,
    )
    return page


def _stage(title: str, work: Callable[[], Answer]) -> Answer:
    """Announce a stage, do it, and say how long it took."""
    console.print(f"[bold]{title}[/bold]")
    started = time.monotonic()
    answer = work()
    console.print(f"     done in {time.monotonic() - started:.0f} s", highlight=False)
    return answer
