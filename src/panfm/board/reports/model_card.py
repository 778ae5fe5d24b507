"""`panfm report ENCODER`: a model card, from what was recorded and measured and nothing else.

    CardFacts -> build_model_card -> Document -> write_model_card -> model_card.md (front matter first), model_card.html

The Markdown opens with the Hugging Face metadata block, so that it can stand as README.md of a shared encoder. What the
facts imply about what the encoder is not good for is worked out in `list_limits`, from numbers. Mitchell et al., "Model
cards for model reporting", FAT* 2019.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from panfm.board.reports.counts import FEW_NOTE, describe_count
from panfm.board.reports.document import (
    NO_DIAGNOSIS,
    NOT_MEASURED,
    NOT_RECORDED,
    Block,
    Code,
    Document,
    Heading,
    Paragraph,
    Points,
    Section,
    Table,
    render_html,
    render_markdown,
)
from panfm.board.reports.model_card_facts import CardFacts, SourceSpread, flatten_config
from panfm.board.reports.model_card_limits import list_limits
from panfm.board.reports.model_card_results import (
    build_model_index,
    describe_contamination,
    describe_results,
    describe_subgroups,
)
from panfm.board.words import format_count
from panfm.encoder.facts import SourceFacts
from panfm.files import write_text

# The Hugging Face hub's names of licences that weights are often under; any other is "other" with its own name.
HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
                "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0")  # fmt: skip
USES = ("research", "education", "commercial")
OUT_OF_SCOPE = (
    "Diagnosis, triage, screening or any other decision about a patient, alone or within a product.",
    "Telling a person that a lesion is harmless.",
    "Recognising people, or inferring age, sex, skin type or origin of a person.",
    "Images unlike those listed under training data (other organs, other cameras, screenshots, drawings) without a "
    "measurement of one's own.",
    "Other uses than those that the licences of its training data permit.",
)


def build_model_card(found: CardFacts) -> Document:
    """Write the card as a Document."""
    return Document(
        title=found.name,
        lead=_describe_lead(found),
        cautions=_list_cautions(found),
        sections=(
            Section("At a glance", (_tabulate_facts(found),)),
            Section("Intended use", _describe_use(found)),
            Section("Out-of-scope use", (Points(OUT_OF_SCOPE),)),
            Section("Limits", (Points(list_limits(found)),)),
            Section("Results", describe_results(found)),
            Section("Subgroups", describe_subgroups(found)),
            Section("Contamination", describe_contamination(found)),
            Section("Training data", _describe_data(found)),
            Section("Licences of the training data", _describe_licences(found)),
            Section("Training", _describe_training(found)),
            Section("Provenance", (_tabulate_provenance(found),)),
        ),
        footer=(
            "Written by panfm report from the encoder's own files, its Results and the shard sets that were named; "
            "equal inputs give equal bytes."
        ),
        front=build_front_matter(found),
    )


def write_model_card(found: CardFacts, out: Path) -> tuple[Path, Path]:
    """Write model_card.md and model_card.html into the folder `out` and return their paths."""
    document = build_model_card(found)
    texts = {"model_card.md": render_markdown(document), "model_card.html": render_html(document)}
    for name, text in texts.items():
        write_text(out / name, text)
    return out / "model_card.md", out / "model_card.html"


def build_front_matter(found: CardFacts) -> str:
    """The metadata block of the Hugging Face hub: YAML between two lines of dashes."""
    licence = (found.licence or "").lower().replace(" ", "-")
    known = licence in HUB_LICENCES
    values: dict[str, Any] = {"license": licence if known else "other"}
    if not known:
        values["license_name"] = found.licence or NOT_RECORDED
    values |= {
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["panfm", "timm", "dermatology", "research-only", *(["synthetic-data"] if found.all_synthetic else [])],
        "datasets": [source.source for source in found.facts.sources] if found.facts else [],
    }
    if index := build_model_index(found):
        values["model-index"] = index
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def _describe_lead(found: CardFacts) -> str:
    facts, one = found.facts, found.description
    size = f"{one.image_size} px, {format_count(one.num_parameters)} parameters, features of {one.embed_dim} numbers"
    if facts is None:
        return f"An image encoder ({found.address}), described as panfm measures it: {size}."
    return (
        f"An image encoder for skin images ({facts.timm_name}), pretrained with panfm {facts.code_version} on "
        f"{sum(source.num_kept for source in facts.sources):,} images of {len(facts.sources)} sources: {size}."
    )


def _list_cautions(found: CardFacts) -> tuple[str, ...]:
    cautions = [NO_DIAGNOSIS]
    if found.all_synthetic:
        cautions.append("Every image that it was trained on is drawn by a program: it shows that the software works.")
    return tuple(cautions)


def _tabulate_facts(found: CardFacts) -> Table:
    one, transform, facts = found.description, found.transform, found.facts
    rows = (
        ("Address", found.address),
        ("Architecture", facts.timm_name if facts else found.address.partition(":")[2]),
        ("Parameters", f"{one.num_parameters:,}"),
        (
            "FLOPs an image",
            NOT_MEASURED
            if one.flops_per_image is None
            else f"{one.flops_per_image:,.0f} (one forward pass; multiplications and additions counted apart)",
        ),
        ("Input", f"RGB, {transform.image_size} x {transform.image_size} pixels"),
        (
            "Transform",
            f"shorter side to {transform.resize_size} px ({transform.interpolation}), centre crop of "
            f"{transform.image_size} px, values in 0 to 1, mean {_list(transform.mean)}, std {_list(transform.std)}",
        ),
        ("Feature", f"{one.embed_dim} numbers, pooled by {one.pooling}, {found.dtype}"),
        ("Licence of the weights", found.licence or NOT_RECORDED),
        ("Trained for", facts.use if facts else NOT_RECORDED),
    )
    return Table(("Fact", "Value"), rows)


def _describe_use(found: CardFacts) -> tuple[Block, ...]:
    use = (
        "Computing features of skin images for research: training and comparing small classifiers, retrieval, and the "
        "study of data sets, by people who measure what they build on it on patients of their own."
    )
    blocks: list[Block] = [Paragraph(use)]
    if found.address.startswith("panfm:"):
        code = (
            'from panfm.encoder import load_encoder\n\nencoder = load_encoder("panfm:DIR")\n'
            'features = encoder.embed(["image.jpg"])  # float32 [1, '
            f"{found.description.embed_dim}]"
        )
    else:
        code = (
            f'from panfm.encoder import load_encoder\n\nencoder = load_encoder("{found.address}")\n'
            'features = encoder.embed(["image.jpg"])'
        )
    return (*blocks, Code(code, "python"))


def _describe_data(found: CardFacts) -> tuple[Block, ...]:
    facts = found.facts
    if facts is None or not facts.sources:
        known = found.description.training_data
        first: Block = Paragraph(f"Known of it: {known}." if known else f"{NOT_RECORDED}: what it was trained on.")
        return (first, *_describe_spreads(found.spreads))
    rows = [
        (
            f"{source.source}{' (synthetic)' if source.synthetic else ''}",
            source.licence,
            f"{source.num_kept:,}",
            f"{source.num_excluded:,}",
            f"{source.num_audited:,}" if facts.audit else NOT_MEASURED,
        )
        for source in facts.sources
    ]
    heads = ("Source", "Licence", "Images trained on", "Kept out: test patients", "Kept out: found by an audit")
    tasks = ", ".join(facts.excluded_tasks)
    kept = (
        f"Tasks whose test patients were kept out: {tasks}."
        if tasks
        else f"{NOT_RECORDED}: tasks whose test patients were kept out; do not report results on these sources."
    )
    return (
        Table(heads, tuple(rows)),
        Paragraph(kept),
        _tabulate_kinds(found),
        *_describe_spreads(found.spreads),
    )


def _tabulate_kinds(found: CardFacts) -> Table:
    """Images by source, licence and kind of source, as shares."""
    sources = found.facts.sources if found.facts else ()
    total = sum(source.num_kept for source in sources)
    rows = []
    for licence in sorted({source.licence for source in sources}):
        kept = sum(source.num_kept for source in sources if source.licence == licence)
        rows.append((licence, f"{kept:,}", f"{100 * kept / total:.0f} %" if total else NOT_MEASURED))
    return Table(("Licence", "Images", "Share"), tuple(rows), caption="By licence")


def _describe_spreads(spreads: Sequence[SourceSpread]) -> tuple[Block, ...]:
    if not spreads:
        return (
            Heading("By modality, phototype and patients"),
            Paragraph(
                f"{NOT_MEASURED}: no shard set was named; `panfm report ENCODER --shards DIR` counts it.".replace(
                    "`", ""
                )
            ),
        )
    blocks: list[Block] = []
    for one in spreads:
        same = (
            "These are the images it was trained on, test patients among them who were kept out."
            if one.used
            else "Not the images that the encoder's facts name: shown for comparison only."
        )
        kind = one.kind or f"{NOT_RECORDED} in the source card"
        blocks += [
            Heading(f"{one.source}: {one.title}"),
            Paragraph(f"{one.num_images:,} images; kind of source: {kind}. {same}"),
        ]
        rows = []
        for spread in one.spreads:
            name = spread.attribute.replace("_", " ")
            if not spread.is_known:
                rows.append((name, f"{NOT_RECORDED} for any image", ""))
                continue
            rows += [(name, count.level, describe_count(count, one.group_kind)) for count in spread.counts]
        blocks.append(Table(("By", "Level", "Images"), tuple(rows)))
    return (*blocks, Paragraph(FEW_NOTE))


def _describe_licences(found: CardFacts) -> tuple[Block, ...]:
    sources: Sequence[SourceFacts] = found.facts.sources if found.facts else ()
    if not sources:
        return (Paragraph(f"{NOT_RECORDED}: the sources of its training data."),)
    rows = tuple((source.source, source.licence, *(_say_use(source, use) for use in USES)) for source in sources)
    allowed = [use for use in USES if all(use in (source.permitted_uses or ()) for source in sources)]
    unsure = any(source.permitted_uses is None for source in sources)
    what = f"All sources permit: {', '.join(allowed) or 'no use in common'}."
    if unsure:
        what = (
            "It is not recorded what some sources permit: only the use that it was trained for is taken as permitted."
        )
    blocks: list[Block] = [Table(("Source", "Licence", *(use.capitalize() for use in USES)), rows), Paragraph(what)]
    if found.ancestors:
        blocks.append(
            Paragraph(f"It began from or learned from {', '.join(found.ancestors)}, whose own terms bind it, too.")
        )
    return tuple(blocks)


def _say_use(source: SourceFacts, use: str) -> str:
    if source.permitted_uses is None:
        return NOT_RECORDED
    return "permitted" if use in source.permitted_uses else "not permitted"


def _describe_training(found: CardFacts) -> tuple[Block, ...]:
    facts = found.facts
    if facts is None:
        return (Paragraph(f"{NOT_RECORDED}: panfm did not train it, and it carries no facts of panfm."),)
    flops = found.description.flops_per_image
    forward = NOT_MEASURED if flops is None else f"{flops * facts.samples_seen:.3g} (a lower bound: see below)"
    rows = (
        ("Steps", f"{facts.step:,}"),
        ("Samples seen", f"{facts.samples_seen:,}"),
        ("Began or learned from", ", ".join(found.ancestors) or "no other trained encoder"),
        ("FLOPs, one forward pass a sample", forward),
        (
            "FLOPs of the training",
            NOT_RECORDED if facts.training_flops is None else f"{facts.training_flops:.3g} (counted)",
        ),
        ("Processor hours", NOT_RECORDED),
        ("Hardware", facts.hardware or NOT_RECORDED),
        (
            "Energy",
            f"{NOT_RECORDED} (it was not measured)" if facts.energy_kwh is None else f"{facts.energy_kwh:.3g} kWh",
        ),
        ("panfm version", facts.code_version),
    )
    note = (
        "One forward pass counts the encoder alone at its evaluation size: backward passes, heads, teachers and "
        "further views come on top, hidden patches go off."
    )
    lines = flatten_config(facts.config)
    config: Block = (
        Table(
            ("Key", "Value"),
            lines,
            caption="Resolved pretraining config (paths shortened, tracking left out)",
            folded=True,
        )
        if lines
        else Paragraph(f"{NOT_RECORDED}: the pretraining config.")
    )
    return Table(("Fact", "Value"), rows), Paragraph(note), config


def _tabulate_provenance(found: CardFacts) -> Table:
    one, facts = found.description, found.facts
    rows = [
        ("Encoder hash", one.hash),
        ("SHA-256 of the weights", (facts.weights_sha256 if facts else None) or NOT_RECORDED),
        ("Audit held against", (facts.audit if facts else None) or NOT_RECORDED),
    ]
    rows += [(f"Data hash of {source.source}", source.data_hash) for source in (facts.sources if facts else ())]
    if found.summary is not None:
        rows.append(("Results read", f"{found.summary.num_results:,} files, of {len(found.summary.encoders)} encoders"))
    return Table(("Fact", "Value"), tuple(rows))


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
