"""`panfm audit`: duplicates inside pretraining sets, and test images among them -> a report and a list."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

SEVERAL = ("--pretrain", "--evaluation")


class SeveralFolders(TyperCommand):
    """Lets one `--pretrain` or `--evaluation` take several folders, as a shell's * gives them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further folder: `--pretrain A B` becomes `--pretrain A --pretrain B`."""
        spread: list[str] = []
        option = ""
        for number, word in enumerate(args):
            if word.startswith("-"):
                option = word if word in SEVERAL else ""
            elif option and number and args[number - 1] != option:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)


def run(
    pretrain: Annotated[list[str], typer.Option(help="Shard sets (folders or URLs) that are trained on.")],
    evaluation: Annotated[list[str] | None, typer.Option(help="Shard sets that tasks test on.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for index.html, audit.parquet, audit.csv, duplicates.csv and audit.json.")
    ] = Path("audit"),
    tasks: Annotated[str, typer.Option(help="all on the evaluation sets, or names separated by commas.")] = "all",
    task_dir: Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")] = None,
    distance: Annotated[
        int, typer.Option(min=0, max=128, help="Bits of 256 that hashes of copies may differ in.")
    ] = 64,
    min_score: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Correlation of the patterns from which a pair is a copy.")
    ] = 0.45,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder address: its features find larger crops. Default: none.")
    ] = None,
    cosine: Annotated[
        float | None,
        typer.Option(min=-1.0, max=1.0, help="Threshold for --encoder. Default: from images of different groups."),
    ] = None,
    inside: Annotated[bool, typer.Option(help="Look for duplicates inside the pretraining sets, too.")] = True,
    shown: Annotated[int, typer.Option(min=0, help="Pairs of each method on the page.")] = 100,
    device: Annotated[str, typer.Option(help="For --encoder: cpu, cuda or cuda:1.")] = "cpu",
    cache: Annotated[Path, typer.Option(help="Feature cache for --encoder.")] = Path("cache/features"),
) -> None:
    """Find duplicates and leaks: images of the pretraining sets that tasks test on, as copies or as the same patient.

    The list is read by `panfm pretrain ... data.exclude.audit=DIR`, which leaves the images out, and by `panfm
    leaderboard build ... --audit DIR`, which flags them. The page shows images of patients: keep it with the shards.

    Example: panfm audit --pretrain shards/isic2019 --evaluation shards/ham10000 --out audit
    """
    from panfm.evaluation.contamination import AuditSettings, run_audit

    settings = AuditSettings(
        distance=distance,
        min_score=min_score,
        encoder=encoder,
        cosine=cosine,
        inside=inside,
        num_shown=shown,
        device=device,
        cache_dir=cache,
    )
    chosen = [name.strip() for name in tasks.split(",") if name.strip()]
    summary = run_audit(
        pretrain,
        evaluation or [],
        out=out,
        tasks="all" if chosen == ["all"] else chosen,
        task_dir=task_dir,
        settings=settings,
    )
    typer.echo(str(summary))
