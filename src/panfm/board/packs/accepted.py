"""Packs that a board's owner let in: what was checked stands beside the Results, and a build reads both.

    DIR/PACK'S HASH/results/..., aggregates/..., verification.json (last)      --build--> Cell.origin

A folder is made under another name and renamed when it is whole. verification.json is the owner's note of what
`panfm leaderboard verify` found; a build takes nothing from it that it can find out itself: metrics are recomputed,
images are held against the committed split again, and what it says of a Result holds for the very predictions whose
SHA-256 it names.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from panfm.board.packs.aggregate import Aggregate
from panfm.board.packs.format import Pack
from panfm.board.summary import Origin
from panfm.errors import UserError
from panfm.evaluation.results import VERIFICATION, Result, find_files
from panfm.files import read_json, sync_folder, write_bytes, write_json

VERIFICATION_VERSION: Literal[1] = 1
ORIGINS: tuple[Origin, ...] = ("self_reported", "recomputed", "verified")  # from the least to the most known


class Checked(BaseModel):
    """What was found of one Result (or aggregate, which has no predictions)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str  # relative to the folder of verification.json
    predictions_sha256: str | None
    origin: Origin
    images: str  # what was checked of its test images, in words


class Verification(BaseModel):
    """What `panfm leaderboard verify --accept` found of one pack."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    verification_version: Literal[1] = VERIFICATION_VERSION
    pack_sha256: str
    panfm_version: str
    checked: tuple[Checked, ...]


@dataclass(frozen=True)
class Claims:
    """What the verification files above some Results say of them: only those that lie in accepted packs are here."""

    checked: Mapping[Path, Checked]

    def get_origin(self, path: Path) -> Origin:
        """Whose word a Result is, as far as its note goes; one that came in no pack is the board's own."""
        return self.checked[path].origin if path in self.checked else "recomputed"

    def leave_out_confirmed(self, found: Sequence[tuple[Path, Result]]) -> list[tuple[Path, Result]]:
        """Leave out the board owner's own copies of Results that they verified: the submitted ones stand for both."""
        verified = {_identify(result) for path, result in found if self._is_verified(path)}
        return [(path, result) for path, result in found if path in self.checked or _identify(result) not in verified]

    def _is_verified(self, path: Path) -> bool:
        return path in self.checked and self.checked[path].origin == "verified"


def _identify(result: Result) -> tuple[str, str, str]:
    return result.task, result.encoder.hash, result.stem


def get_accepted_folder(accept: Path, pack: Pack) -> Path:
    """Where a pack lies once it is accepted."""
    return accept / pack.sha256[:16]


def write_accepted(accept: Path, pack: Pack, verification: Verification) -> Path:
    """Write an accepted pack below `accept`: all of it or nothing; returns its folder.

    Raises UserError if the same pack is there already.
    """
    folder = get_accepted_folder(accept, pack)
    if folder.exists():
        raise UserError(f"{pack.path}: was accepted before, as {folder}; a board takes each pack once")
    accept.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=accept))  # such folders are never read as Results
    try:
        for name, data in pack.contents.items():
            write_bytes(temporary / name, data)
        write_json(temporary / VERIFICATION, verification.model_dump(mode="json"))
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(accept)
    return folder


def read_claims(
    roots: Sequence[Path], results: Sequence[tuple[Path, Result]], aggregates: Sequence[tuple[Path, Aggregate]]
) -> Claims:
    """Read what the verification files below `roots` say of these Results and aggregates.

    Raises UserError for a file of an accepted pack that its verification does not name, or of which it names other
    predictions: it was put there or changed later.
    """
    folders: dict[Path, Mapping[str, Checked]] = {}
    for file in find_files(roots, VERIFICATION):
        folders[file.parent] = {one.file: one for one in read_verification(file).checked}
    found: dict[Path, Checked] = {}
    hashes: list[tuple[Path, str | None]] = [(path, result.predictions_sha256) for path, result in results]
    for path, sha256 in [*hashes, *((path, None) for path, _ in aggregates)]:
        folder = next((parent for parent in path.parents if parent in folders), None)
        if folder is None:
            continue
        name = path.relative_to(folder).as_posix()
        one = folders[folder].get(name)
        if one is None or one.predictions_sha256 != sha256:
            what = "does not name it" if one is None else "names other predictions"
            raise UserError(
                f"{path}: {folder / VERIFICATION} {what}; the file was put there or changed after the check, verify "
                "the pack again"
            )
        found[path] = one
    return Claims(found)


def read_verification(path: Path) -> Verification:
    """Read one verification file; a damaged or foreign one is a UserError that names it."""
    try:
        return Verification.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{path}: not a verification v{VERIFICATION_VERSION}: {key}: {fault['msg']}; verify the pack again"
        ) from None
