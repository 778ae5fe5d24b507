"""What an audit makes of a cell: its test images that pretraining has seen, and the value without them.

a Result's test set, what its encoder has seen --without those images--> AuditedCell, one a cell's draws and seeds
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from panfm.board.summary import AuditedCell
from panfm.board.verify import TestSet
from panfm.evaluation.contamination_list import Seen
from panfm.measures.by_family import compute_point


def measure_unseen(test_set: TestSet, seen: Seen) -> AuditedCell:
    """Recompute one Result's primary metric without the images that its encoder has seen."""
    result = test_set.result
    if seen.keys is None:
        return AuditedCell(None, result.num_test, None, seen.reason, seen.choice)
    if seen.keys and not result.unit.startswith("image"):  # their keys are no keys of images
        reason = f"the audit lists images of this task, which scores each {result.unit} as one"
        return AuditedCell(None, result.num_test, None, reason, seen.choice)
    kept = ~np.isin(test_set.keys, sorted(seen.keys))
    num_seen = int((~kept).sum())
    if not kept.any():
        return AuditedCell(num_seen, result.num_test, None, "every test image was seen", seen.choice)
    point = compute_point(result.family, result.primary_metric, test_set.outcome.take(kept))
    return AuditedCell(num_seen, result.num_test, point.value, point.reason, seen.choice)


def average_audited(found: Sequence[AuditedCell]) -> AuditedCell:
    """One cell of all draws and seeds: they have the same test images and the same encoder."""
    values = [cell.value for cell in found if cell.value is not None]
    undefined = next((cell.reason for cell in found if cell.value is None), None)
    return replace(found[0], value=float(np.mean(values)) if undefined is None else None, reason=undefined)
