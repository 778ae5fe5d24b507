"""A task audit's faces: audit.json for programs, audit.txt for the terminal, index.html with the doubted images.

    TaskAudit + card, split, encoder, shard set -> write_task_audit -> DIR/audit.json, audit.txt, index.html

Nothing in them tells who somebody is: an image goes by its key (a hash), counts below five patients are not shown, and
there are no ages, places or dates. The page holds pixels, as small copies; it belongs where the shards lie.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from panfm import __version__
from panfm.data.decode import decode_rgb
from panfm.encoder.load import Encoder
from panfm.evaluation.splits import Split
from panfm.evaluation.task_audit import MIN_GROUPS, TaskAudit
from panfm.evaluation.tasks import TaskCard
from panfm.files import write_json, write_text
from panfm.measures.intervals import Estimate
from panfm.pages import build_environment, encode_thumbnail
from panfm.shards.index import ShardSet

TEMPLATES = Path(__file__).parent / "templates"
AUDIT_VERSION = 1
SHOWN_SUSPECTS = 60  # on the page, the least plausible labels first; audit.json has all
TEXT_SUSPECTS = 10
SHOWN_SIDE, SHOWN_QUALITY = 200, 80  # pixels, longest side; a reader must see what it is
WARNING = (
    "An audit looks at every fold. Nothing here may be used to correct the test labels of an encoder that is then "
    "measured on them; have a suspect judged by somebody who does not see what the model says."
)
DOUBT = (
    "An estimate of doubt: the probe's own confident mistakes count as wrong labels, so the poorer the probe, the more "
    "it is too high."
)


def write_task_audit(
    out: Path, audit: TaskAudit, card: TaskCard, split: Split, shard_set: ShardSet, encoder: Encoder
) -> str:
    """Write the three files into the folder `out` (made if it is absent, overwritten if they are there); the text."""
    about = {
        "audit_version": AUDIT_VERSION,
        "panfm_version": __version__,
        "task": card.name,
        "task_version": card.version,
        "classes": list(card.classes),
        "encoder": encoder.name,
        "encoder_hash": encoder.hash,
        "data_hash": split.compute_data_hash(shard_set),
        "split_hash": split.hash,
        "num_images": len(split.keys),
        "num_groups": len(np.unique(split.groups)),
        "group_kind": split.group_kind,
        "synthetic": card.synthetic,
    }
    plain = asdict(audit)
    for suspect in plain["labels"]["suspects"]:
        del suspect["place"]  # of this split's arrays, which nobody else has
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "audit.json", {**about, **plain})
    text = format_task_audit(audit, about)
    write_text(out / "audit.txt", text + "\n")
    write_text(out / "index.html", _render_page(audit, about, split, shard_set))
    return text


def format_task_audit(audit: TaskAudit, about: dict[str, Any]) -> str:
    """The audit on one screen."""
    synthetic = " (SYNTHETIC data)" if about["synthetic"] else ""
    lines = [
        f"{about['task']}{synthetic}, features of {about['encoder']}: {about['num_images']:,} images, "
        f"{about['num_groups']:,} groups ({about['group_kind']})",
        "",
        "Institution",
    ]
    site = audit.site
    if site.reason:
        lines.append(f"  {site.reason}")
    for signal in site.signals:
        lines.append(
            f"  told from the features within {signal.diagnosis} ({signal.num_images:,} images, "
            f"{len(signal.institutions)} institutions): AUROC {show(signal.auroc)}, balanced accuracy "
            f"{show(signal.balanced_accuracy)} (chance 0.500 and {1 / len(signal.institutions):.3f})"
        )
    if site.told_by_institution is not None:
        lines.append(f"  tells the diagnosis by itself at AUROC {show(site.told_by_institution)} (chance 0.500)")
    if site.num_unknown:
        lines.append(f"  unknown of {site.num_unknown:,} images, which are left out here")
    labels = audit.labels
    lines += [
        "",
        "Labels",
        f"  held-out probe: AUROC {show(labels.auroc)}",
        f"  estimated share of wrong labels: {show(labels.error_share)}; {len(labels.suspects):,} suspects",
        f"  {DOUBT}",
    ]
    for suspect in labels.suspects[:TEXT_SUSPECTS]:
        lines.append(
            f"    {suspect.key[:16]} ({suspect.fold}): labelled {suspect.given} ({suspect.p_given:.3f}), looks like "
            f"{suspect.suggested} ({suspect.p_suggested:.3f})"
        )
    lines += ["", "Readers"]
    readers = audit.readers
    if readers.reason:
        lines.append(f"  {readers.reason}")
    elif readers.fleiss is not None:
        lines.append(
            f"  Fleiss' kappa of {len(readers.readers)} readers, {readers.num_images:,} images: {show(readers.fleiss)}"
        )
        kind = "" if readers.weighting == "none" else f" ({readers.weighting} weights)"
        for pair in readers.pairs:
            lines.append(
                f"  {pair.first} and {pair.second}, {pair.num_images:,} images: Cohen's kappa{kind} {show(pair.kappa)}"
            )
    return "\n".join([*lines, "", WARNING])


def show(estimate: Estimate) -> str:
    """0.873 (0.840 to 0.901), or why there is none."""
    if estimate.value is None:
        return f"undefined ({estimate.reason})"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f} ({estimate.reason})"
    outside = f"; {estimate.reason}" if estimate.reason else ""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f}{outside})"


def _render_page(audit: TaskAudit, about: dict[str, Any], split: Split, shard_set: ShardSet) -> str:
    """One file that fetches nothing; equal inputs give equal bytes."""
    shown = [
        {"suspect": suspect, "image": _make_thumbnail(shard_set.read_image(int(split.rows[suspect.place])))}
        for suspect in audit.labels.suspects[:SHOWN_SUSPECTS]
    ]
    page = (
        build_environment(TEMPLATES)
        .get_template("task_audit.html.j2")
        .render(audit=audit, about=about, shown=shown, show=show, warning=WARNING, doubt=DOUBT, min_groups=MIN_GROUPS)
    )
    return page.rstrip() + "\n"


def _make_thumbnail(data: bytes) -> str:
    return encode_thumbnail(Image.fromarray(decode_rgb(data)), SHOWN_SIDE, SHOWN_QUALITY)
