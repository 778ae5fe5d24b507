"""`panfm leaderboard`: Results become a static page (build), leave for another's board (submit), come in (verify)."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The board: a pure function of Result files.", no_args_is_help=True)


@app.command("build")
def build(
    results: Annotated[list[Path], typer.Argument(help="Results folders, as `panfm evaluate run --out` wrote them.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html and what belongs to it.")] = Path("leaderboard"),
    audit: Annotated[
        Path | None, typer.Option(help="Audit folder: cells show how many test images pretraining may have seen.")
    ] = None,
    task_audit: Annotated[
        list[Path] | None, typer.Option(help="Folder that `panfm evaluate audit` wrote; repeat the option for several.")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Shard set: pages show patients' images of mistakes, keep them with it; repeat for several."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Local processes, a task each.")] = 2,
) -> None:
    """Build index.html, a page a task, LEADERBOARD.md, leaderboard.csv and .json; equal inputs give equal bytes.

    Example: panfm leaderboard build results --out leaderboard
    """
    from panfm.board.build import build_leaderboard, format_table
    from panfm.progress import print_output

    summary = build_leaderboard(
        results, out, audit, task_audits=task_audit or (), images=images or (), processes=processes
    )
    print_output(format_table(summary))
    typer.echo(f"{out / 'index.html'}: open it in a browser")


@app.command("submit")
def submit(
    results: Annotated[list[Path], typer.Argument(help="Results folders, as `panfm evaluate run --out` wrote them.")],
    out: Annotated[Path, typer.Option(help="The pack to write, one .zip file.")],
    encoder: Annotated[
        list[str] | None, typer.Option(help="Submit this encoder alone; repeat the option for several.")
    ] = None,
    aggregate_only: Annotated[
        bool, typer.Option("--aggregate-only", help="No predictions: figures of at least 20 groups, shown in no rank.")
    ] = False,
    contact: Annotated[
        str | None, typer.Option(help="One line by which the board's owner reaches you; it goes into the pack.")
    ] = None,
) -> None:
    """Pack Results and their predictions into one file for somebody's board, and say what leaves with it.

    Predictions of a source with private identifiers are refused: send figures alone, with --aggregate-only.

    Example: panfm leaderboard submit results --encoder ours --out ours.zip
    """
    from panfm.board.packs.submit import build_pack, write_pack

    outgoing = build_pack(results, encoder or (), aggregate_only=aggregate_only, contact=contact)
    typer.echo(f"{out} is to leave this house with:")
    for line in outgoing.lines:
        typer.echo(f"  {line}")
    written = write_pack(out, outgoing)
    typer.echo(f"{written.path}: {written.num_bytes:,} bytes, SHA-256 {written.sha256}")


@app.command("verify")
def verify(
    packs: Annotated[list[Path], typer.Argument(help="Packs that `panfm leaderboard submit` wrote.")],
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Your own results, or packs accepted before; repeat the option for several folders."),
    ] = None,
    accept: Annotated[
        Path | None, typer.Option(help="Folder for the contents of packs without a refusal, to build the board from.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write what was found here, too.")] = None,
) -> None:
    """Recompute every metric of submitted packs from their predictions and refuse what does not hold.

    A result of an encoder that you measured yourself (--against) becomes verified if all metrics agree. Exit code 1:
    something was refused; a pack with a refusal is not accepted at all.

    Example: panfm leaderboard verify ours.zip --against results --accept accepted
    """
    from panfm.board.packs.check import verify_packs
    from panfm.board.packs.report import describe_reports, format_findings, write_report
    from panfm.progress import print_output

    reports = verify_packs(packs, against or (), accept)
    print_output(format_findings(reports))
    for line in describe_reports(reports):
        typer.echo(line)
    if json is not None:
        write_report(json, reports)
    if any(report.refusals for report in reports):
        raise typer.Exit(1)
