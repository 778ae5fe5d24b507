"""From features and labels to a classifier, and to figures made only on images that it did not see.

    all images --recipe--> the head, its strength chosen
    folds of patients --the whole fit, choices included, without each fold--> nested: the figures of the report
    folds of patients --the fit at the strength of the head----------------> settled: temperature, operating point

The figures are nested: no choice has seen the patients that it is measured on. Temperature and threshold are numbers on
the scale of the head's own logits, and that scale hangs on the strength: taken from nested logits, whose strength jumps
from fold to fold, they do not fit the head (measured on 60 draws of 100 patients: the interval of the specificity then
covered 77 % of the truths, 93 % as it is done here; the choice of one number flatters the scores by less than the fold
that they miss costs them: AUROC 0.751, on new patients 0.761). The classifier itself learns from every image, a little
more than any fold did, so that its figures lean to the cautious side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from panfm.clinic.outliers import choose_outlier_threshold, fit_outliers
from panfm.clinic.recipes import Floats, Ints, Learned, Recipe
from panfm.clinic.threshold import OperatingCard, Unit, Wanted, choose_operating_point
from panfm.measures.probe import fit_probe_cv, make_group_folds
from panfm.progress import progress_bar
from panfm_predict.classifier import compute_probabilities
from panfm_predict.outliers import Outliers, compute_scores, project

LARGEST_TEMPERATURE = 20.0
TEMPERATURE_SPREAD = 0.5  # of the prior of log T: felt only where all held-out images are right and T would fall to 0
NUM_PERCENT = 101  # quantiles 0, 1 .. 100 %
MAX_REFERENCE = 32  # leading components whose marginals are kept


@dataclass(frozen=True)
class OutOfFold:
    """What the images got from classifiers that had seen neither them nor their patient.

    folds: [N]. logits: [N, K]. probabilities: [N, K], each fold at the temperature of the others. scores: [N], outlier.
    chosen: what the recipe chose in each fold.
    """

    folds: Ints
    logits: Floats
    probabilities: Floats
    scores: Floats
    chosen: tuple[dict[str, float | int | str], ...]

    @property
    def num_folds(self) -> int:
        """Number of folds."""
        return int(self.folds.max()) + 1


@dataclass(frozen=True)
class ModalityHead:
    """Which modality a standardised feature looks like: names [M] (the fitted one first), weight [M, D], bias [M].

    right: share of held-out images, of the fitted modality and of the others, whose modality was told.
    """

    names: tuple[str, ...]
    weight: Floats
    bias: Floats
    right: tuple[float | None, float | None]


@dataclass(frozen=True)
class Fitted:
    """A classifier in arrays. nested, settled: see the top. card: the operating point, or why there is none.

    reference_*: quantiles (0 to 100 %), of what new images are compared with: projections of the fitted images on the
    leading components [Q2, 101], out-of-fold outlier scores [101], out-of-fold calibrated probabilities [K, 101].
    """

    learned: Learned
    temperature: float
    nested: OutOfFold
    settled: OutOfFold
    outliers: Outliers
    outlier_threshold: float
    card: OperatingCard | str
    reference_quantiles: Floats
    reference_scores: Floats
    reference_probabilities: Floats


def fit_classifier(
    recipe: Recipe,
    labels: Ints,
    groups: NDArray,
    *,
    classes: Sequence[str],
    positive: str | None,
    wanted: Wanted | None,
    unit: Unit,
    num_folds: int,
    seed: int,
) -> Fitted:
    """Fit a classifier of K classes to N images and cross-validate the whole fit by groups.

    labels: [N]. groups: [N] names. Every class has at least two groups. positive, wanted: of the operating point.
    """
    everything = np.arange(len(labels))
    folds = make_group_folds(labels, groups, num_folds, seed)
    learned = recipe.learn(everything, everything[:0], None)
    nested = cross_validate(recipe, labels, groups, folds, num_classes=len(classes))
    settled = (
        cross_validate(recipe, labels, groups, folds, num_classes=len(classes), like=learned)
        if recipe.chooses
        else nested
    )
    temperature = fit_temperature(settled.logits, labels)
    probabilities = compute_probabilities(settled.logits, temperature)
    z = learned.standardise(learned.learned_from)
    outliers = fit_outliers(z, groups)
    percent = np.linspace(0, 100, NUM_PERCENT)
    leading = project(z, outliers)[:, :MAX_REFERENCE]
    card: OperatingCard | str
    if positive is None:
        card = "no class was named as the positive one (--positive)"
    elif wanted is None:
        card = "no sensitivity or specificity was asked for (--sensitivity 0.95 or --specificity 0.9)"
    else:
        place = list(classes).index(positive)
        card = choose_operating_point(
            labels == place, probabilities[:, place], groups, positive=positive, wanted=wanted, unit=unit
        )
    return Fitted(
        learned=learned,
        temperature=temperature,
        nested=nested,
        settled=settled,
        outliers=outliers,
        outlier_threshold=choose_outlier_threshold(settled.scores, groups),
        card=card,
        reference_quantiles=np.percentile(leading, percent, axis=0).T,
        reference_scores=np.percentile(settled.scores, percent),
        reference_probabilities=np.percentile(probabilities, percent, axis=0).T,
    )


def cross_validate(
    recipe: Recipe, labels: Ints, groups: NDArray, folds: Ints, *, num_classes: int, like: Learned | None = None
) -> OutOfFold:
    """Score every image by a recipe that learned from the other folds [N]; like: whose choices it takes over."""
    num_made = int(folds.max()) + 1
    assert num_made >= 2, "every class has two groups"
    logits, scores = np.empty((len(labels), num_classes)), np.empty(len(labels))
    chosen = []
    with progress_bar("cross-validate", num_made, unit="folds") as advance:
        for fold in range(num_made):
            train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            learned = recipe.learn(train, test, like)
            logits[test] = learned.compute_logits(learned.to_score)
            outliers = fit_outliers(learned.standardise(learned.learned_from), groups[train])
            scores[test] = compute_scores(learned.standardise(learned.to_score), outliers)
            chosen.append(learned.chosen)
            advance()
    probabilities = np.empty_like(logits)
    for fold in range(num_made):
        others, own = folds != fold, folds == fold
        probabilities[own] = compute_probabilities(logits[own], fit_temperature(logits[others], labels[others]))
    return OutOfFold(folds, logits, probabilities, scores, tuple(chosen))


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """Fit the temperature (Guo et al. 2017) of held-out logits [N, K] by log-loss, under a weak prior around 1."""
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logits * np.exp(-log_temperature)
        misfit = float((logsumexp(scaled, axis=1) - scaled[rows, labels]).sum())
        return misfit + 0.5 * (log_temperature / TEMPERATURE_SPREAD) ** 2

    bound = float(np.log(LARGEST_TEMPERATURE))
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def fit_modality_head(
    learned: Learned,
    groups: NDArray,
    modality: str,
    other_features: NDArray[np.floating],
    other_modalities: Sequence[str],
    other_groups: NDArray,
    *,
    seed: int,
) -> ModalityHead:
    """Learn which modality a feature is of, from the fitted images and examples [E, D] of others."""
    names = (modality, *sorted(set(other_modalities)))
    number = {name: place for place, name in enumerate(names)}
    features = np.concatenate([learned.learned_from, other_features.astype(np.float64)])
    labels = np.array([0] * len(learned.learned_from) + [number[name] for name in other_modalities])
    # A patient with images of both modalities stays in one fold.
    fit = fit_probe_cv(features, labels, np.concatenate([groups, other_groups]), num_classes=len(names), seed=seed)
    probe = fit.probe
    # Of the fitted images' standardised features, not of the probe's own.
    weight = probe.weight * learned.scale / probe.scale
    bias = probe.bias + ((learned.mean - probe.mean) / probe.scale) @ probe.weight.T
    right: tuple[float | None, float | None] = (None, None)
    if fit.held_out is not None:
        hits = fit.held_out.argmax(axis=1) == labels
        right = float(hits[labels == 0].mean()), float(hits[labels > 0].mean())
    return ModalityHead(names, weight, bias, right)
