"""Metrics of segmentation, retrieval, ugly duckling and out of distribution equal a loop over the repeated units."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from panfm.measures import detection, regions, retrieval
from panfm.measures.outcomes import Measure, Outcome
from panfm.measures.statistics import draw_group_weights
from panfm.measures.weighted import compute_medians


def make_outcome(scores: np.ndarray, **more: np.ndarray) -> Outcome:
    N = len(scores)
    values = {"labels": np.zeros(N, np.int64), "targets": np.zeros((N, 0)), "groups": np.arange(N).astype(str), **more}
    return Outcome(scores=np.asarray(scores, dtype=np.float64), **values)


def make_regions(rng: np.random.Generator, num_images: int = 40) -> Outcome:
    targets = rng.integers(0, 60, (num_images, 3)) * (rng.random((num_images, 3)) > 0.4)
    predicted = rng.integers(0, 60, (num_images, 3)) * (rng.random((num_images, 3)) > 0.4)
    shared = np.minimum(targets, predicted) - rng.integers(0, 60, (num_images, 3))
    groups = (np.arange(num_images) // 3).astype(str)
    return make_outcome(
        np.hstack([np.maximum(shared, 0), predicted]), targets=targets.astype(np.float64), groups=groups
    )


def make_queries(rng: np.random.Generator, num_queries: int = 60) -> Outcome:
    partners = rng.integers(1, 4, num_queries)
    ranks = rng.integers(2, 50, num_queries) / 2  # some between two places: ties
    return make_outcome(
        np.stack([ranks, np.full(num_queries, 25)], 1),
        targets=partners[:, None].astype(np.float64),
        groups=(np.arange(num_queries) // 2).astype(str),
    )


def make_people(rng: np.random.Generator, num_images: int = 120) -> Outcome:
    score = np.round(rng.random(num_images), 1)  # rounded: many tie
    groups = rng.integers(0, 20, num_images).astype(str)
    return make_outcome(
        np.stack([1 - score, score], 1), labels=(rng.random(num_images) < 0.2).astype(np.int64), groups=groups
    )


def make_unknown(rng: np.random.Generator, num_images: int = 150) -> Outcome:
    labels = rng.integers(0, 4, num_images)  # 3 = unknown
    unknownness = np.round(rng.normal(size=num_images) + (labels == 3), 1)
    scores = np.hstack([rng.dirichlet(np.ones(3), num_images), unknownness[:, None]])
    return make_outcome(scores, labels=labels, groups=(np.arange(num_images) // 2).astype(str))


def loop_region(outcome: Outcome, places: np.ndarray, *, dice: bool) -> float:
    values = []
    for i in places:
        of_image = []
        for s in range(3):
            shared, predicted, true = outcome.scores[i, s], outcome.scores[i, 3 + s], outcome.targets[i, s]
            if predicted + true == 0:
                of_image.append(1.0)
            else:
                of_image.append(2 * shared / (predicted + true) if dice else shared / (predicted + true - shared))
        values.append(np.mean(of_image))
    return float(np.mean(values))


def loop_recall_within(outcome: Outcome, places: np.ndarray, k: int) -> float:
    """The units as they are repeated, each person ranked once: ranks are those of the person's distinct images."""
    hits = []
    for i in places[outcome.labels[places] == 1]:
        own = outcome.scores[outcome.groups == outcome.groups[i], 1]
        rank = 1 + (own > outcome.scores[i, 1]).sum() + ((own == outcome.scores[i, 1]).sum() - 1) / 2
        hits.append(rank <= k)
    return float(np.mean(hits)) if hits else np.nan


def loop_fpr(outcome: Outcome, places: np.ndarray) -> float:
    false, true, _ = roc_curve(outcome.labels[places] == 3, outcome.scores[places, 3], drop_intermediate=False)
    return float(false[true >= 0.95 - 1e-12].min())


CASES: list[tuple[dict[str, Measure], str, Callable[..., Outcome], Callable[[Outcome, np.ndarray], float]]] = [
    (regions.MEASURES, "dice", make_regions, lambda o, p: loop_region(o, p, dice=True)),
    (regions.MEASURES, "jaccard", make_regions, lambda o, p: loop_region(o, p, dice=False)),
    (retrieval.MEASURES, "recall_at_1", make_queries, lambda o, p: float(np.mean(o.scores[p, 0] <= 1))),
    (retrieval.MEASURES, "recall_at_5", make_queries, lambda o, p: float(np.mean(o.scores[p, 0] <= 5))),
    (retrieval.MEASURES, "recall_at_10", make_queries, lambda o, p: float(np.mean(o.scores[p, 0] <= 10))),
    (retrieval.MEASURES, "median_rank", make_queries, lambda o, p: float(np.median(o.scores[p, 0]))),
    (detection.MEASURES_UGLY_DUCKLING, "recall_at_1", make_people, lambda o, p: loop_recall_within(o, p, 1)),
    (detection.MEASURES_UGLY_DUCKLING, "recall_at_3", make_people, lambda o, p: loop_recall_within(o, p, 3)),
    (
        detection.MEASURES_OUT_OF_DISTRIBUTION, "unknown_auroc", make_unknown,
        lambda o, p: roc_auc_score(o.labels[p] == 3, o.scores[p, 3]),
    ),
    (
        detection.MEASURES_OUT_OF_DISTRIBUTION, "unknown_auprc", make_unknown,
        lambda o, p: average_precision_score(o.labels[p] == 3, o.scores[p, 3]),
    ),
    (detection.MEASURES_OUT_OF_DISTRIBUTION, "fpr_at_95_tpr", make_unknown, loop_fpr),
]  # fmt: skip


@pytest.mark.parametrize(("measures", "name", "make", "loop"), CASES, ids=lambda value: str(value)[:20])
def test_replicates_equal_a_loop_over_the_repeated_units(
    measures: dict[str, Measure],
    name: str,
    make: Callable[..., Outcome],
    loop: Callable[[Outcome, np.ndarray], float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("panfm.measures.weighted.MAX_BLOCK_VALUES", 700)  # several blocks, the last one short
    outcome = make(np.random.default_rng(3))
    N = len(outcome.scores)
    weights = draw_group_weights(outcome.groups, 30, 5)
    weights[0] = 1
    weights[1] = 0
    weights[1, :2] = 2  # of two units, one may be undefined
    found = measures[name].compute(outcome, weights)
    assert measures[name].explain(outcome) is None
    for r in [0, *range(2, 30)]:
        assert found[r] == pytest.approx(loop(outcome, np.repeat(np.arange(N), weights[r])), abs=1e-12)
    nothing = measures[name].compute(outcome, np.zeros((2, N), dtype=np.uint16))
    assert np.isnan(nothing).all()  # undefined, not 0


def test_empty_masks_are_right_only_where_nothing_is_predicted() -> None:
    ones = np.ones((1, 1), dtype=np.uint16)
    for shared, predicted, true, dice, jaccard in (
        (0, 0, 0, 1, 1), (0, 7, 0, 0, 0), (0, 0, 7, 0, 0), (4, 4, 4, 1, 1), (2, 4, 4, 0.5, 1 / 3)
    ):  # fmt: skip
        outcome = make_outcome(np.array([[shared, predicted]]), targets=np.array([[float(true)]]))
        assert regions.MEASURES["dice"].compute(outcome, ones)[0] == pytest.approx(dice, abs=1e-15)
        assert regions.MEASURES["jaccard"].compute(outcome, ones)[0] == pytest.approx(jaccard, abs=1e-15)
    half = make_outcome(np.zeros((2, 2)), targets=np.array([[0.0], [5.0]]))
    assert regions.MEASURES["dice"].chance(half) == 0.5


def test_an_undefined_metric_says_why() -> None:
    rng = np.random.default_rng(0)
    people, unknown = make_people(rng), make_unknown(rng)
    benign = people.take(people.labels == 0)
    assert detection.MEASURES_UGLY_DUCKLING["recall_at_1"].explain(benign) == "no positive test image"
    explain = detection.MEASURES_OUT_OF_DISTRIBUTION["fpr_at_95_tpr"].explain
    assert explain(unknown.take(unknown.labels == 3)) == "no test image of a known class"
    assert explain(unknown.take(unknown.labels < 3)) == "no test image of an unknown class"


def test_chance_is_what_blind_scores_reach() -> None:
    """Each `chance` equals the mean over many blind predictors."""
    rng = np.random.default_rng(1)
    ones = np.ones((1, 60), dtype=np.uint16)
    queries = make_queries(rng)
    blind = []
    for _ in range(400):
        places = np.argsort(rng.random((60, 25)), axis=1)
        inside = np.arange(25) < queries.targets.astype(int)
        ranks = np.where(inside, places, 25).min(axis=1) + 1.0
        outcome = make_outcome(np.stack([ranks, queries.scores[:, 1]], 1), targets=queries.targets)
        blind.append([retrieval.MEASURES[f"recall_at_{k}"].compute(outcome, ones)[0] for k in (1, 5, 10)])
    expected = [retrieval.MEASURES[f"recall_at_{k}"].chance(queries) for k in (1, 5, 10)]
    np.testing.assert_allclose(np.mean(blind, axis=0), expected, atol=0.012)
    all_partners = make_outcome(np.array([[1.0, 3.0]]), targets=np.array([[3.0]]))
    assert retrieval.MEASURES["recall_at_1"].chance(all_partners) == 1
    assert retrieval.MEASURES["recall_at_5"].chance(all_partners) == 1  # five of a gallery of three
    assert retrieval.MEASURES["median_rank"].chance(all_partners) == 1

    people = make_people(rng, 400)
    recall = detection.MEASURES_UGLY_DUCKLING["recall_at_3"]
    found = []
    for _ in range(200):
        blind_scores = rng.random(400)
        outcome = make_outcome(
            np.stack([1 - blind_scores, blind_scores], 1), labels=people.labels, groups=people.groups
        )
        found.append(recall.compute(outcome, np.ones((1, 400), np.uint16))[0])
    assert np.mean(found) == pytest.approx(recall.chance(people), abs=0.01)


@pytest.mark.parametrize("counts", [[2, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 3], [1, 0, 0, 3], [5, 0, 4, 1]])
def test_the_median_is_that_of_the_repeated_values(counts: list[int]) -> None:
    values = np.array([4.0, 1.0, 9.0, 2.5])
    found = compute_medians(values, np.array([counts], dtype=np.uint16))[0]
    assert found == np.median(np.repeat(values, counts))
