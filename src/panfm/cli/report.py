"""`panfm report`: pages that people write by hand elsewhere: a model card, a paper's tables, pictures, privacy."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    named: Annotated[
        list[str] | None,
        typer.Argument(help="The encoder of a model card; after --paper or --privacy further folders."),
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Model card: results folder with this encoder; repeat for several.")
    ] = None,
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Shard set, a folder or URL: its patients are counted, or pictured; repeat for several."),
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="Model card, paper: folder that `panfm audit` wrote.")] = None,
    paper: Annotated[
        list[Path] | None, typer.Option("--paper", help="Write a paper's tables, figures and methods of these results.")
    ] = None,
    pictures: Annotated[
        str | None, typer.Option("--pictures", help="Draw the features of this encoder on the shard sets.")
    ] = None,
    privacy: Annotated[
        list[str] | None,
        typer.Option("--privacy", help="A shard set, a folder or URL; repeat the option for several."),
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Pictures: name of a label to colour by; default: the commonest.")
    ] = None,
    num: Annotated[int, typer.Option(min=10, help="Pictures: images to draw, at random.")] = 2000,
    seed: Annotated[int, typer.Option(help="Pictures: of the random choice, and of UMAP.")] = 0,
    umap: Annotated[bool, typer.Option("--umap", help="Pictures: UMAP too (extra `pictures`), not PCA alone.")] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Pictures: also a sheet of images with their nearest; it shows patients.")
    ] = False,
    query: Annotated[
        list[str] | None, typer.Option(help="Pictures: key of an image for the sheet; default: twelve at random.")
    ] = None,
    nearest: Annotated[int, typer.Option(min=1, help="Pictures: neighbours of each image on the sheet.")] = 6,
    cache: Annotated[Path, typer.Option(help="Pictures: folder of cached features.")] = Path("cache/features"),
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write: model_card, paper or pictures. Privacy: a Markdown file, privacy.md."),
    ] = None,
    age_band: Annotated[int, typer.Option(min=1, help="Privacy: width of age classes for k-anonymity, in years.")] = 5,
    processes: Annotated[int, typer.Option(min=1, help="Model card, paper: local processes, a task each.")] = 2,
) -> None:
    """Write a model card of an encoder, or (one of --paper, --pictures, --privacy) another page; research only.

    Example: panfm report panfm:exports/first --results results --shards shards/ham10000

    Example: panfm report --paper results --shards shards/ham10000 --out paper

    Example: panfm report --pictures panfm:exports/first --shards shards/ham10000 --label diagnosis

    Example: panfm report --privacy shards/clinic --out privacy.md
    """
    from panfm.errors import UserError

    modes = {"--paper": paper, "--pictures": pictures, "--privacy": privacy}
    given = [name for name, value in modes.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)}: one report at a time; run the command once for each")
    more = named or []
    if privacy:
        _write_privacy([*privacy, *more], out or Path("privacy.md"), age_band)
    elif paper:
        _write_paper([*paper, *map(Path, more)], shards or [], audit, out or Path("paper"), processes)
    elif pictures:
        if more or not shards:
            raise UserError("--pictures ENCODER needs shard sets and nothing else beside it: add --shards DIR")
        _draw_pictures(
            pictures, shards, label or [], query or [], out or Path("pictures"), cache,
            num=num, seed=seed, umap=umap, images=images, nearest=nearest,
        )  # fmt: skip
    elif len(more) == 1:
        _write_card(more[0], results or [], shards or [], audit, out or Path("model_card"), processes)
    else:
        raise UserError(
            f"{len(more)} encoders were named ({', '.join(more) or 'none'}); a model card is of one: panfm report "
            "ENCODER; or give one of --paper RESULTS, --pictures ENCODER, --privacy SHARDS"
        )


def _write_privacy(folders: list[str], out: Path, age_band: int) -> None:
    """Data flow, fields kept, k-anonymity of the metadata, retention and key custody; counts, never rows."""
    from panfm.shards.index import open_shard_set
    from panfm.shards.privacy_page import write_privacy_report
    from panfm.shards.privacy_report import build_privacy_report

    report = build_privacy_report([open_shard_set(folder) for folder in folders], age_band=age_band)
    for path in write_privacy_report(report, out):
        typer.echo(str(path))
    typer.echo(f"{report.num_open} open points" if report.num_open else "no open points")


def _write_card(
    encoder: str, results: list[Path], shards: list[str], audit: Path | None, out: Path, processes: int
) -> None:
    from panfm.board.reports.document import describe_blanks
    from panfm.board.reports.model_card import build_model_card, write_model_card
    from panfm.board.reports.model_card_facts import collect_facts

    found = collect_facts(encoder, results, shards, audit, processes=processes)
    for path in write_model_card(found, out):
        typer.echo(str(path))
    typer.echo(describe_blanks(build_model_card(found)))


def _write_paper(results: list[Path], shards: list[str], audit: Path | None, out: Path, processes: int) -> None:
    from panfm.board.reports.document import describe_blanks
    from panfm.board.reports.paper import write_paper
    from panfm.board.reports.paper_facts import collect_paper_facts

    document = write_paper(collect_paper_facts(results, shards, audit, processes=processes), out)
    typer.echo(f"{out / 'report.html'}: with report.md, {len(document.figures)} figures, {len(document.tables)} tables")
    typer.echo(describe_blanks(document))


def _draw_pictures(
    address: str,
    shards: list[str],
    labels: list[str],
    queries: list[str],
    out: Path,
    cache: Path,
    *,
    num: int,
    seed: int,
    umap: bool,
    images: bool,
    nearest: int,
) -> None:
    from panfm.board.reports import neighbours, pictures
    from panfm.encoder.load import load_encoder
    from panfm.errors import UserError
    from panfm.shards.index import open_shard_set

    if queries and not images:
        raise UserError("--query names an image of the sheet, which is written only with --images: add it")
    if umap:
        pictures.check_umap()
    encoder, shard_sets = load_encoder(address), [open_shard_set(folder) for folder in shards]
    points = pictures.collect_points(
        encoder, shard_sets, num_points=num, seed=seed, labels=labels, keys=queries, cache_dir=cache
    )
    projections = [pictures.project_pca(points.values)]
    if umap:
        projections.append(pictures.project_umap(points.values, seed))
    pictures.write_pictures(pictures.build_pictures(encoder, points, projections), out)
    typer.echo(str(out / "pictures.html"))
    if images:
        chosen = neighbours.choose_queries(points, shard_sets, 12, seed, queries)
        typer.echo(str(neighbours.write_neighbours(points, shard_sets, chosen, nearest, out, encoder.name)))
        typer.echo(neighbours.WARNING, err=True)
