"""What the board says in words: sections, cells and standings in, sentences and formatted numbers out."""

from panfm.board.summary import Cell, Comparison, Row, Section, Task

PROTOCOLS = {
    "linear_probe": "Linear probe",
    "knn": "Nearest neighbours",
    "prototype": "Nearest class mean",
    "finetune": "Fine-tuning",
    "metadata_fusion": "Linear probe with metadata",
    "case_fusion": "Linear probe on all images of a lesion",
    "leave_institution_out": "Linear probe, each institution left out in turn",
    "regression": "Ridge regression",
    "ordinal": "Ordinal probe",
    "survival": "Cox regression",
    "change": "Change between two visits",
    "slides": "Slides, from their tiles",
    "segmentation": "Segmentation head",
    "retrieval": "Retrieval",
    "zero_shot": "Classes named in words, nothing trained",
    "ugly_duckling": "Outlier among a patient's lesions",
    "out_of_distribution": "Telling unknown classes",
    "panderm_compat": "As PanDerm's code, to compare with its numbers",
    "dinov2_compat": "As DINOv2's code, to compare with its numbers",
}
CONTAMINATION = {
    "excluded": "test patients kept out of pretraining",
    "none": "no skin images in pretraining",
    "unknown": "pretraining overlap unknown",
}
ORIGINS = {  # Cell.origin: whose word a value is
    "recomputed": "recomputed from its predictions",
    "verified": "verified: the board's owner got the same from the encoder",
    "self_reported": "self-reported: nobody else could check it",
}
METHODS = {
    "bootstrap": "percentiles of 2,000 bootstrap samples of whole patients",
    "delong_logit": "DeLong's variance held together by patient (Obuchowski), on the logit scale",
    "newcombe": "Newcombe's interval, patients in place of images",
    "wilson": "Wilson's interval, held together by patient",
    "clustered_t": "Student's t on the standard error held together by patient",
    "delong": "DeLong's test",
    "delong_clustered": "DeLong's test, held together by patient (Obuchowski)",
    "hierarchical_bootstrap": "bootstrap of tasks, then of patients",
}
RESEARCH_ONLY = (
    "For research only. These numbers compare image encoders; they do not show that any of them is safe or useful for "
    "the care of patients."
)


def describe_protocol(section: Section) -> str:
    """Name a section's protocol and labels: 'Linear probe, 10 % of labels'."""
    name = PROTOCOLS.get(section.protocol, section.protocol)
    variant = "" if section.variant == "default" else f" ({section.variant.replace('_', ' ')})"
    return f"{name}{variant}, {describe_fraction(section.label_fraction)}"


def describe_fraction(label_fraction: float) -> str:
    """Say how many labels were used: '10 % of labels'; a protocol without training used none."""
    return f"{label_fraction * 100:g} % of labels" if label_fraction > 0 else "no labels"


def describe_winner(section: Section) -> str:
    """Say in one sentence who leads, and whether the data can tell."""
    leaders = [row.encoder.name for row in section.rows if row.standing and row.standing.rank == 1]
    num_ranked = sum(row.standing is not None for row in section.rows)
    if not leaders:
        return f"No ranking: {section.rows[0].reason}."
    if len(leaders) == 1:
        return f"{leaders[0]} leads: its mean score is above that of every other ranked encoder, beyond chance."
    names = f"{', '.join(leaders[:-1])} and {leaders[-1]}"
    if len(leaders) == num_ranked:
        return f"{names} share the first place: these patients cannot tell any of them apart."
    return f"{names} share the first place: these patients cannot tell them apart."


def describe_unranked(section: Section) -> str:
    """Say which encoders stand outside the ranking, if some are ranked; else nothing."""
    outside = [row.encoder.name for row in section.rows if row.standing is None]
    if not outside or len(outside) == len(section.rows):
        return ""
    stated = [row.encoder.name for row in section.rows if row.reason is not None and "self-reported" in row.reason]
    missing = [name for name in outside if name not in stated]
    sentences = [f"Not ranked, because tasks are missing: {', '.join(missing)}."] if missing else []
    if stated:
        sentences.append(f"Not ranked, because self-reported: {', '.join(stated)}.")
    return " ".join(sentences)


def is_shared(section: Section, row: Row) -> bool:
    """Whether other encoders of the section have this row's rank too."""
    same = [other for other in section.rows if other.standing and row.standing]
    return sum(other.standing.rank == row.standing.rank for other in same if other.standing and row.standing) > 1


def is_best(section: Section, place: int, cell: Cell) -> bool:
    """Whether a cell holds the best value of its task in the section."""
    values = [row.cells[place].value for row in section.rows]
    known = [value for value in values if value is not None]
    if cell.value is None or len(known) < 2:
        return False
    return cell.value == (max(known) if section.tasks[place].higher_is_better else min(known))


def list_contamination(section: Section, row: Row) -> list[tuple[str, str]]:
    """Say what is known of an encoder's pretraining and these tests: (kind, words), one for each kind that occurs."""
    found = [cell.contamination for cell in row.cells if cell.num_runs]
    kinds = [kind for kind in ("unknown", "excluded", "none") if kind in found]
    if len(kinds) == 1:
        return [(kinds[0], CONTAMINATION[kinds[0]])]
    return [(kind, f"{CONTAMINATION[kind]} ({found.count(kind)} of {len(found)} tasks)") for kind in kinds]


def describe_audit(cell: Cell) -> tuple[str, str] | None:
    """Say what an audit found for a cell: (badge, words); None where no audit was read or nothing was measured."""
    audit = cell.audit
    if audit is None or cell.num_runs == 0:
        return None
    if audit.num_seen is None:
        return "unknown", f"not audited: {audit.reason}"
    if audit.num_seen == 0:
        left_out = "kept out of pretraining" if audit.choice == "excluded" else "none found"
        return "excluded", f"audit: copies of test images {left_out}"
    value = f"without them {format_number(audit.value)}" if audit.value is not None else f"without them: {audit.reason}"
    share = format_percent(audit.num_seen / audit.num_test)
    return "unknown", f"audit: {audit.num_seen} of {audit.num_test} test images ({share}) in pretraining; {value}"


def describe_units(task: Task) -> str:
    """Count what was scored: '180 images, 60 patients'."""
    groups = f", {task.num_test_groups} {task.group_kind}s" if task.group_kind in ("patient", "lesion", "slide") else ""
    first, _, rest = task.unit.partition(" ")  # "image of a known institution"
    plural = " ".join([{"query": "queries"}.get(first, f"{first}s"), rest]).strip()
    same = task.unit == task.group_kind and task.num_test == task.num_test_groups
    return f"{task.num_test} {plural}{'' if same else groups}"


def describe_method(method: str | None, num_draws: int | None = None) -> str:
    """Say how an interval was made: its code on the board in words; '' where there is none."""
    if method is None:
        return ""
    name, _, added = method.partition("+")
    words = METHODS.get(name, name)
    if not added:
        return words
    of = "the draws" if num_draws is None else f"{num_draws} runs"
    return f"{words}; widened by the choice of labelled patients (Student's t over {of})"


def describe_trust(reason: str | None) -> str | None:
    """Say in a few words that an interval outside its declared regime stands on too little, or None."""
    return None if reason is None else "interval may be too narrow"


def describe_gap(gap: Comparison) -> str:
    """Say whether a difference can be told from none: its p-value, adjusted for all comparisons of its column."""
    if gap.p_adjusted is None:
        return "no p-value: " + (gap.reason or "no interval")
    adjusted = "p < 0.01" if gap.p_adjusted < 0.01 else f"p = {gap.p_adjusted:.2f}"
    return f"{adjusted}, adjusted"


def describe_rank(section: Section, row: Row) -> str:
    """Rank with its interval, '=' where it is shared."""
    if row.standing is None:
        return "–"
    rank = f"{'=' if is_shared(section, row) else ''}{row.standing.rank}"
    if row.standing.rank_low is None:
        return rank
    return f"{rank} [{row.standing.rank_low}–{row.standing.rank_high}]"


def describe_score(row: Row) -> str:
    """Mean normalised score with its interval."""
    if row.standing is None:
        return "–"
    return _with_interval(row.standing.score, row.standing.score_low, row.standing.score_high)


def describe_cell(cell: Cell) -> str:
    """Value with its interval; a dagger where that may not cover what it says."""
    if cell.value is None:
        return "missing" if cell.num_runs == 0 else "undefined"
    return _with_interval(cell.value, cell.low, cell.high) + ("†" if cell.reason is not None else "")


def _with_interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a number with a true minus sign; – where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def format_signed(value: float | None, digits: int = 3) -> str:
    """Format a difference."""
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")


def format_percent(value: float) -> str:
    """Format a share in percent."""
    return f"{value * 100:.3g} %"


def format_count(value: float | None) -> str:
    """Format a large count: 5.5 M."""
    if value is None:
        return "unknown"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"
