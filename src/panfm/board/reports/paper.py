"""`panfm report --paper RESULTS`: the parts of a paper that numbers can write.

    PaperFacts -> build_paper -> Document -> write_paper -> report.md, report.html, figures/*.svg + *.csv, tables/*.csv

Table 1, the flow of images, methods with the numbers filled in, results, label efficiency, ranks, the expected width of
an interval for a planned test, and two reporting checklists that say which items are left to the authors. What was not
recorded is marked and counted, never filled in.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from panfm.board.reports.checklists import BY_AUTHORS, NAMES, read_checklist
from panfm.board.reports.counts import FEW_NOTE, Count, describe_count
from panfm.board.reports.document import (
    NO_DIAGNOSIS,
    NOT_MEASURED,
    NOT_RECORDED,
    Block,
    Document,
    Heading,
    Paragraph,
    Points,
    Section,
    Table,
    render_html,
    render_markdown,
    write_files,
)
from panfm.board.reports.paper_facts import PaperFacts, PaperTask
from panfm.board.reports.paper_figures import (
    draw_efficiencies,
    draw_flow,
    draw_forests,
    draw_rankings,
    list_main_sections,
)
from panfm.board.reports.paper_methods import describe_methods
from panfm.board.words import (
    CONTAMINATION,
    describe_cell,
    describe_gap,
    describe_protocol,
    describe_rank,
    describe_score,
    describe_units,
    format_count,
    format_signed,
)
from panfm.files import write_text


def build_paper(found: PaperFacts) -> Document:
    """Write the report as a Document."""
    synthetic = [one for one in found.tasks if one.task.synthetic]
    cautions = [NO_DIAGNOSIS]
    if synthetic:
        cautions.append(
            f"{len(synthetic)} of {len(found.tasks)} tasks are of images drawn by a program: nothing follows from them "
            "for patients."
        )
    summary = found.board.summary
    return Document(
        title="Report for a paper",
        lead=(
            f"{_count(len(summary.encoders), 'encoder')} on {_count(len(found.tasks), 'task')}, from "
            f"{_count(summary.num_results, 'Result file')}. "
            "Numbers and methods are filled in from what was recorded; the rest is for the authors to write."
        ),
        cautions=tuple(cautions),
        sections=(
            Section("Participants", tuple(_describe_participants(found))),
            Section("Data and flow", tuple(_describe_flow(found))),
            Section("Encoders", (_tabulate_encoders(found),)),
            Section("Methods", describe_methods(found)),
            Section("Results", tuple(_describe_results(found))),
            Section("Planned test sizes", tuple(_describe_widths(found))),
            Section("Licences and availability", (_tabulate_licences(found),)),
            Section("Software", (_tabulate_versions(found),)),
            Section("Reporting checklists", tuple(_describe_checklists())),
        ),
        footer=(
            "Written by panfm report --paper from Results, their predictions and the shard sets that were named; equal "
            "inputs give equal bytes."
        ),
    )


def write_paper(found: PaperFacts, out: Path) -> Document:
    """Write report.md, report.html, figures/ and tables/ into the folder `out` and return what they say."""
    document = build_paper(found)
    texts = {"report.md": render_markdown(document), "report.html": render_html(document)}
    write_files(document, out)
    for name, text in texts.items():
        write_text(out / name, text)
    return document


def _describe_participants(found: PaperFacts) -> Iterable[Block]:
    yield Paragraph(
        "Table 1 of each task: images and patients (lesions, slides) in training and test, by what was recorded of "
        f"them. {FEW_NOTE}"
    )
    for one in found.tasks:
        with_training = any(characteristic.train is not None for characteristic in one.characteristics)
        yield Table(
            ("Characteristic", "Level", *(("Training and validation",) if with_training else ()), "Test"),
            tuple((*row[:2], *row[2 if with_training else 3 :]) for row in _list_characteristics(one)),
            caption=f"{one.task.title}: {describe_units(one.task)} in the test set",
            name=f"table1-{one.task.slug}",
        )
        if not with_training:
            yield Paragraph(
                f"{NOT_RECORDED}: its training patients; name the shard set of the measured split (--shards)."
            )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _list_characteristics(one: PaperTask) -> Iterable[tuple[str, ...]]:
    """Attribute, level, training, test."""
    for characteristic in one.characteristics:
        if characteristic.train is None and characteristic.test is None:
            yield characteristic.attribute, "", NOT_RECORDED, NOT_RECORDED
            continue
        for level in characteristic.levels:
            train, test = (
                _say_count(side, level, one.group_kind) for side in (characteristic.train, characteristic.test)
            )
            yield characteristic.attribute, level.replace("_", " "), train, test


def _say_count(side: Sequence[Count] | None, level: str, group_kind: str) -> str:
    if side is None:
        return NOT_RECORDED
    count = next((count for count in side if count.level == level), None)
    return "none" if count is None else describe_count(count, group_kind)


def _describe_flow(found: PaperFacts) -> Iterable[Block]:
    yield Paragraph(
        "From the files of each source to the folds of each task. Rejected files are those of the shard set's build "
        "record, images left out of a task those that its Results note. A box that says so was not recorded."
    )
    for one in found.tasks:
        title = f"{one.task.title}: what was left out on the way to the test set."
        yield draw_flow(f"flow-{one.task.slug}", title, one.flow, one.folds)
        missing = [f"{step.title}: {step.number}" for step in one.flow if step.number.startswith(NOT_RECORDED)]
        if missing:
            yield Points(tuple(f"{NOT_RECORDED}: {text.partition(': ' + NOT_RECORDED)[0]}" for text in missing))


def _tabulate_encoders(found: PaperFacts) -> Table:
    cards = {row.encoder.name: row.encoder for section in found.board.summary.sections for row in section.rows}
    rows = tuple(
        (
            name,
            format_count(card.num_parameters),
            NOT_MEASURED if card.flops_per_image is None else format_count(card.flops_per_image),
            f"{card.image_size} px, {card.pooling}, {card.embed_dim} numbers",
            card.training_data or NOT_RECORDED,
            card.licence or NOT_RECORDED,
            card.hash[:12],
        )
        for name, card in sorted(cards.items())
    )
    heads = ("Encoder", "Parameters", "FLOPs an image", "Input, pooling, feature", "Trained on", "Licence", "Hash")
    return Table(heads, rows, name="encoders")


def _describe_results(found: PaperFacts) -> Iterable[Block]:
    summary = found.board.summary
    for section in list_main_sections(summary):
        kind = "synthetic (drawn) images" if section.synthetic else "real images"
        yield Heading(f"{describe_protocol(section)}, {kind}")
        rows = [
            (
                row.encoder.name,
                describe_rank(section, row),
                describe_score(row),
                *(describe_cell(cell) if cell.num_runs else NOT_MEASURED for cell in row.cells),
            )
            for row in section.rows
        ]
        heads = ("Encoder", "Rank", "Mean score", *(f"{task.title} ({task.metric_title})" for task in section.tasks))
        yield Table(heads, tuple(rows), name=f"results-{section.slug}")
        gaps = [
            (
                row.encoder.name,
                task.title,
                f"{format_signed(gap.difference)} [{format_signed(gap.low)}, {format_signed(gap.high)}]",
                describe_gap(gap),
            )
            for row in section.rows
            for task, cell in zip(section.tasks, row.cells, strict=True)
            if (gap := cell.difference) is not None and gap.difference is not None
        ]
        if gaps:
            caption = f"Differences to {section.reference}, on the same patients"
            heads = ("Encoder", "Task", "Difference", "p-value")
            yield Table(heads, tuple(gaps), caption=caption, name=f"differences-{section.slug}", folded=True)
        notes = dict.fromkeys(
            f"{task.title}: {cell.reason}."
            for row in section.rows
            for task, cell in zip(section.tasks, row.cells, strict=True)
            if cell.reason and cell.num_runs
        )
        if notes:
            yield Points(tuple(f"† {note}" for note in notes))
    yield Heading("Figures")
    yield from (*draw_forests(summary), *draw_efficiencies(summary), *draw_rankings(found.board))
    yield Heading("Contamination")
    places = {
        (row.encoder.name, task.title): cell
        for section in summary.sections
        for row in section.rows
        for task, cell in zip(section.tasks, row.cells, strict=True)
        if cell.num_runs
    }
    lines = tuple((*key, CONTAMINATION[cell.contamination]) for key, cell in sorted(places.items()))
    yield Table(
        ("Encoder", "Task", "As recorded"), lines, name="contamination", folded=True, caption="By encoder and task"
    )
    if not found.audited:
        yield Paragraph(f"{NOT_MEASURED}: no audit of copied images was named.")


def _describe_widths(found: PaperFacts) -> Iterable[Block]:
    yield Paragraph(
        "How wide the 95 % interval of an AUROC would be with other numbers of patients, at the area measured here. "
        "Hanley and McNeil (1982): from the area alone, one image a patient, a little wide for most scores. Scaled: "
        "the variance measured here (DeLong; Obuchowski where patients have several images), each class's part shrunk "
        "with its patients. Both take future patients to be like these, and leave the choice of labelled patients out."
    )
    planned = [one for one in found.tasks if one.widths]
    for one in planned:
        rows = tuple(
            (
                f"{width.num_positive} with, {width.num_negative} without",
                f"{width.hanley:.3f}",
                NOT_MEASURED if width.scaled is None else f"{width.scaled:.3f}",
            )
            for width in one.widths
        )
        yield Table(
            ("Planned patients", "Width, Hanley and McNeil", "Width, scaled from the measured variance"),
            rows,
            caption=f"{one.task.title}: {one.planned_for}, AUROC {one.area:.3f} (one draw of labels)",
            name=f"widths-{one.task.slug}",
        )
    if not planned:
        yield Paragraph(f"{NOT_MEASURED}: no task here has two classes told apart by a probability.")


def _tabulate_licences(found: PaperFacts) -> Table:
    rows = tuple(
        (
            one.task.title,
            one.task.licence or NOT_RECORDED,
            one.task.access or NOT_RECORDED,
            one.card.citation if one.card else NOT_RECORDED,
        )
        for one in found.tasks
    )
    return Table(("Task", "Licence of its images", "Access", "Citation"), rows, name="licences")


def _tabulate_versions(found: PaperFacts) -> Table:
    rows = tuple((name, ", ".join(versions)) for name, versions in found.versions.items())
    return Table(("Software", "Versions in the Results"), rows or (("all software", NOT_RECORDED),), name="versions")


def _describe_checklists() -> Iterable[Block]:
    for name in NAMES:
        checklist = read_checklist(name)
        rows = tuple((one.number, one.item, one.answered or BY_AUTHORS) for one in checklist.items)
        left = sum(one.answered is None for one in checklist.items)
        yield Heading(checklist.name)
        yield Paragraph(f"{checklist.citation} {left} of {len(checklist.items)} items are left to the authors; those "
                        "that name a section are begun there, and may need more words.")  # fmt: skip
        yield Table(("Item", "What it asks for", "Where"), rows, name=f"checklist-{name}")
