"""What the board shows, as plain values: the shapes that `standings` fills and that page and tables are drawn from.

    LeaderboardSummary > Section (one ranked table) > Task (a column), Row (an encoder) > Cell, Standing, Comparison

One section is one (real or synthetic, protocol, variant, label_fraction): nothing is ranked across sections.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from panfm.evaluation.results import EncoderCard, make_folder_name
from panfm.measures.statistics import FEW_GROUPS


@dataclass(frozen=True)
class Task:
    """A column: one task, measured by its primary metric."""

    name: str
    version: int
    family: str
    title: str
    metric: str
    metric_title: str
    metric_description: str
    direction: Literal["higher", "lower"]  # which way is better
    classes: tuple[str, ...]
    unit: str  # what is scored: image, pair, slide, patient, ...
    num_test: int
    num_test_groups: int
    num_rarer_groups: int  # groups that decide whether an interval can be trusted, `which_groups` in words
    which_groups: str  # "in the rarer class", "with the event", "in all"
    group_kind: str
    synthetic: bool
    modality: str | None  # of its images; None = several, or a task of the user's own folder
    licence: str | None  # of its images
    access: str | None  # who can get its images: open, request, private
    claim: bool  # False: checks the pipeline, counts in no mean and no rank
    claim_note: str | None
    chance: float  # value of a predictor that knows what is common and nothing else: normalised 0
    perfect: float  # normalised 1

    @property
    def few_groups(self) -> bool:
        """Whether they are so few that most percentile intervals are too narrow."""
        return self.num_rarer_groups < FEW_GROUPS

    @property
    def higher_is_better(self) -> bool:
        """Which way the metric points."""
        return self.direction == "higher"

    @property
    def slug(self) -> str:
        """A name for its page, unique on the board: a task's images and its lesions are two test sets."""
        return self.name if self.unit == "image" else make_folder_name(f"{self.name}-{self.unit}")


@dataclass(frozen=True)
class Comparison:
    """An encoder minus the section's reference on the same test patients and the same draws of labels.

    reason: why something is None; beside an interval: why it may not cover what it says.
    """

    difference: float | None
    low: float | None
    high: float | None
    reason: str | None = None
    method: str | None = None
    p_value: float | None = None  # two-sided, 'no difference'; None outside the declared regime
    p_adjusted: float | None = None  # Holm over the encoders of this column

    @property
    def is_sure(self) -> bool:
        """Whether the difference stays significant at 5 % when all comparisons of its column are counted."""
        return self.p_adjusted is not None and self.p_adjusted < 0.05


# Whose word a cell is. recomputed: from predictions that lie here; verified: those were submitted, and the owner of the
# board got the same from the encoder; self_reported: the submitter's numbers, whose predictions stayed at home
# or are of images that nobody here could check. Only the first two are ranked and compared.
Origin = Literal["recomputed", "verified", "self_reported"]


@dataclass(frozen=True)
class AuditedCell:
    """What an audit says of an encoder on a task, and the value without the test images that pretraining has seen."""

    num_seen: int | None  # test images; None: the audit cannot tell, `reason` says why
    num_test: int
    value: float | None  # the primary metric of the others, mean over draws and seeds
    reason: str | None
    choice: str | None  # "excluded": pretraining left out what the audit lists; "flagged": it did not


@dataclass(frozen=True)
class Cell:
    """An encoder on a task: mean over draws and seeds with its 95 % interval; null with a reason.

    The interval holds the choice of test patients and, from `draws.MIN_DRAWS` draws on, that of the labelled ones.
    reason: why something is None; beside an interval: why it may not cover what it says.
    """

    value: float | None
    low: float | None
    high: float | None
    reason: str | None
    method: str | None  # how the interval was made: bootstrap, delong_logit, wilson, ...; "+draws": holds these, too
    num_runs: int  # draws x seeds
    spread: float | None  # standard deviation between draws
    num_train_groups: int | None  # labelled groups, the median over draws
    contamination: str
    difference: Comparison | None  # to the section's reference encoder, on the same patients
    predictions_sha256: tuple[str, ...]
    audit: AuditedCell | None = None  # None: the board was built without an audit
    origin: Origin = "recomputed"
    label_note: str | None = None  # why other than the label fraction's share of groups was labelled


@dataclass(frozen=True)
class Standing:
    """Where an encoder stands among those that have every task of the section."""

    rank: int  # 1 + number of encoders whose mean normalised score is surely higher
    rank_low: int | None  # 95 % interval of the Borda rank
    rank_high: int | None
    borda: float  # share of the other encoders that it beats, averaged over tasks
    score: float  # mean normalised score
    score_low: float | None  # 95 % interval for these very tasks
    score_high: float | None
    reason: str | None  # why there is no interval, or why it may not cover what it says


@dataclass(frozen=True)
class Row:
    """An encoder in a section."""

    encoder: EncoderCard
    cells: tuple[Cell, ...]  # in the order of the section's tasks
    standing: Standing | None
    reason: str | None  # why it has no standing
    over_tasks: Comparison | None  # mean normalised score minus the reference's, for tasks like these


@dataclass(frozen=True)
class PublishedCell:
    """A printed number, as it stands in its source."""

    value: float
    low: float | None
    high: float | None
    split: str  # on which images, in words: seldom ours
    where: str
    note: str | None


@dataclass(frozen=True)
class PublishedRow:
    """A model, or readers, of a publication: shown beside measured rows, never ranked with them."""

    model: str
    readers: bool  # people, not a model
    citation: str
    doi: str
    cells: tuple[PublishedCell | None, ...]  # in the order of the section's tasks


@dataclass(frozen=True)
class PublishedLine:
    """Any printed number about a task of the board, also where no section measures the same; or of a reader study."""

    task: str | None  # None: of no task here, `about` says of what
    about: str | None
    model: str
    readers: bool
    metric: str
    value: float | None  # None: a gain is printed instead
    low: float | None
    high: float | None
    gain: str | None  # as printed, with whom it is over
    protocol: str
    label_fraction: float
    split: str
    where: str
    note: str | None
    citation: str
    doi: str


@dataclass(frozen=True)
class Section:
    """One ranked table."""

    synthetic: bool
    protocol: str
    variant: str
    label_fraction: float
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]
    reference: str | None  # name of the encoder that the others are compared with
    published: tuple[PublishedRow, ...] = ()

    @property
    def is_compat(self) -> bool:
        """Whether its protocol repeats a publication's, to compare with that alone."""
        return self.protocol.endswith("_compat")

    @property
    def slug(self) -> str:
        """A name for anchors and files, unique on the board."""
        kind = "synthetic" if self.synthetic else "real"
        return f"{kind}-{self.protocol}-{self.variant}-f{self.label_fraction:g}".replace(".", "_")


@dataclass(frozen=True)
class DevelopmentRow:
    """A mean over development folds: shown apart, never ranked."""

    encoder: str
    task: str
    protocol: str
    variant: str
    label_fraction: float
    metric: str
    value: float | None
    num_runs: int


@dataclass(frozen=True)
class LeaderboardSummary:
    """All that the board shows."""

    sections: tuple[Section, ...]
    development: tuple[DevelopmentRow, ...]
    encoders: tuple[str, ...]  # all names, sorted: an encoder keeps its colour on the whole page
    num_results: int
    published: tuple[PublishedLine, ...] = ()
    audit: str | None = None  # SHA-256 of the audit.json that the cells were held against


def choose_reference(cards: Mapping[str, EncoderCard]) -> str | None:
    """The encoder at random weights if there is one, else the first by name; none where there is nothing to compare."""
    if len(cards) < 2:
        return None
    random = sorted(name for name, card in cards.items() if "@random:" in card.address)
    return random[0] if random else min(cards)
