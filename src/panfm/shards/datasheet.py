"""A shard set described for people and for machines.

    ShardSet -> write_datasheet -> datasheet.md: the questions of Gebru et al., what the card and the counts answer
             -> write_croissant -> croissant.json: Croissant 1.1 metadata of the tars, the table and its columns

Both name no path of the archive and no id; numbers of people are counts. What nobody has answered yet is marked OPEN:
a datasheet is finished by a person. Gebru et al., "Datasheets for datasets", CACM 64 (12), 2021. Akhtar et al.,
"Croissant: a metadata format for ML-ready datasets", DEEM 2024.
"""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from panfm.errors import UserError
from panfm.files import write_json, write_text
from panfm.shards.cards import is_answered
from panfm.shards.index import SAMPLES_FILE, ShardSet
from panfm.shards.inspect import UNKNOWN, Summary, summarise
from panfm.shards.review import read_review_state
from panfm.shards.schema import SAMPLES_SCHEMA

OPEN = "**OPEN**: to be answered by the people who made the data set."


# ------------------------------------------------------------------------------------------------ datasheet


def write_datasheet(shard_set: ShardSet, path: str | Path) -> Path:
    """Write the datasheet as Markdown to `path` and return it; equal shard sets give equal bytes."""
    path = Path(path)
    if path.suffix != ".md":
        raise UserError(f"{path}: a datasheet is Markdown; give it a name that ends in .md")
    card, summary = shard_set.card, summarise(shard_set)
    lines = [f"# Datasheet: {card.title}", ""]
    if card.synthetic:
        lines += ["The images are drawn by a program: no patients, and nothing follows for real skin.", ""]
    for heading, questions in _answer(shard_set, summary):
        lines += [f"## {heading}", ""]
        for question, answer in questions:
            lines += [f"**{question}** {_say(answer)}", ""]
        if heading == "Composition":
            lines += _list_counts(summary)
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return path


def _answer(shard_set: ShardSet, summary: Summary) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """The questions by section, each with its answer or None."""
    card, cohort, index = shard_set.card, shard_set.card.cohort, shard_set.index
    options = index["options"]
    short_side = options.get("short_side")
    kinds = {"patient": "patients", "lesion": "lesions", "slide": "slides", "sample": "single images"}
    groups = ", ".join(f"{count:,} images by {kinds[kind]}" for kind, count in summary.counts["group_kind"].items())
    rejected = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in summary.rejected.items())
    uses = ", ".join(card.permitted_uses)
    others = [use for use in ("education", "commercial") if use not in card.permitted_uses]
    hashed = (
        "keyed hashes under a secret key" if card.identifiers == "private" else "hashes under a published key"
    ) + "; pseudonymised, not anonymous"
    return [
        (
            "Motivation",
            [
                ("For what purpose was the data set made?", None),
                ("Who made it?", card.origin),
                ("What is it called elsewhere, and how is it cited?", card.citation),
            ],
        ),
        (
            "Composition",
            [
                (
                    "What does it hold?",
                    f"{summary.num_samples:,} images of {summary.num_groups:,} groups that no split may cut through "
                    f"({groups}); {summary.num_with_mask:,} with lesion masks. Short side {summary.short_sides[0]} to "
                    f"{summary.short_sides[2]} pixels, median {summary.short_sides[1]}.",
                ),
                ("Is anything missing?", _list_missing(summary)),
                (
                    "Are there errors, noise or redundancies?",
                    f"{summary.num_near_copies:,} images share their perceptual hash with an earlier one. Left out at "
                    f"the build or later: {rejected or 'none'}.",
                ),
                ("What must a reader mind?", card.note),
                ("Can people be recognised?", f"Ids are {hashed}. {read_review_state(shard_set)}."),
                ("Is the data set a sample of a larger set?", cohort.inclusion if cohort else None),
            ],
        ),
        (
            "Collection",
            [
                ("How, where and when were the images taken?", _describe_cohort(shard_set)),
                ("On which legal basis?", card.legal_basis),
                ("What did the people consent to?", card.consent_scope),
                ("Was it approved by an ethics committee?", None),
            ],
        ),
        (
            "Preprocessing and labelling",
            [
                (
                    "What was done to the images?",
                    "Embedded metadata was stripped, orientation applied, colours converted to sRGB"
                    + (f", the short side shrunk to at most {short_side} pixels." if short_side else ", size kept."),
                ),
                ("What proved the diagnoses?", _list(summary.counts["confirmed_by"])),
                (
                    "Were labels corrected?",
                    f"Yes, up to version {index['label_version']} of the corrections; the originals are kept."
                    if index.get("label_version")
                    else "No corrections were applied.",
                ),
                ("Is the raw data kept?", "By its owner; the shards hold no copy of it."),
            ],
        ),
        (
            "Uses",
            [
                ("What may it be used for?", f"{uses} ({card.licence})." if is_answered(card.licence) else f"{uses}."),
                (
                    "What must it not be used for?",
                    (f"Not permitted: {', '.join(others)}. " if others else "")
                    + "It is no basis for decisions about a patient.",
                ),
                ("Has it been used already?", None),
            ],
        ),
        (
            "Distribution",
            [
                ("Who can get it, and how?", f"Access: {card.access}. {_say(card.how_to_obtain)}"),
                ("Under which licence?", card.licence),
            ],
        ),
        (
            "Maintenance",
            [
                ("Who keeps it, and how long?", card.retention),
                (
                    "Who keeps the key of the ids?",
                    card.key_custodian if card.identifiers == "private" else "Nobody: it is published.",
                ),
                (
                    "How does somebody leave it?",
                    "`panfm shards forget` removes a patient from shards and caches and lists what was trained on it.",
                ),
                (
                    "Which version is this?",
                    f"Data hash {shard_set.compute_data_hash()}, panfm {index['code_version']}.",
                ),
            ],
        ),
    ]


def _say(answer: str | None) -> str:
    return str(answer) if is_answered(answer) else OPEN


def _describe_cohort(shard_set: ShardSet) -> str | None:
    cohort = shard_set.card.cohort
    if cohort is None:
        return None
    parts = [f"{cohort.design} design" if cohort.design != "unknown" else "design unknown", cohort.kind]
    return ", ".join([*parts, *(part for part in (cohort.period, cohort.places) if part)]) + "."


def _list_missing(summary: Summary) -> str:
    missing = {name: count for name, count in summary.missing.items() if count}
    if not missing:
        return "None of the fields that matter is missing anywhere."
    return "; ".join(f"{name}: {count / summary.num_samples:.0%}" for name, count in missing.items()) + " of the images"


def _list(counts: dict[str, int]) -> str | None:
    known = {value: count for value, count in counts.items() if value != UNKNOWN}
    return ", ".join(f"{value.replace('_', ' ')} {count:,}" for value, count in known.items()) or None


def _list_counts(summary: Summary) -> list[str]:
    lines = ["| Field | Images |", "| --- | --- |"]
    fields = {f"label {name}": values for name, values in summary.labels.items()} | summary.counts
    fields |= {"phototype": summary.phototypes, "age": summary.age_decades}
    for name, values in fields.items():
        if set(values) - {UNKNOWN}:
            text = ", ".join(f"{value} {count:,}" for value, count in values.items() if count)
            lines.append(f"| {name} | {text.replace('|', '/')} |")
    return [*lines, ""]


# ------------------------------------------------------------------------------------------------ Croissant

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
LICENCES = {  # as cards write them, by a pattern, to the address that machines compare
    r"CC0\b.*": "https://creativecommons.org/publicdomain/zero/1.0/",
    r"CC BY 4\.0": "https://creativecommons.org/licenses/by/4.0/",
    r"CC BY-NC 4\.0": "https://creativecommons.org/licenses/by-nc/4.0/",
    r"CC BY-SA 4\.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    r"CC BY-NC-SA 4\.0": "https://creativecommons.org/licenses/by-nc-sa/4.0/",
}


def write_croissant(shard_set: ShardSet, path: str | Path) -> Path:
    """Write Croissant metadata as JSON-LD to `path` and return it.

    File names are relative to the shard set; no date of publication is invented, so a validator warns of its absence.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise UserError(f"{path}: Croissant metadata is JSON; give it a name that ends in .json")
    write_json(path, make_croissant(shard_set))
    return path


def make_croissant(shard_set: ShardSet) -> dict[str, Any]:
    """The Croissant metadata of a shard set as plain JSON values."""
    card, index = shard_set.card, shard_set.index
    files: list[dict[str, Any]] = [
        {
            "@type": "cr:FileObject",
            "@id": shard["name"],
            "name": shard["name"],
            "description": f"{shard['num_samples']} images with metadata, in the WebDataset layout",
            "contentSize": f"{shard['num_bytes']} B",
            "contentUrl": shard["name"],
            "encodingFormat": "application/x-tar",
            "sha256": shard["sha256"],
        }
        for shard in index["shards"]
    ]
    files.append(
        {
            "@type": "cr:FileObject",
            "@id": SAMPLES_FILE,
            "name": SAMPLES_FILE,
            "description": "one row an image: its metadata, and where its bytes lie; its column labels is a map (name "
            "to value), which Croissant has no type for",
            "contentSize": f"{shard_set.samples_path.stat().st_size} B",
            "contentUrl": SAMPLES_FILE,
            "encodingFormat": "application/x-parquet",
            "sha256": index["samples_sha256"],
        }
    )
    fields = [_describe_column(column) for column in SAMPLES_SCHEMA if not pa.types.is_map(column.type)]
    private = card.identifiers == "private"
    plain = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": card.name,
        "description": f"{card.title}. {card.note}" if card.note else card.title,
        "license": _find_licence(card.licence),
        "citeAs": card.citation,
        "creator": {"@type": "sc:Organization", "name": card.origin},
        "version": f"1.0.0+{shard_set.compute_data_hash()[:16]}",
        "isAccessibleForFree": card.access == "open",
        "keywords": ["dermatology", *sorted(index["num_modalities"])],
        "distribution": files,
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "samples",
                "name": "samples",
                "key": {"@id": "samples/key"},
                "field": fields,
            }
        ],
        "rai:dataCollection": _describe_cohort(shard_set),
        "rai:dataCollectionTimeframe": card.cohort.period if card.cohort else None,
        "rai:personalSensitiveInformation": (
            "Health data. Ids are keyed hashes" + (" under a secret key" if private else " under a published key")
        )
        + "; pseudonymised, not anonymous.",
        "rai:dataUseCases": f"Permitted: {', '.join(card.permitted_uses)}.",
        "rai:dataReleaseMaintenancePlan": card.retention,
    }
    if card.synthetic:
        plain["rai:personalSensitiveInformation"] = "None: drawn by a program."
    return {name: value for name, value in plain.items() if value is not None}


def _describe_column(column: pa.Field) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "@type": "cr:Field",
        "@id": f"samples/{column.name}",
        "name": column.name,
        "dataType": _get_data_type(column.type),
        "source": {"fileObject": {"@id": SAMPLES_FILE}, "extract": {"column": column.name}},
    }
    if pa.types.is_list(column.type):
        plain |= {"isArray": True, "arrayShape": "-1"}
    return plain


def _get_data_type(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "sc:Boolean"
    if pa.types.is_integer(kind):
        return "sc:Integer"
    return "sc:Float" if pa.types.is_floating(kind) else "sc:Text"


def _find_licence(licence: str) -> str:
    return next((address for pattern, address in LICENCES.items() if re.fullmatch(pattern, licence)), licence)
