"""A submission to somebody's board: Results of this archive in, one file that may leave it out.

    results/ --test Results of the chosen encoders, checked--> members --manifest--> PACK.zip, and its content in words
    results/ --aggregate only--> figures of at least MIN_SHOWN_GROUPS groups, no predictions --> PACK.zip

Predictions name every test unit by a hashed key. Under a published key (source cards with `identifiers: public`) the
key means the same to everybody, and others can check the images. Under a secret key it means nothing to others, and it
must not leave: such Results go as aggregates or not at all. What is not known to be public counts as private.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from panfm import __version__
from panfm.board.packs.aggregate import Aggregate, Left, compute_aggregates
from panfm.board.packs.format import (
    AGGREGATES,
    RESULTS,
    Manifest,
    check_contact,
    check_contents,
    declare_encoders,
    encode_json,
    list_members,
    write_archive,
)
from panfm.board.packs.images import check_images, find_shipped_card
from panfm.board.packs.tables import read_strictly
from panfm.board.packs.texts import check_no_paths
from panfm.board.standings import compute_standings
from panfm.board.verify import check_unique, read_test_set
from panfm.errors import UserError
from panfm.evaluation.results import PREDICTIONS_SCHEMA, EncoderCard, Result, get_result_path, read_results
from panfm.files import compute_file_sha256
from panfm.measures.subgroups import MIN_SHOWN_GROUPS
from panfm.shards.cards import list_cards, load_card

Identifiers = Literal["public", "private", "unknown"]
VERSIONS = ("python", "panfm", "numpy", "scipy", "torch", "timm")  # what can change a number; nothing of the machine


@dataclass(frozen=True)
class Outgoing:
    """What is about to leave: the files, and what a data protection officer should know of them, a line each."""

    manifest: Manifest
    contents: dict[str, bytes]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Written:
    """A pack on disk."""

    path: Path
    num_bytes: int
    sha256: str


def build_pack(
    roots: Sequence[Path],
    encoders: Sequence[str] = (),
    *,
    aggregate_only: bool = False,
    contact: str | None = None,
) -> Outgoing:
    """Gather what is submitted of the Results below `roots`: those on test folds, of `encoders` (all, if empty).

    Raises UserError for an encoder that has no Result, for Results that cannot be trusted (see `verify`), for
    predictions of a source whose identifiers are private or unknown, and for a text that holds a path of this machine.
    """
    if contact is not None:
        check_contact(contact)
    found = read_results(roots)
    check_unique(found)
    known = sorted({result.encoder.name for _, result in found})
    if missing := sorted(set(encoders) - set(known)):
        raise UserError(f"encoder {missing[0]!r}: no Result of it below {_join(roots)}; there are {', '.join(known)}")
    chosen = [(path, result) for path, result in found if not encoders or result.encoder.name in encoders]
    tested = [(path, result) for path, result in chosen if result.evaluated_on == "test"]
    if not tested:
        raise UserError(f"{_join(roots)}: no Result on a test fold; `panfm evaluate run` with evaluate_on: test")
    num_development = len(chosen) - len(tested)
    if aggregate_only:
        return _build_aggregates(roots, tested, num_development, contact)
    return _build_results(tested, num_development, contact)


def write_pack(out: Path, outgoing: Outgoing) -> Written:
    """Write the pack atomically: equal contents give equal bytes."""
    if out.suffix != ".zip":
        raise UserError(f"--out {out}: a pack is a zip file; call it {out.name}.zip")
    write_archive(out, outgoing.manifest, outgoing.contents)
    return Written(out, out.stat().st_size, compute_file_sha256(out))


def find_identifiers(task: str) -> tuple[str | None, Identifiers]:
    """The source of a shipped task and whether its keys are hashed with a published or a secret key."""
    card = find_shipped_card(task)
    if card is None:
        return None, "unknown"
    path = list_cards().get(card.source)  # not by name alone: a file of that name in this folder is no shipped card
    return card.source, "unknown" if path is None else load_card(path).identifiers


def shorten_address(address: str) -> str:
    """An encoder's address without folders: which encoder, not where it lies on this machine."""
    scheme, _, rest = address.partition(":")
    body, mark, options = rest.partition("?")
    target, at, weights = body.partition("@")
    if scheme != "timm" or target.startswith(("/", ".", "~")):
        target = re.split(r"[\\/]", target.rstrip("\\/"))[-1]
    if at and not weights.startswith("random:"):
        weights = re.split(r"[\\/]", weights)[-1]
    return f"{scheme}:{target}{at}{weights}{mark}{options}"


def _build_results(tested: Sequence[tuple[Path, Result]], num_development: int, contact: str | None) -> Outgoing:
    contents: dict[str, bytes] = {}
    cards: list[tuple[str, EncoderCard]] = []
    columns: set[str] = set()
    unchecked: set[str] = set()
    num_rows = 0
    for path, result in tested:
        source, identifiers = find_identifiers(result.task)
        if identifiers != "public":
            why = (
                f"its source {source} has identifiers: private" if source else "its source is unknown, so it is private"
            )
            raise UserError(
                f"{path}: predictions of task {result.task} may not leave: {why}; submit them with --aggregate-only, "
                "or leave the encoder or the folder out"
            )
        test_set = read_test_set(path, result)
        num_rows += len(read_strictly(path.parent / result.predictions, result))
        # Keys of another archive under a public task's name would be private ones.
        if not check_images(result, test_set).is_checked:
            unchecked.add(result.task)
        data = (path.parent / result.predictions).read_bytes()
        clean = _clean(result)
        name = get_result_path(Path(RESULTS), clean)
        _add(contents, path, name.as_posix(), encode_json(clean.model_dump(mode="json")))
        _add(contents, path, name.with_suffix(".parquet").as_posix(), data)
        check_contents(path, contents)
        cards.append((result.task, clean.encoder))
        columns |= set(test_set.subgroups)
    manifest = _build_manifest(contents, cards, contact, aggregate_only=False)
    units = {(one.task, one.unit): f"{one.num_test} of {one.num_test_groups} groups" for _, one in tested}
    sources = sorted({f"{find_identifiers(task)[0]}" for task, _ in units})
    lines = [
        *_describe_files(contents, manifest, num_development),
        f"results: {len(tested)}, on public sources ({', '.join(sources)}): their keys are hashed with the key that "
        "panfm publishes; whoever has the images can find each again",
        "each result: task, protocol, settings, number of training and test units by class and of groups, metrics with "
        "intervals, versions of libraries, seconds it took",
        f"predictions: {num_rows:,} rows, one a test unit and repeat; columns: {', '.join(PREDICTIONS_SCHEMA.names)}",
        *(f"test units of {task}, by {unit}: {counted}" for (task, unit), counted in sorted(units.items())),
        f"about each unit besides its class: {', '.join(sorted(columns)) or 'nothing'}",
    ]
    if unchecked:
        lines.append(
            f"mind: {', '.join(sorted(unchecked))}: no committed split tells whether these are the public images; were "
            "the shards built with the source card that panfm ships?"
        )
    return Outgoing(manifest, contents, tuple(lines))


def _build_aggregates(
    roots: Sequence[Path], tested: Sequence[tuple[Path, Result]], num_development: int, contact: str | None
) -> Outgoing:
    board = compute_standings(roots)  # reads and recomputes everything, as the submitter's own board does
    names = {result.encoder.name for _, result in tested}
    aggregates, left = compute_aggregates(board.summary, [result for _, result in tested], names, __version__)
    if not aggregates:
        reason = left[0] if left else Left("", "", "nothing was measured")
        raise UserError(
            f"{_join(roots)}: nothing may leave: task {reason.task}, encoder {reason.encoder}: {reason.reason}; "
            f"figures of fewer than {MIN_SHOWN_GROUPS} groups stay where they are"
        )
    contents: dict[str, bytes] = {}
    cards = []
    for aggregate in aggregates:
        clean = aggregate.model_copy(update={"encoder": _clean_encoder(aggregate.encoder)})
        _add(contents, Path(clean.file_name), f"{AGGREGATES}/{clean.file_name}", encode_json(_dump(clean)))
        cards.append((clean.task, clean.encoder))
    manifest = _build_manifest(contents, cards, contact, aggregate_only=True)
    lines = [
        *_describe_files(contents, manifest, num_development),
        f"figures: {len(aggregates)}, one an encoder, task and protocol, each of at least {MIN_SHOWN_GROUPS} groups; "
        "no predictions, no keys, no groups, no subgroups",
        "each figure: task, title, class names, protocol, metrics with intervals to three digits, number of test "
        "images and groups rounded down to tens, a hash of which images these were",
        *dict.fromkeys(f"stays here: {one.task}, {one.encoder}: {one.reason}" for one in left),
    ]
    return Outgoing(manifest, contents, tuple(lines))


def _build_manifest(
    contents: dict[str, bytes], cards: Sequence[tuple[str, EncoderCard]], contact: str | None, *, aggregate_only: bool
) -> Manifest:
    return Manifest(
        panfm_version=__version__,
        aggregate_only=aggregate_only,
        contact=contact,
        encoders=declare_encoders(cards),
        members=list_members(contents),
    )


def _describe_files(contents: dict[str, bytes], manifest: Manifest, num_development: int) -> list[str]:
    total = sum(map(len, contents.values()))
    lines = [f"files: {len(contents)} and a manifest, {total:,} bytes"]
    for one in manifest.encoders:
        sources = one.card.sources
        trained = "unknown"
        if sources is not None:
            trained = ", ".join(f"{one.source} ({one.num_kept:,} images)" for one in sources) or "no images of skin"
        kept_out = ", ".join(one.excluded_tasks) or "none"
        lines.append(
            f"encoder: {one.card.name} ({one.card.address}); trained on: {trained}; tasks kept out of it: {kept_out}"
        )
    lines.append(f"contact: {manifest.contact or 'none given'}")
    if num_development:
        lines.append(f"left out: {num_development} results on development folds, which choose recipes")
    return lines


def _clean(result: Result) -> Result:
    versions = {name: result.versions[name] for name in VERSIONS if name in result.versions}
    clean = result.model_copy(update={"encoder": _clean_encoder(result.encoder), "versions": versions})
    check_no_paths(clean.model_dump(mode="json"), f"result of {result.encoder.name} on {result.task}")
    return clean


def _clean_encoder(card: EncoderCard) -> EncoderCard:
    clean = card.model_copy(update={"address": shorten_address(card.address)})
    check_no_paths(clean.model_dump(mode="json"), f"encoder {card.name}")
    return clean


def _add(contents: dict[str, bytes], path: Path, name: str, data: bytes) -> None:
    if name in contents:
        raise UserError(f"{path}: two encoders or tasks have names that differ by special signs only; rename one")
    contents[name] = data


def _dump(aggregate: Aggregate) -> Any:
    values = aggregate.model_dump(mode="json")
    check_no_paths(values, f"figure of {aggregate.encoder.name} on {aggregate.task}")
    return values


def _join(roots: Sequence[Path]) -> str:
    return ", ".join(map(str, roots))
