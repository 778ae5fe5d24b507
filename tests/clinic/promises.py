"""Does a report of `panfm adapt` keep its promises: many draws of few patients, each measured on all the others.

    encoder x shard set --features--> draw 10 % of the groups --fit, report--> promised --the other 90 %--> found

    python -m tests.clinic.promises panfm:exports/first shards/pad_ufes20 --label malignant --positive malignant

Prints, a figure a row: the median of what was promised, the median of what the other patients gave, and in how many
draws that lay below, inside and above the promised interval. The table of docs/few_labels.md is made with it.
"""

import argparse
from pathlib import Path

import numpy as np

from panfm.clinic.figures import compute_figures
from panfm.clinic.fit import fit_classifier
from panfm.clinic.recipes import build_probe_recipe
from panfm.clinic.threshold import OperatingCard, Wanted
from panfm.encoder import load_encoder
from panfm.features import compute_features
from panfm.measures.calibration import compute_calibration
from panfm.measures.intervals import Estimate
from panfm.measures.metrics import compute_metric
from panfm.progress import muted
from panfm.shards.index import open_shard_set
from panfm_predict.classifier import compute_probabilities
from panfm_predict.outliers import compute_scores

Row = dict[str, tuple[Estimate, float | None]]  # figure -> promised, found
METRICS = ("auroc", "balanced_accuracy", "brier")


def measure_draw(
    features: np.ndarray, positive: np.ndarray, groups: np.ndarray, fraction: float, wanted: Wanted, draw: int
) -> tuple[Row, float]:
    """One draw: what was promised and found, and the share of the other patients' images that are called outliers."""
    names = np.unique(groups)
    chosen = np.random.default_rng(draw).choice(names, round(fraction * len(names)), replace=False)
    own = np.isin(groups, chosen)
    labels, truth = positive[own].astype(np.int64), positive[~own].astype(np.int64)
    fitted = fit_classifier(
        build_probe_recipe(features[own], labels, groups[own], num_classes=2, seed=0),
        labels,
        groups[own],
        classes=("no", "yes"),
        positive="yes",
        wanted=wanted,
        unit="patients",
        num_folds=10,
        seed=0,
    )
    figures = compute_figures(labels, groups[own], fitted.nested.probabilities, ("no", "yes"), "yes", seed=0)
    logits = fitted.learned.compute_logits(features[~own])
    scores = compute_probabilities(logits, fitted.temperature)
    row: Row = {name: (figures.overall[name], compute_metric(name, truth, scores).value) for name in METRICS}
    slope, intercept = compute_calibration(truth, scores[:, 1], np.ones((1, len(truth))))
    row["calibration slope"] = figures.calibration.slope, float(slope[0])
    row["calibration intercept"] = figures.calibration.intercept, float(intercept[0])
    if isinstance(fitted.card, OperatingCard):
        called = scores[:, 1] >= fitted.card.threshold
        row["sensitivity"] = fitted.card.sensitivity, float(called[truth == 1].mean())
        row["specificity"] = fitted.card.specificity, float((~called[truth == 0]).mean())
    outlying = compute_scores(fitted.learned.standardise(features[~own]), fitted.outliers) > fitted.outlier_threshold
    return row, float(outlying.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder")
    parser.add_argument("shards")
    parser.add_argument("--label", required=True)
    parser.add_argument("--positive", required=True)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--sensitivity", type=float, default=0.9)
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--cache", type=Path, default=Path("cache/features"))
    options = parser.parse_args()
    shard_set = open_shard_set(options.shards)
    features = compute_features(load_encoder(options.encoder), shard_set, cache_dir=options.cache)
    values = np.asarray(features.values, dtype=np.float64)
    stored = [labels.get(options.label) for labels in map(dict, shard_set.table.column("labels").to_pylist())]
    positive = np.array([(label[0] if isinstance(label, list) else label) == options.positive for label in stored])
    groups = np.array(shard_set.table.column("group_id").to_pylist())
    rows, outlying = [], []
    for draw in range(options.draws):
        with muted():
            row, share = measure_draw(
                values, positive, groups, options.fraction, Wanted("sensitivity", options.sensitivity), draw
            )
        rows.append(row)
        outlying.append(share)
    print(f"{'figure':24s} draws promised  found  below inside above")
    for name in rows[0]:
        pairs = [row[name] for row in rows if name in row]
        whole = [
            (one.value, one.low, one.high, found) for one, found in pairs if None not in (one.value, one.low, found)
        ]
        promised, low, high, found = np.array(whole, dtype=np.float64).T
        below, above = (found < low).sum(), (found > high).sum()
        print(
            f"{name:24s} {len(whole):5d} {np.median(promised):8.3f} {np.median(found):6.3f} {below:6d} "
            f"{len(whole) - below - above:6d} {above:5d}"
        )
    print(f"called outliers, of the other patients' images: {np.mean(outlying):.1%}")


if __name__ == "__main__":
    main()
