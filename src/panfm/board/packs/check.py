"""What somebody else's numbers are worth: packs in, a finding a Result out, and whole packs let in or turned away.

    PACK.zip --read_pack--> members --a folder of its own, gone afterwards--> each Result:
        names and texts, the task's card --> predictions (layout, units, range) --> every metric and interval recomputed
        --> test images held against the committed split, or the board's own Results --> recomputed | self_reported
        --> the owner's own Result of the same encoder hash: all metrics alike --> verified

Nothing of a pack is run, and none of its names becomes a path before it was recognised. What does not hold is refused
with the file, the value, the rule and the way out; a pack with a refusal is not accepted at all.

What this cannot see: predictions made up with the labels at hand, as test labels of public images are public. Only the
owner's own run of the encoder tells (`verified`).
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ValidationError

from panfm import __version__
from panfm.board.packs.accepted import Checked, Verification, read_claims, write_accepted
from panfm.board.packs.aggregate import Aggregate, read_aggregates
from panfm.board.packs.facts import check_facts, check_metrics, confirm
from panfm.board.packs.format import AGGREGATES, RESULTS, Pack, declare_encoders, read_pack
from panfm.board.packs.images import ImageCheck, check_images, find_shipped_card
from panfm.board.packs.reader import Reader
from panfm.board.packs.tables import read_strictly
from panfm.board.packs.texts import check_texts
from panfm.board.summary import Origin
from panfm.board.verify import TestSet, check_same_test_set, read_test_set
from panfm.errors import UserError
from panfm.evaluation.results import AGGREGATE_SUFFIX, EncoderCard, Result, get_result_path, read_results
from panfm.files import compute_file_sha256, compute_sha256, write_bytes

Model = TypeVar("Model", bound=BaseModel)
# Baselines that never look at the encoder: their scores are those of every encoder.
WITHOUT_ENCODER = {
    ("metadata_fusion", "metadata"),
    ("metadata_fusion", "missingness"),
    ("survival", "covariates"),
    ("change", "interval_only"),
}
NOT_CHECKED = "aggregate only: nobody else can recompute it"


@dataclass(frozen=True)
class Finding:
    """What was found of one Result or aggregate. refusal: why it is not let in; then origin is None."""

    file: str
    task: str
    encoder: str
    encoder_hash: str
    protocol: str
    variant: str
    label_fraction: float
    draw: int | None
    seed: int | None
    predictions_sha256: str | None
    num_metrics: int  # recomputed
    origin: Origin | None
    images: str
    refusal: str | None = None


@dataclass(frozen=True)
class PackReport:
    """What was found of one pack. refusals: one line each; accepted: where it lies now."""

    path: Path
    sha256: str | None
    contact: str | None
    findings: tuple[Finding, ...]
    refusals: tuple[str, ...]
    accepted: Path | None = None


@dataclass
class _Known:
    """What was seen before: the board's own Results and accepted ones (`--against`), then the packs, one by one."""

    own: list[tuple[Path, Result]] = field(default_factory=list)
    test_sets: dict[tuple[str, str], tuple[Path, Result]] = field(default_factory=dict)  # one a task and unit
    identities: dict[tuple[str, str, str], str] = field(default_factory=dict)  # submitted before -> where
    kinds: dict[tuple[Any, ...], tuple[type, str]] = field(default_factory=dict)  # cell -> Result or Aggregate, where
    hash_of: dict[str, tuple[str, str]] = field(default_factory=dict)  # encoder's name -> hash, where
    name_of: dict[str, tuple[str, str]] = field(default_factory=dict)  # encoder's hash -> name, where
    scores_of: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)  # -> encoder's hash, where
    packs: dict[str, Path] = field(default_factory=dict)

    def learn(self, one: Result | Aggregate, where: str, *, submitted: bool, test_set: TestSet | None = None) -> None:
        """Keep what later Results must not repeat or contradict."""
        if submitted:
            self.identities[one.task, one.encoder.name, one.stem] = where
            self.kinds[_get_cell(one)] = (type(one), where)
        self.hash_of.setdefault(one.encoder.name, (one.encoder.hash, where))
        self.name_of.setdefault(one.encoder.hash, (one.encoder.name, where))
        if test_set is not None and (one.protocol, one.variant) not in WITHOUT_ENCODER:
            self.scores_of.setdefault(_sign_scores(test_set), (one.encoder.hash, where))


def verify_packs(
    paths: Sequence[Path], against: Sequence[Path] = (), accept: Path | None = None
) -> tuple[PackReport, ...]:
    """Check packs one after the other; `accept`: a pack without a refusal is written below this folder.

    against: the board owner's own results folders and folders of packs accepted before.

    Raises UserError only for what the owner can get wrong: an `against` that is no results folder.
    """
    before = [accept] if accept is not None and any(accept.rglob("*.json")) else []
    known = _read_known([*against, *before])
    with Reader() as reader:
        return _verify(paths, known, accept, reader)


def _verify(paths: Sequence[Path], known: _Known, accept: Path | None, reader: Reader) -> tuple[PackReport, ...]:
    reports = []
    for path in paths:
        try:
            pack = read_pack(path)
            if pack.sha256 in known.packs:
                raise UserError(f"{path}: the same pack as {known.packs[pack.sha256]}; a board takes each once")
        except UserError as error:
            reports.append(PackReport(path, None, None, (), (_to_line(error),)))
            continue
        known.packs[pack.sha256] = path
        findings, refusals = _check_pack(pack, known, reader)
        folder = None
        if accept is not None and not refusals:
            try:
                folder = write_accepted(accept, pack, _describe(pack, findings))
            except UserError as error:
                refusals = (_to_line(error),)
        reports.append(PackReport(path, pack.sha256, pack.manifest.contact, findings, refusals, folder))
    return tuple(reports)


def _read_known(roots: Sequence[Path]) -> _Known:
    known = _Known()
    roots = list({root.resolve(): root for root in roots}.values())  # --accept is often among --against
    found = read_results(roots) if roots else []
    aggregates = read_aggregates(roots)
    claims = read_claims(roots, found, aggregates)
    for path, result in sorted(found, key=lambda item: (item[0] in claims.checked, item[0])):
        if result.evaluated_on != "test":
            continue
        submitted = path in claims.checked
        if not submitted:
            known.own.append((path, result))
        if claims.get_origin(path) != "self_reported":
            known.test_sets.setdefault((result.task, result.unit), (path, result))
        known.learn(result, str(path), submitted=submitted, test_set=read_test_set(path, result))
    for path, one in aggregates:
        known.learn(one, str(path), submitted=True)
    return known


def _check_pack(pack: Pack, known: _Known, reader: Reader) -> tuple[tuple[Finding, ...], tuple[str, ...]]:
    """All findings of one pack; a fault of the pack as a whole leaves none."""
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="panfm-pack-") as folder:
        root = Path(folder)
        try:
            items = _open_members(pack)
            for name, data in pack.contents.items():
                write_bytes(root / name, data)
        except UserError as error:
            return (), (_to_line(error),)
        for name, one in items:
            try:
                if isinstance(one, Aggregate):
                    findings.append(_check_aggregate(pack, name, one, known))
                else:
                    findings.append(_check_result(pack, root, name, one, known, reader))
            except UserError as error:
                message = _to_line(error).replace(f"{root}/", f"{pack.path}: ")
                findings.append(_note(name, one, 0, None, "", message))
    return tuple(findings), tuple(one.refusal for one in findings if one.refusal is not None)


def _to_line(error: UserError) -> str:
    """A refusal as one line: it may quote the pack, and a terminal obeys control characters."""
    return "".join(character if character.isprintable() else "?" for character in " ".join(str(error).split()))


def _open_members(pack: Pack) -> list[tuple[str, Result | Aggregate]]:
    """The Results or aggregates of a pack; every member is one of them or the predictions that belong to one.

    Raises UserError for any other member, a name that does not follow from the contents, and encoders that are declared
    other than in the Results.
    """
    items: list[tuple[str, Result | Aggregate]] = []
    expected: set[str] = set()
    for name in sorted(pack.contents):
        where = f"{pack.path}: {name}"
        if pack.manifest.aggregate_only and name.startswith(f"{AGGREGATES}/") and name.endswith(AGGREGATE_SUFFIX):
            aggregate = _parse(Aggregate, pack.contents[name], where)
            items.append((name, aggregate))
            expected.add(f"{AGGREGATES}/{aggregate.file_name}")
        elif not pack.manifest.aggregate_only and name.startswith(f"{RESULTS}/") and name.endswith(".json"):
            result = _parse(Result, pack.contents[name], where)
            own = get_result_path(Path(RESULTS), result).as_posix()
            if result.predictions != f"{result.stem}.parquet":
                raise UserError(
                    f"{where}: its predictions are {result.predictions[:80]!r}, not {result.stem}.parquet beside it; "
                    "ask the submitter for a fresh pack"
                )
            items.append((name, result))
            expected |= {own, own.removesuffix(".json") + ".parquet"}
    for strange in sorted(set(pack.contents) ^ expected):
        there = strange in pack.contents
        raise UserError(
            f"{pack.path}: {strange} {'belongs to no result of the pack' if there else 'is missing'}; a pack holds "
            "results and their predictions, or aggregates alone; ask the submitter for a fresh one"
        )
    for declared in pack.manifest.encoders:
        check_texts(declared.model_dump(mode="json"), f"{pack.path}: encoder {declared.card.name[:80]!r}")
    cards: list[tuple[str, EncoderCard]] = [(one.task, one.encoder) for _, one in items]
    if declare_encoders(cards) != pack.manifest.encoders:
        raise UserError(
            f"{pack.path}: the manifest declares other encoders, or another contamination, than the results; ask the "
            "submitter for a fresh pack"
        )
    return items


def _parse(kind: type[Model], data: bytes, where: str) -> Model:
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
        check_texts(values, where)
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(f"{where}: {key}: {fault['msg']}; ask the submitter for a fresh pack") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no JSON ({str(error)[:80]}); ask the submitter for a fresh pack") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _check_result(pack: Pack, root: Path, name: str, result: Result, known: _Known, reader: Reader) -> Finding:
    where = f"{pack.path}: {name}"
    check_facts(where, result)
    _check_new(where, result, known)
    path = root / name
    file = path.parent / result.predictions
    if compute_file_sha256(file) != result.predictions_sha256:
        raise UserError(
            f"{where}: predictions_sha256 is {result.predictions_sha256[:12]}, but its predictions have "
            f"{compute_file_sha256(file)[:12]}; one of them was changed, submit what `panfm evaluate run` wrote"
        )
    reader.try_file(file)
    read_strictly(file, result)
    test_set = read_test_set(path, result)
    images = check_images(result, test_set)
    if (found := known.test_sets.get((result.task, result.unit))) is not None:
        check_same_test_set(read_test_set(*found), test_set)
        if not images.is_checked:
            images = ImageCheck(True, f"all {len(test_set.keys):,} {result.unit}s as in {found[0].name} of the board")
    check_metrics(where, result, test_set)
    of_hash, there = known.scores_of.get(_sign_scores(test_set), (result.encoder.hash, where))
    if of_hash != result.encoder.hash and (result.protocol, result.variant) not in WITHOUT_ENCODER:
        raise UserError(
            f"{where}: the same scores as {there}, which is of encoder hash {of_hash[:12]}, not "
            f"{result.encoder.hash[:12]}; predictions belong to one encoder, submit those of this one"
        )
    origin: Origin = "recomputed" if images.is_checked else "self_reported"
    words = images.words
    if (confirmed := confirm(where, result, known.own)) is not None:
        origin, words = "verified", f"{words}; {confirmed}"
    known.learn(result, where, submitted=True, test_set=test_set)
    return _note(name, result, len(result.metrics), origin, words)


def _check_aggregate(pack: Pack, name: str, one: Aggregate, known: _Known) -> Finding:
    where = f"{pack.path}: {name}"
    _check_new(where, one, known)
    if find_shipped_card(one.task) is not None and (found := known.test_sets.get((one.task, one.unit))) is not None:
        result = found[1]
        for field_name in ("task_version", "split_hash", "classes", "primary_metric"):
            ours, theirs = getattr(one, field_name), getattr(result, field_name)
            if ours != theirs:
                raise UserError(
                    f"{where}: {field_name} is {ours}, but {theirs} in {found[0].name} of the board; rename the task "
                    "if its images are others"
                )
    known.learn(one, where, submitted=True)
    return _note(name, one, 0, "self_reported", NOT_CHECKED)


def _check_new(where: str, one: Result | Aggregate, known: _Known) -> None:
    """Refuse what the board has, and an encoder that goes by two names."""
    encoder = one.encoder
    kind, there = known.kinds.get(_get_cell(one), (type(one), where))
    if kind is not type(one):
        raise UserError(
            f"{where}: task {one.task} of encoder {encoder.name} is in {there}, once with predictions and once as an "
            "aggregate; a board takes each once, leave one out"
        )
    of_hash, there = known.hash_of.get(encoder.name, (encoder.hash, where))
    if of_hash != encoder.hash:
        raise UserError(
            f"{where}: encoder {encoder.name} has hash {encoder.hash[:12]}, but {of_hash[:12]} in {there}; one name "
            "stands for one encoder, submit it under another name"
        )
    of_name, there = known.name_of.get(encoder.hash, (encoder.name, where))
    if of_name != encoder.name:
        raise UserError(
            f"{where}: encoder hash {encoder.hash[:12]} is called {encoder.name}, but {of_name} in {there}; one "
            f"encoder has one name on a board, submit it as {of_name}"
        )
    identity = (one.task, encoder.name, one.stem)
    if identity in known.identities:
        raise UserError(
            f"{where}: the same result as {known.identities[identity]} (task {one.task}, encoder {encoder.name}); a "
            "board takes each once, leave it out"
        )


def _get_cell(one: Result | Aggregate) -> tuple[Any, ...]:
    """Which cell of a board it fills."""
    return one.task, one.unit, one.protocol, one.variant, one.label_fraction, one.encoder.name


def _sign_scores(test_set: TestSet) -> tuple[str, str, str]:
    """What tells one set of scores from another, however the file was written: task, unit, hash of keys and scores."""
    result = test_set.result
    scores = np.ascontiguousarray(test_set.scores.astype(np.float32))
    return result.task, result.unit, compute_sha256("\n".join(test_set.keys.tolist()).encode() + scores.tobytes())


def _describe(pack: Pack, findings: Sequence[Finding]) -> Verification:
    return Verification(
        pack_sha256=pack.sha256,
        panfm_version=__version__,
        checked=tuple(
            Checked(file=one.file, predictions_sha256=one.predictions_sha256, origin=one.origin, images=one.images)
            for one in findings
            if one.origin is not None
        ),
    )


def _note(
    name: str, one: Result | Aggregate, num_metrics: int, origin: Origin | None, images: str, refusal: str | None = None
) -> Finding:
    result = one if isinstance(one, Result) else None
    return Finding(
        file=name,
        task=one.task,
        encoder=one.encoder.name,
        encoder_hash=one.encoder.hash,
        protocol=one.protocol,
        variant=one.variant,
        label_fraction=one.label_fraction,
        draw=None if result is None else result.draw,
        seed=None if result is None else result.seed,
        predictions_sha256=None if result is None else result.predictions_sha256,
        num_metrics=num_metrics,
        origin=origin,
        images=images,
        refusal=refusal,
    )
