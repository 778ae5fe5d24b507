"""What a model card warns of, worked out from facts: CardFacts in, sentences out, each with the number it stands on."""

from collections.abc import Iterator

from panfm.board.reports.counts import KINDS, UNKNOWN
from panfm.board.reports.model_card_facts import CardFacts
from panfm.board.reports.model_card_results import list_tasks
from panfm.board.words import format_percent
from panfm.evaluation.subgroup_columns import PHOTOTYPE_BANDS
from panfm.shards.schema import MODALITIES

DARK = "{}-{}".format(*PHOTOTYPE_BANDS[-1])  # the band of the darkest skin types
MOST = 0.5  # of the images: a source with more of them decides what the encoder has learned


def list_limits(found: CardFacts) -> tuple[str, ...]:
    """List the limits that the facts show, the training data first, then the results."""
    return (*_limit_data(found), *_limit_results(found))


def _limit_data(found: CardFacts) -> Iterator[str]:
    facts = found.facts
    if facts is None:
        if found.description.training_data is None:
            yield "Nobody here knows what it was trained on: it may have seen any test image."
        return
    total = sum(source.num_kept for source in facts.sources)
    if found.all_synthetic:
        yield "All training images are drawn by a program: nothing follows for skin."
    if total:
        largest = max(facts.sources, key=lambda source: source.num_kept)
        if len(facts.sources) == 1:
            yield f"It was trained on one source, {largest.source}: its cameras, its places, its patients."
        elif largest.num_kept > MOST * total:
            share = format_percent(largest.num_kept / total)
            yield f"{share} of the training images are of one source, {largest.source}."
    if not facts.excluded_tasks:
        yield "No task's test patients were kept out of pretraining: results on its sources flatter it."
    if facts.audit is None:
        yield "No audit was held against its training data: copies of test images under other names may be among them."
    used = [spread for spread in found.spreads if spread.used]
    for one in used:
        known = {spread.attribute: spread for spread in one.spreads}
        if not known["phototype"].is_known:
            yield f"{one.source}: skin type is not known of any image; how it does on dark skin cannot be told from it."
        else:
            dark = next((count for count in known["phototype"].counts if count.level == DARK), None)
            if dark is None or dark.num_images is None:
                yield f"{one.source}: few or no images of skin types {DARK}: how it does on dark skin is hardly known."
        if one.group_kind != "patient":
            of = KINDS.get(one.group_kind, "groups")
            yield f"{one.source}: its patients are not known; who counts, counts {of}."
    if used and {one.source for one in used} == {source.source for source in facts.sources}:
        seen = {count.level for one in used for spread in one.spreads if spread.attribute == "modality"
                for count in spread.counts} - {UNKNOWN}  # fmt: skip
        absent = [name.replace("_", " ") for name in MODALITIES if name not in seen]
        if absent:
            yield f"It has seen no images of these kinds: {', '.join(absent)}."


def _limit_results(found: CardFacts) -> Iterator[str]:
    tasks = list_tasks(found)
    if not tasks:
        yield "Not measured for this card: nothing is known of how well it does."
        return
    if all(task.synthetic for task, _ in tasks):
        yield "All its results are on drawn images."
    few = [task.title for task, _ in tasks if task.few_groups]
    if few:
        names = "; ".join(few)
        yield f"Few patients or lesions carry {len(few)} of {len(tasks)} tasks ({names}): intervals may be too narrow."
    if unknown := [task.title for task, _ in tasks if task.group_kind == "sample"]:
        yield f"Patients are unknown in {'; '.join(unknown)}: images of one patient count as several."
    if pipeline := [task.title for task, _ in tasks if not task.claim and not task.synthetic]:
        yield f"Supports no claim about encoders: {'; '.join(pipeline)}."
    if cells := [task.title for task, cell in tasks if cell.contamination == "unknown"]:
        yield f"It may have seen test patients of: {'; '.join(cells)}."
    if not any(one.baseline for one in found.standings):
        yield "It was not measured beside random weights: how much of a result its training gave is not known."
    else:
        measured = [one for one in found.standings if one.baseline and one.baseline is not one.row]
        not_sure = sum(
            cell.num_runs > 0 and not (cell.difference and cell.difference.is_sure)
            for one in measured for cell in one.row.cells
        )  # fmt: skip
        number = sum(cell.num_runs > 0 for one in measured for cell in one.row.cells)
        if not_sure:
            yield f"In {not_sure} of {number} results its difference to random weights cannot be told from none."
    if not any(one.section.protocol == "leave_institution_out" for one in found.standings):
        yield "Not measured on institutions that its classifiers had not seen (protocol leave_institution_out)."
