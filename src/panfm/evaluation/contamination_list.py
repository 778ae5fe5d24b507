"""The list that an audit leaves, read: what pretraining is to leave out, and which test images an encoder has seen.

    AUDIT/{audit.json, audit.parquet} --read_audit--> Audit
    Audit + pretraining sets --find_copied--> keys by source, for data.exclude.audit
    Audit + EncoderCard + task --find_seen--> keys of the contaminated test images, for the board

An audit is of certain data: shard sets are known by their data hashes, and another set is refused, never skipped.
Runs without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from panfm.errors import UserError
from panfm.evaluation.results import EncoderCard
from panfm.files import compute_file_sha256, read_json
from panfm.shards.index import ShardSet

AUDIT_VERSION = 2  # 2: tasks with the hash of their images
AUDIT_FILE, MANIFEST_FILE = "audit.parquet", "audit.json"
METHODS = ("sha256", "phash", "embedding", "same_group")
AUDIT_SCHEMA = pa.schema(
    [
        pa.field("pretrain_source", pa.string(), nullable=False),
        pa.field("pretrain_key", pa.string(), nullable=False),
        pa.field("evaluation_source", pa.string(), nullable=False),
        pa.field("evaluation_key", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("distance", pa.int16()),  # bits of the hashes that differ; null: not compared
        # Tasks that test on the pretraining image's own group: where a run kept these out, it never saw the image.
        pa.field("pretrain_test_tasks", pa.list_(pa.string()), nullable=False),
    ],
    metadata={"panfm_audit": str(AUDIT_VERSION)},
)


@dataclass(frozen=True)
class Audit:
    """An audit as written: its folder, the SHA-256 of audit.json that names it, the manifest, and the pairs."""

    path: Path
    hash: str
    manifest: dict[str, Any]
    table: pa.Table  # AUDIT_SCHEMA

    def get_data_hashes(self, side: str) -> dict[str, str]:
        """source -> data hash of what was compared; side: pretrain or evaluation."""
        return {entry["source"]: entry["data_hash"] for entry in self.manifest[side]}


@dataclass(frozen=True)
class Seen:
    """What an audit says of an encoder and a task.

    keys: test images of which a kept pretraining image is a copy, or of whose group; None with a reason where the audit
    cannot tell.
    """

    keys: frozenset[str] | None
    reason: str | None
    choice: str | None  # "excluded": pretraining left the audit's images out; "flagged": it did not


def read_audit(path: str | Path) -> Audit:
    """Read a finished audit; one that did not finish, was changed or is of another version is a UserError."""
    path = Path(path)
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise UserError(
            f"{path}: has no {MANIFEST_FILE}, so it is no finished audit; run `panfm audit --pretrain DIR "
            f"--evaluation DIR --out {path}`"
        )
    manifest = read_json(file)
    version = manifest.get("audit_version") if isinstance(manifest, dict) else None
    if version != AUDIT_VERSION:
        raise UserError(f"{file}: audit version {version!r}; this panfm reads version {AUDIT_VERSION}, audit again")
    if not (path / AUDIT_FILE).is_file() or compute_file_sha256(path / AUDIT_FILE) != manifest["audit_sha256"]:
        raise UserError(f"{path / AUDIT_FILE}: is missing or not the file that {MANIFEST_FILE} names; audit again")
    return Audit(path, compute_file_sha256(file), manifest, pq.read_table(path / AUDIT_FILE, schema=AUDIT_SCHEMA))


def find_copied(audit: Audit, shard_sets: Sequence[ShardSet]) -> dict[str, frozenset[str]]:
    """Find what pretraining on `shard_sets` is to leave out: source -> keys of all images that the audit lists.

    Raises UserError for a set that was not audited, or whose images are others than those that were.
    """
    hashes = audit.get_data_hashes("pretrain")
    for shard_set in shard_sets:
        if shard_set.source not in hashes:
            raise UserError(
                f"data.exclude.audit ({audit.path}): source {shard_set.source} was not audited (audited: "
                f"{', '.join(hashes)}); audit again with --pretrain {shard_set.path}"
            )
        found = shard_set.compute_data_hash()
        if found != hashes[shard_set.source]:
            raise UserError(
                f"data.exclude.audit ({audit.path}): made for {shard_set.source} with data hash "
                f"{hashes[shard_set.source]}, but {shard_set.path} has {found}: other images; audit again"
            )
    keys: dict[str, set[str]] = {shard_set.source: set() for shard_set in shard_sets}
    columns = (audit.table.column(name).to_pylist() for name in ("pretrain_source", "pretrain_key"))
    for source, key in zip(*columns, strict=True):
        if source in keys:
            keys[source].add(key)
    return {source: frozenset(found) for source, found in keys.items()}


def find_seen(audit: Audit, encoder: EncoderCard, task: str, data_hash: str) -> Seen:
    """Find the test images of a task that an encoder may have seen in pretraining.

    data_hash: of the task's images, as its results name it. A pair counts unless the run left its pretraining image
    out: with the test groups of a task (`encoder.excluded_tasks`), or by this audit.
    """
    if (reason := _find_gap(audit, encoder, task, data_hash)) is not None or encoder.sources is None:
        return Seen(None, reason, None)
    if encoder.audit == audit.hash:
        return Seen(frozenset(), None, "excluded")
    trained_on = {source.source for source in encoder.sources}
    kept_out = set(encoder.excluded_tasks)
    names = ("task", "pretrain_source", "evaluation_key", "pretrain_test_tasks")
    rows = zip(*(audit.table.column(name).to_pylist() for name in names), strict=True)
    keys = {
        key
        for name, source, key, tested_by in rows
        if name == task and source in trained_on and kept_out.isdisjoint(tested_by)
    }
    return Seen(frozenset(keys), None, "flagged")


def _find_gap(audit: Audit, encoder: EncoderCard, task: str, data_hash: str) -> str | None:
    """Why the audit cannot tell what the encoder has seen of the task; None where it can."""
    entry = next((entry for entry in audit.manifest["tasks"] if entry["task"] == task), None)
    if entry is None:
        return "the audit is not of this task"
    if entry["data_hash"] != data_hash:
        return "the audit is of other test images"
    if encoder.sources is None:
        return "pretraining data unknown"
    hashes = audit.get_data_hashes("pretrain")
    for source in encoder.sources:
        if source.source not in hashes:
            return f"{source.source} was not audited"
        if source.data_hash != hashes[source.source]:
            return f"other images of {source.source} were audited"
    return None
