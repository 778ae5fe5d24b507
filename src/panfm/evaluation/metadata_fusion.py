"""Protocol `metadata_fusion`: the linear probe on image features beside what is known of the patient and the lesion.

    features [N, D], metadata [N, E]  --side by side-->  linear_probe  ->  scores [M, K]     variant default
                      metadata [N, E]  ------------->  linear_probe  ->  scores [M, K]     variant metadata
        which facts are known [N, F]   ------------->  linear_probe  ->  scores [M, K]     variant missingness

The three are made together, because the first cannot be read without the others: in PAD-UFES-20 the mere fact that
somebody wrote a patient's sex down tells malignant lesions from benign ones better than most encoders do. Hence no
flags of what is missing in the first two.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from panfm.config import config_class
from panfm.errors import UserError
from panfm.evaluation.linear_probe import score_probe
from panfm.evaluation.metadata import encode_metadata, encode_missingness, read_metadata
from panfm.evaluation.protocol import Scored, Trial
from panfm.shards.index import ShardSet

Inputs = Literal["default", "metadata", "missingness", "phototype"]


@config_class
class MetadataFusionConfig:
    """Settings of the fusion with metadata."""

    variants: tuple[Inputs, ...] = ("default", "metadata", "missingness")
    """What is looked at, a section on the board each: default = image and metadata; metadata = without the image;
    missingness = only which facts were written down; phototype = as default, and the skin type: for an ablation."""
    num_folds: int = Field(default=5, ge=2)
    """Folds of the inner cross-validation; fewer where the rarest class has fewer groups."""


def score_metadata_fusion(
    trial: Trial, features: NDArray[np.float32], shard_set: ShardSet, config: MetadataFusionConfig
) -> Scored:
    """Return probabilities for the trial's test part. features: [N, D] of all images of the split, in its order.

    What is looked at is the variant of the trial's recipe. Raises UserError where nothing of the kind is known.
    """
    inputs, split = trial.recipe["variant"], trial.split
    metadata = read_metadata(shard_set, split.rows, with_phototype=inputs == "phototype")
    known = encode_missingness(metadata) if inputs == "missingness" else encode_metadata(metadata, trial.train)
    if known.shape[1] == 0:
        what = "is known of some images and not of others" if inputs == "missingness" else "differs between its images"
        raise UserError(
            f"task {trial.card.name}: no age, sex, anatomic site or tabular column of source {trial.card.source} "
            f"{what}, so there is nothing for metadata_fusion ({inputs}); map columns in the source card, or leave the "
            "protocol out"
        )
    joined = known
    if inputs in ("default", "phototype"):
        joined = np.concatenate([np.asarray(features, dtype=np.float64), known], axis=1)
    chosen = {"columns": list(metadata.columns), "num_encoded": known.shape[1]}
    return score_probe(trial, joined, config.num_folds, chosen)
