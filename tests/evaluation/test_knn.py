from collections.abc import Callable

import numpy as np

from panfm.evaluation.knn import KnnConfig, score_knn
from panfm.evaluation.protocol import build_trial
from panfm.evaluation.results import EncoderCard
from panfm.evaluation.splits import load_split
from panfm.evaluation.tasks import TaskCard
from panfm.shards.index import ShardSet

ENCODER = EncoderCard(name="e", address="a", hash="h", num_parameters=1, embed_dim=2, image_size=32, pooling="mean")


def test_votes_of_the_nearest_by_cosine(clinic: ShardSet, make_task: Callable[..., TaskCard]) -> None:
    card = make_task()
    trial = build_trial(
        card, load_split(card, clinic), ENCODER, clinic, protocol="knn", recipe={"variant": "default"},
        evaluated_on="test", label_fraction=0.2, draw=1, seed=0, num_replicates=200,
    )  # fmt: skip
    labels = trial.split.labels
    # Class 0 points along x, class 1 along y; lengths differ, which the cosine ignores.
    length = np.linspace(1, 9, len(labels))[:, None]
    features = (np.eye(2)[labels] * length).astype(np.float32)
    num_train = len(trial.train)
    scored = score_knn(trial, features, KnnConfig(k=3))
    np.testing.assert_allclose(scored.scores, np.eye(2)[labels[trial.test]], atol=1e-5)
    # With more neighbours than images all vote, each with exp(similarity / T): similarity is 1 or 0.
    scored = score_knn(trial, features, KnnConfig(k=1000, temperature=1.0))
    assert scored.chosen == {"k": num_train}
    counts = np.bincount(labels[trial.train], minlength=2)
    for row, label in zip(scored.scores, labels[trial.test], strict=True):
        votes = counts * np.where(np.arange(2) == label, np.e, 1.0)
        np.testing.assert_allclose(row, votes / votes.sum(), rtol=1e-5)
