"""What each metric is called, which way is better, and where it is defined; `metrics` computes them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricDefinition:
    """What a metric is called, which way is better, and where it is defined."""

    title: str
    direction: Literal["higher", "lower"]
    description: str
    binary_only: bool = False
    needs_probabilities: bool = False


METRICS: dict[str, MetricDefinition] = {
    "auroc": MetricDefinition(
        "AUROC", "higher", "Area under the ROC curve; with more than two classes the mean of all one-versus-rest areas."
    ),
    "auprc": MetricDefinition(
        "AUPRC", "higher", "Average precision; with more than two classes the mean over classes. Depends on prevalence."
    ),
    "balanced_accuracy": MetricDefinition("Balanced accuracy", "higher", "Mean recall over all classes."),
    "accuracy": MetricDefinition("Accuracy", "higher", "Share of images whose highest score is the right class."),
    "weighted_f1": MetricDefinition("Weighted F1", "higher", "F1 of each class, weighted by its number of images."),
    "macro_f1": MetricDefinition("Macro F1", "higher", "Mean of the F1 of all classes."),
    "kappa": MetricDefinition("Cohen's kappa", "higher", "Agreement beyond chance, unweighted."),
    "sensitivity_at_90_specificity": MetricDefinition(
        "Sensitivity at 90 % specificity",
        "higher",
        "Highest sensitivity on the test ROC curve where specificity is at least 90 % (no transferred threshold).",
        binary_only=True,
    ),
    "sensitivity_at_95_specificity": MetricDefinition(
        "Sensitivity at 95 % specificity",
        "higher",
        "Highest sensitivity on the test ROC curve where specificity is at least 95 % (no transferred threshold).",
        binary_only=True,
    ),
    "partial_auroc_above_80_sensitivity": MetricDefinition(
        "Partial AUROC above 80 % sensitivity",
        "higher",
        "Mean specificity over all sensitivities from 80 to 100 % (area under that part of the ROC curve / 0.2).",
        binary_only=True,
    ),
    "brier": MetricDefinition(
        "Brier score",
        "lower",
        "Mean squared error of the probabilities: of class 1 for two classes, summed over classes for more.",
        needs_probabilities=True,
    ),
    "ece": MetricDefinition(
        "Calibration error",
        "lower",
        "Expected calibration error, 15 bins of equal mass: of class 1 for two classes, of the top class for more.",
        needs_probabilities=True,
    ),
    "log_loss": MetricDefinition(
        "Log-loss", "lower", "Mean negative log-probability of the right class.", needs_probabilities=True
    ),
}
