"""A pack as a file: Results and predictions of one submitter in, one archive out; and back, trusting nothing.

    members (name -> bytes) + Manifest --stored, sorted, no times--> PACK.zip      PACK.zip --every byte named--> Pack

The manifest is the last member and names every other one with its size and SHA-256: what was cut short has none.
Members are stored, not compressed: equal contents give equal bytes everywhere, and no archive holds more than its file.
Reading refuses whatever the writer would not write (other names, links, gaps, comments, compression) before any content
is looked at; nothing is unpacked here and nothing is run.
"""

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from panfm.board.packs.texts import check_texts
from panfm.errors import UserError
from panfm.evaluation.results import EncoderCard
from panfm.files import compute_sha256, open_atomic

PACK_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
RESULTS, AGGREGATES = "results", "aggregates"  # folders inside a pack
MAX_PACK_BYTES = 1 << 30
MAX_MEMBER_BYTES = 256 << 20
MAX_MANIFEST_BYTES = 16 << 20
MAX_MEMBERS = 20_000
MAX_CONTACT = 200  # characters
# Parts of letters, digits and _ = + - . that do not begin with a dot: no "..", no absolute path, nothing hidden.
NAME = re.compile(r"(?:[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]{0,199}/)*[A-Za-z0-9_=+-][A-Za-z0-9_.=+-]{0,199}")
FIXED_TIME = (1980, 1, 1, 0, 0, 0)
LOCAL_HEADER, CENTRAL_HEADER, END_RECORD = 30, 46, 22  # bytes of a zip's records, without names
WAY_OUT = "only packs written by `panfm leaderboard submit` are read; ask the submitter for a fresh one"


class Member(BaseModel):
    """One file of a pack."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    size: int = Field(ge=0)  # bytes
    sha256: str


class EncoderDeclaration(BaseModel):
    """What the submitter says about one encoder. What nobody knows stays `unknown`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    card: EncoderCard  # as in its first Result; its contamination is a fact about that task
    trained_on: tuple[str, ...] | Literal["unknown"]  # sources of its pretraining
    excluded_tasks: tuple[str, ...]  # tasks whose test groups were kept out of it
    contamination: dict[str, Literal["excluded", "none", "unknown"]]  # by task of this pack


class Manifest(BaseModel):
    """What a pack holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack_version: Literal[1] = PACK_VERSION
    panfm_version: str
    aggregate_only: bool
    contact: str | None = None
    encoders: tuple[EncoderDeclaration, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Pack:
    """A pack whose every byte is accounted for: `contents` are the members without the manifest, by name."""

    path: Path
    sha256: str
    manifest: Manifest
    contents: Mapping[str, bytes]


def declare_encoders(cards: Sequence[tuple[str, EncoderCard]]) -> tuple[EncoderDeclaration, ...]:
    """What (task, encoder card) pairs of Results say together, an encoder each, sorted by name."""
    by_name: dict[str, list[tuple[str, EncoderCard]]] = {}
    for task, card in sorted(cards, key=lambda pair: (pair[1].name, pair[0])):
        by_name.setdefault(card.name, []).append((task, card))
    found = []
    for those in by_name.values():
        first = those[0][1]
        contamination: dict[str, Literal["excluded", "none", "unknown"]] = {}
        for task, card in those:  # where two Results of one task differ, the worse word counts
            contamination[task] = max(contamination.get(task, card.contamination), card.contamination, key=_RANK.index)
        sources = first.sources
        found.append(
            EncoderDeclaration(
                card=first,
                trained_on="unknown" if sources is None else tuple(sorted({one.source for one in sources})),
                excluded_tasks=first.excluded_tasks,
                contamination=contamination,
            )
        )
    return tuple(found)


_RANK = ("none", "excluded", "unknown")


def write_archive(path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Write a pack atomically: members by name, the manifest last; equal contents, equal bytes."""
    check_contents(path, contents)
    with open_atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            archive.writestr(_describe_member(name), contents[name])
        archive.writestr(_describe_member(MANIFEST), encode_json(manifest.model_dump(mode="json")))


def check_contents(path: Path, contents: Mapping[str, bytes]) -> None:
    """Refuse to write what `read_pack` would refuse to read for its size."""
    total = sum(map(len, contents.values()))
    if len(contents) >= MAX_MEMBERS or total > MAX_PACK_BYTES:
        raise UserError(
            f"{path}: {len(contents)} files of {total:,} bytes; a pack holds up to {MAX_MEMBERS - 1:,} files and "
            f"{MAX_PACK_BYTES:,} bytes, submit some of the encoders at a time (--encoder NAME)"
        )


def encode_json(value: object) -> bytes:
    """JSON as everywhere in panfm: sorted keys, indented, no NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def list_members(contents: Mapping[str, bytes]) -> tuple[Member, ...]:
    """The members of a manifest, sorted by name."""
    return tuple(
        Member(name=name, size=len(contents[name]), sha256=compute_sha256(contents[name])) for name in sorted(contents)
    )


def read_pack(path: Path) -> Pack:
    """Read a pack, holding every byte of it against its manifest. Nothing is written or run.

    Raises UserError, naming the pack and the member, for whatever `write_archive` would not have written.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `panfm leaderboard submit RESULTS --out {path}` writes a pack")
    limit = MAX_PACK_BYTES + MAX_MANIFEST_BYTES + MAX_MEMBERS * 1024
    with path.open("rb") as file:  # read once: what is checked is what is accepted
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(
            f"{path}: over {limit:,} bytes; a pack has up to {MAX_PACK_BYTES:,}, submit fewer encoders a time"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            _check_layout(path, len(data), archive, entries)
            contents = {entry.filename: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a whole zip file ({_shorten(error)}); {WAY_OUT}") from None
    manifest = _read_manifest(path, contents.pop(MANIFEST))
    _check_members(path, manifest, contents)
    return Pack(path, compute_sha256(data), manifest, contents)


def _check_layout(path: Path, size: int, archive: zipfile.ZipFile, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Refuse by the archive's own directory, before any content is read; then no byte is left unnamed."""
    if len(entries) > MAX_MEMBERS:
        raise UserError(f"{path}: {len(entries):,} members; a pack has up to {MAX_MEMBERS:,}, {WAY_OUT}")
    seen: set[str] = set()
    place = 0
    for entry in entries:
        name, where = entry.filename, f"{path}: member {entry.filename[:120]!r}"
        if NAME.fullmatch(name) is None or entry.orig_filename != name:
            raise UserError(f"{where}: a member is named by a relative path of plain letters, without '..'; {WAY_OUT}")
        if name.lower() in seen:
            raise UserError(f"{where}: named twice (capitals aside); {WAY_OUT}")
        seen.add(name.lower())
        if (entry.external_attr >> 16) & 0o170000 not in (0, 0o100000):
            raise UserError(f"{where}: a link or something else that is no plain file; {WAY_OUT}")
        limit = MAX_MANIFEST_BYTES if name == MANIFEST else MAX_MEMBER_BYTES
        if entry.file_size > limit:
            raise UserError(f"{where}: declares {entry.file_size:,} bytes, up to {limit:,} are read; {WAY_OUT}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits:
            raise UserError(f"{where}: compressed or encrypted; members of a pack are stored as they are, {WAY_OUT}")
        if entry.header_offset != place or entry.extra or entry.comment or entry.date_time != FIXED_TIME:
            raise UserError(f"{where}: bytes, a time or a comment that no pack has; {WAY_OUT}")
        place += LOCAL_HEADER + len(name) + entry.file_size
    end = place + sum(CENTRAL_HEADER + len(entry.filename) for entry in entries) + END_RECORD
    if archive.comment or end != size:
        raise UserError(f"{path}: {size:,} bytes, its members make {end:,}; something is hidden or cut off, {WAY_OUT}")
    names = [entry.filename for entry in entries]
    if not names or names[-1] != MANIFEST or names[:-1] != sorted(names[:-1]):
        raise UserError(f"{path}: the last member is not {MANIFEST}; half written or no pack, {WAY_OUT}")


def _read_manifest(path: Path, data: bytes) -> Manifest:
    try:
        values = json.loads(data)
        version = values.get("pack_version") if isinstance(values, dict) else None
        if version != PACK_VERSION:
            raise UserError(
                f"{path}: pack_version {version!r} in {MANIFEST}; this panfm reads version {PACK_VERSION}, submit "
                "again with the version of panfm that the board uses"
            )
        check_texts(values, f"{path}: {MANIFEST}")
        return Manifest.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path}: {MANIFEST}: {key}: {fault['msg']}; {WAY_OUT}") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {MANIFEST} is no JSON ({_shorten(error)}); {WAY_OUT}") from None


def _check_members(path: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    named = [member.name for member in manifest.members]
    if unknown := sorted(set(contents) - set(named)):
        raise UserError(f"{path}: member {unknown[0]!r} is not named in {MANIFEST}; {WAY_OUT}")
    if missing := sorted(set(named) - set(contents)):
        raise UserError(f"{path}: member {missing[0]!r} of {MANIFEST} is missing; {WAY_OUT}")
    if len(set(named)) != len(named):
        raise UserError(f"{path}: {MANIFEST} names a member twice; {WAY_OUT}")
    for member in manifest.members:
        data = contents[member.name]
        if len(data) != member.size or compute_sha256(data) != member.sha256:
            raise UserError(
                f"{path}: {member.name}: SHA-256 {compute_sha256(data)[:12]}, {MANIFEST} says {member.sha256[:12]}; "
                f"the file was changed, {WAY_OUT}"
            )
    if not contents:
        raise UserError(f"{path}: holds no result; {WAY_OUT}")
    if manifest.contact is not None:
        check_contact(manifest.contact)


def check_contact(contact: str) -> None:
    """Refuse a contact that is more than one short line."""
    if not contact.strip() or len(contact) > MAX_CONTACT or not contact.isprintable():
        raise UserError(
            f"contact ({contact[:40]!r}): one line of up to {MAX_CONTACT} printable characters, such as an e-mail "
            "address; or leave --contact out"
        )


def _describe_member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, FIXED_TIME)
    info.external_attr = 0o100644 << 16
    info.create_system = 3  # else it says on which system it was written
    return info


def _shorten(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
