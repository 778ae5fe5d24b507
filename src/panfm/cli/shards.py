"""`panfm shards`: raw images and slides -> tar shards + index, and a look inside."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Turn an archive into shards, and look inside them.", no_args_is_help=True)


@app.command("build")
def build(
    card: Annotated[
        str, typer.Argument(help="Source card: a YAML file, or the name of a shipped one (panfm shards cards).")
    ],
    root: Annotated[Path, typer.Option(help="Folder of the raw images, laid out as the card says.")],
    out: Annotated[str, typer.Option(help="Folder of the shard set to write.")],
    key_file: Annotated[
        Path | None,
        typer.Option(help="Secret key for the ids of private sources, outside --out."),
    ] = None,
    create_key: Annotated[bool, typer.Option(help="Make the key file, once; then keep it safe.")] = False,
    use: Annotated[
        Literal["research", "education", "commercial"],
        typer.Option(help="What the shards are for; the card must permit it."),
    ] = "research",
    processes: Annotated[int, typer.Option(min=1, help="Local processes.")] = 2,
    executor: Annotated[str, typer.Option(help="local (processes) or dask (a cluster).")] = "local",
    scheduler: Annotated[
        str | None, typer.Option(help="With dask: tcp://host:8786, or the path of the scheduler file.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Build option as key=value, for example --set short_side=384")
    ] = None,
) -> None:
    """Build shards; a build that was killed goes on where it stopped, and ends with the same bytes.

    Example: panfm shards build synthetic --root archive --out shards/synthetic
    """
    from panfm.config import merge, parse_override, validate
    from panfm.shards.cards import load_card
    from panfm.shards.storage import parse_folder
    from panfm.shards.writer import BuildOptions, build_shards

    folder = parse_folder(out, "panfm shards build --out")
    values: dict[str, object] = {
        "processes": processes,
        "key_file": str(key_file) if key_file else None,
        "create_key": create_key,
        "use": use,
        "executor": executor,
        "scheduler": scheduler,
    }
    for override in overrides or ():
        values = merge(values, parse_override(override))
    report = build_shards(load_card(card), root, folder, options=validate(BuildOptions, values, where="--set"))
    typer.echo(str(report))


@app.command("draft")
def draft(
    folder: Annotated[Path, typer.Argument(help="Folder of the raw images.")],
    table: Annotated[
        Path | None, typer.Option(help="Table of the images (.csv .xlsx ...) inside it; without: class folders.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the source; default: that of the folder.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write; the report holds raw ids.")] = Path(),
    force: Annotated[bool, typer.Option(help="Replace an earlier draft, answers included.")] = False,
) -> None:
    """Propose a source card for an archive as a hospital keeps it, and report what contradicts itself in its table.

    Example: panfm shards draft archive --table archive/export.xlsx --name north_clinic
    """
    from panfm.shards.drafting.draft import draft_card, write_draft

    drafted = draft_card(folder, table, name)
    paths = write_draft(drafted, out, force=force)
    typer.echo(str(drafted))
    for path in paths:
        typer.echo(str(path))


@app.command("inspect")
def inspect(
    folders: Annotated[list[str], typer.Argument(help="Shard sets: folders or URLs.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of images to this PNG.")] = None,
    datasheet: Annotated[Path | None, typer.Option(help="Write a datasheet to this .md file.")] = None,
    croissant: Annotated[Path | None, typer.Option(help="Write Croissant metadata to this .json file.")] = None,
) -> None:
    """Show what shard sets hold: counts by modality, label, site, phototype, age, what is missing, sizes, review.

    Example: panfm shards inspect shards/synthetic --sheet sheet.png --datasheet shards/synthetic/datasheet.md
    --croissant shards/synthetic/croissant.json
    """
    from panfm.errors import UserError
    from panfm.shards.datasheet import write_croissant, write_datasheet
    from panfm.shards.index import open_shard_set
    from panfm.shards.inspect import draw_contact_sheet, format_total, summarise

    if len(folders) > 1 and (sheet or datasheet or croissant):
        raise UserError(
            f"--sheet, --datasheet and --croissant describe one shard set, {len(folders)} are given; run it for each"
        )
    shard_sets = [open_shard_set(folder) for folder in folders]
    summaries = [summarise(shard_set) for shard_set in shard_sets]
    typer.echo("\n\n".join(map(str, summaries)))
    if len(summaries) > 1:
        typer.echo("\n" + format_total(summaries))
    for write, path, what in (
        (draw_contact_sheet, sheet, "contact sheet"),
        (write_datasheet, datasheet, "datasheet"),
        (write_croissant, croissant, "Croissant metadata"),
    ):
        if path is not None:
            write(shard_sets[0], path)
            typer.echo(f"{path}: {what}")


@app.command("review")
def review(
    folder: Annotated[str, typer.Argument(help="A shard set.")],
    sample: Annotated[int, typer.Option(min=0, help="Images without a flag to look at too, chosen by chance.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="All images without a flag too.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="Images on one sheet; the next sheet shows the next.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the sample.")] = 0,
    screen: Annotated[bool, typer.Option("--screen/--no-screen", help="Screen first, if not yet done.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Local processes for the screening.")] = 2,
    decisions: Annotated[
        Path | None, typer.Option(help="Record the decisions of this CSV file (key, decision) and carry them out.")
    ] = None,
    by: Annotated[str, typer.Option(help="With --decisions: initials of who decided.")] = "",
) -> None:
    """Flag likely faces, eyes and writing, write a sheet for a person to decide, record what was decided.

    The screening misses many: in our tests it found nine in ten pasted lines of print, half of those in a thin script,
    and it does not know tattoos, hands, or faces that are turned, covered or cropped. Only --all shows everything. A
    person opens review/index.html in a browser and saves decisions.csv; `remove` takes images out of the shards.

    Example: panfm shards review shards/clinic --sample 200, then
    panfm shards review shards/clinic --decisions decisions.csv --by AB
    """
    from panfm.shards.index import open_shard_set
    from panfm.shards.review import read_flags, read_review_state, record_decisions, write_flags, write_sheet
    from panfm.shards.storage import parse_folder

    path = parse_folder(folder, "panfm shards review")
    if decisions is not None:
        typer.echo(f"{folder}: {record_decisions(path, decisions, by=by)}")
        typer.echo(str(read_review_state(open_shard_set(path))))
        return
    shard_set = open_shard_set(path)
    if screen and len(read_flags(shard_set)[0]) < shard_set.num_samples:
        write_flags(shard_set, processes=processes)
    typer.echo(str(read_review_state(shard_set)))
    written = write_sheet(shard_set, sample=sample, everything=everything, limit=limit, seed=seed)
    waiting = f", {written.num_waiting:,} more wait for the next sheet" if written.num_waiting else ""
    typer.echo(f"{written.path}: {written.num_shown:,} images to decide on{waiting}; open it in a browser")


@app.command("verify")
def verify(
    folders: Annotated[list[str], typer.Argument(help="Shard sets: folders or URLs.")],
    deep: Annotated[bool, typer.Option("--deep", help="Decode every image too, and compare it with its row.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Local processes.")] = 2,
) -> None:
    """Check every byte of every tar against the index: hashes, members, metadata, masks; exit code 1 on a fault.

    Example: panfm shards verify shards/synthetic --deep
    """
    from panfm.shards.verify import verify_shard_set

    checked = [verify_shard_set(folder, deep=deep, processes=processes) for folder in folders]
    for verification in checked:
        typer.echo(str(verification))
    raise typer.Exit(1 if any(verification.faults for verification in checked) else 0)


@app.command("forget")
def forget(
    folders: Annotated[list[str], typer.Argument(help="Shard sets.")],
    patient: Annotated[
        str | None,
        typer.Option(help="The patient's id as in the archive, or hashed (p and 16 hexadecimal characters)."),
    ] = None,
    key: Annotated[list[str] | None, typer.Option(help="Key of a single sample; repeat for several.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Secret key of the ids, for private sources.")] = None,
    features: Annotated[list[Path] | None, typer.Option(help="Folder of cached features: cleared.")] = None,
    results: Annotated[list[Path] | None, typer.Option(help="Folder with results or predictions: listed.")] = None,
    runs: Annotated[list[Path] | None, typer.Option(help="Run folder, or a folder of runs: listed.")] = None,
    exports: Annotated[list[Path] | None, typer.Option(help="Export, or a folder of exports: listed.")] = None,
    task_dir: Annotated[Path | None, typer.Option(help="Folder with task cards of your own.")] = None,
    report: Annotated[Path | None, typer.Option(help="CSV file to write with all that had used the patient.")] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Only complete a removal that was cut off.")] = False,
) -> None:
    """Remove a patient who withdrew consent from shards and caches; list what had used the patient.

    Weights that were trained on the patient do not forget: they are listed for a person to decide. The raw archive, its
    backups and copies of the shards are yours to clean; stop whatever reads the shards first.

    Example: panfm shards forget shards/clinic --patient 00417 --key-file clinic.key --features cache/features
    --results results --runs runs --exports exports --report forgotten.csv
    """
    from panfm.cli.forgetting import forget_samples
    from panfm.shards.storage import parse_folder

    forget_samples(
        [parse_folder(folder, "panfm shards forget") for folder in folders],
        patient=patient,
        keys=key or (),
        key_file=key_file,
        features=features or (),
        results=results or (),
        runs=runs or (),
        exports=exports or (),
        task_dir=task_dir,
        report=report,
        finish=finish,
    )


@app.command("check")
def check(
    card: Annotated[str, typer.Argument(help="Source card: a YAML file, or the name of a shipped one.")],
    root: Annotated[Path, typer.Option(help="Folder of the raw images, laid out as the card says.")],
    images: Annotated[int, typer.Option(min=0, help="Images to open, chosen by chance.")] = 64,
    seed: Annotated[int, typer.Option(help="Of that choice.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the findings to this JSON file too.")] = None,
) -> None:
    """Say before a long build what is missing or different from the card; exit code 1 if something is.

    Example: panfm shards check ham10000 --root archive
    """
    from panfm.files import write_json
    from panfm.shards.cards import load_card
    from panfm.shards.check import check_archive

    findings = check_archive(load_card(card), root, num_sampled=images, seed=seed)
    typer.echo(str(findings))
    if json_file is not None:
        write_json(json_file, findings.to_plain())
    raise typer.Exit(0 if findings.is_as_expected else 1)


@app.command("cards")
def cards() -> None:
    """List the shipped source cards.

    Example: panfm shards cards
    """
    from panfm.shards.cards import list_cards, load_card

    for name in list_cards():
        card = load_card(name)
        typer.echo(f"{name:<24} {card.licence:<16.16} {card.title}")
