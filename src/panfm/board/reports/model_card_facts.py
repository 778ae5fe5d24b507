"""What a model card may say: an encoder's address, Results and shard sets in, plain facts out. Nothing is guessed.

    address --load_encoder--> weights, transform, EncoderFacts ----------+
    results --compute_standings--> its rows and pages on the board ------+--> CardFacts
    shard sets --counts--> spread by modality, phototype, sex, age ------+

The encoder is found among the Results by its hash (weights, config, transform, pooling): its name may differ.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panfm.board.reports.counts import Spread, count_spread, find_group_kind
from panfm.board.standings import compute_standings
from panfm.board.summary import LeaderboardSummary, Row, Section
from panfm.board.task_pages import EncoderDetails, TaskPage
from panfm.encoder.address import parse_address
from panfm.encoder.export import find_ancestors
from panfm.encoder.facts import EncoderFacts, TransformFacts
from panfm.encoder.load import EncoderDescription, load_encoder
from panfm.errors import UserError
from panfm.evaluation.contamination_list import read_audit
from panfm.evaluation.results import read_results
from panfm.evaluation.tasks import Subgroup
from panfm.shards.index import ShardSet, open_shard_set

ATTRIBUTES: tuple[Subgroup, ...] = ("modality", "phototype", "sex", "age", "anatomic_site", "institution")


@dataclass(frozen=True)
class SourceSpread:
    """A shard set that was named for the card. used: whether its very images are a source of the encoder."""

    source: str
    title: str
    licence: str
    permitted_uses: tuple[str, ...]
    synthetic: bool
    group_kind: str
    num_images: int
    used: bool
    kind: str | None  # of cohort: registry, clinical, ...; None: not recorded
    spreads: tuple[Spread, ...]


@dataclass(frozen=True)
class Standing:
    """The encoder in one section of the board; baseline: the row of random weights there, if any."""

    section: Section
    row: Row
    baseline: Row | None


@dataclass(frozen=True)
class CardFacts:
    """All that the card is written from. summary: None where no Results were named."""

    address: str  # scheme and name, without folders
    description: EncoderDescription
    transform: TransformFacts
    dtype: str
    facts: EncoderFacts | None
    ancestors: tuple[str, ...]
    summary: LeaderboardSummary | None
    standings: tuple[Standing, ...]
    details: tuple[tuple[TaskPage, EncoderDetails], ...]
    spreads: tuple[SourceSpread, ...]

    @property
    def name(self) -> str:
        """As its Results call it, else as its address does."""
        return self.standings[0].row.encoder.name if self.standings else self.description.name

    @property
    def licence(self) -> str | None:
        """Of the weights, as its Results declare it."""
        return next((one.row.encoder.licence for one in self.standings if one.row.encoder.licence), None)

    @property
    def all_synthetic(self) -> bool:
        """Whether it was trained on drawn images alone."""
        sources = self.facts.sources if self.facts else ()
        return bool(sources) and all(source.synthetic for source in sources)


def collect_facts(
    address: str,
    result_roots: Sequence[Path] = (),
    shards: Sequence[str | Path] = (),
    audit: Path | None = None,
    *,
    processes: int = 1,
) -> CardFacts:
    """Gather the facts of an encoder; audit: a folder of `panfm audit`, for the board.

    Raises UserError for an encoder that does not load, for Results that the board refuses, and for Results none of
    which is this encoder's.
    """
    encoder = load_encoder(address)
    summary: LeaderboardSummary | None = None
    standings: tuple[Standing, ...] = ()
    details: tuple[tuple[TaskPage, EncoderDetails], ...] = ()
    if result_roots:
        name = _find_name(result_roots, encoder.hash, address)
        board = compute_standings(result_roots, None if audit is None else read_audit(audit), processes=processes)
        summary = board.summary
        standings = tuple(_find_standings(summary, name))
        details = tuple((page, one) for page in board.pages for one in page.encoders if one.encoder == name)
    hashes = {source.data_hash for source in encoder.facts.sources} if encoder.facts else set()
    return CardFacts(
        address=describe_address(address),
        description=encoder.card,
        transform=TransformFacts.model_validate(encoder.transform.to_plain()),
        dtype=encoder.dtype,
        facts=encoder.facts,
        ancestors=tuple(describe_address(one.text) for one in find_ancestors(encoder.facts)) if encoder.facts else (),
        summary=summary,
        standings=standings,
        details=details,
        spreads=tuple(_describe_shards(open_shard_set(path), hashes) for path in shards),
    )


def describe_address(text: str) -> str:
    """An address without the folders of this machine: scheme and name."""
    address = parse_address(text)
    return f"{address.scheme}:{address.name}"


def flatten_config(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The resolved pretraining config, a line a value; of paths the last part, of `tracking` nothing (it names people).

    Returns (dotted key, text) in the order of the config.
    """
    kept = {name: value for name, value in config.items() if name != "tracking"}
    return tuple(_flatten(kept, ""))


def _flatten(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flatten(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flatten(inner, f"{key}[{number}]")
    elif isinstance(value, list | tuple):
        yield key, ", ".join(map(_say, value)) or "none"
    else:
        yield key, _say(value)


def _say(value: Any) -> str:
    if value is None:
        return "default"
    if not isinstance(value, str):
        return str(value)
    try:
        return describe_address(value)
    except UserError:
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]


def _find_name(roots: Sequence[Path], encoder_hash: str, address: str) -> str:
    cards = {result.encoder.name: result.encoder.hash for _, result in read_results(roots)}
    names = sorted(name for name, found in cards.items() if found == encoder_hash)
    if not names:
        there = ", ".join(sorted(cards))
        raise UserError(
            f"{address}: no Result is of this encoder (hash {encoder_hash[:12]}); those there are of {there}; name the "
            "results of this encoder, or evaluate it with `panfm evaluate run`"
        )
    return names[0]


def _find_standings(summary: LeaderboardSummary, name: str) -> Iterator[Standing]:
    for section in summary.sections:
        rows = {row.encoder.name: row for row in section.rows}
        if name not in rows:
            continue
        reference = rows.get(section.reference or "")
        is_random = reference is not None and "@random:" in reference.encoder.address
        yield Standing(section, rows[name], reference if is_random else None)


def _describe_shards(shard_set: ShardSet, hashes: set[str]) -> SourceSpread:
    card = shard_set.card
    return SourceSpread(
        source=card.name,
        title=card.title,
        licence=card.licence,
        permitted_uses=card.permitted_uses,
        synthetic=card.synthetic,
        group_kind=find_group_kind(shard_set),
        num_images=shard_set.num_samples,
        used=shard_set.compute_data_hash() in hashes,
        kind=None if card.cohort is None else card.cohort.kind,
        spreads=tuple(count_spread(shard_set, attribute) for attribute in ATTRIBUTES),
    )
