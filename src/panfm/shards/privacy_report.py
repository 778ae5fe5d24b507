"""What a data protection officer asks for, from finished shard sets: what is kept, what is open, who stands alone.

    ShardSets -> build_privacy_report -> PrivacyReport (sections of text and tables) -> privacy_page.py

Everything comes from index.json, samples.parquet and review/; what the source card does not say is listed first, as
open. No row, id or key is shown, and a number of patients from 1 to 4 is shown as "<5" (so that the page may be filed
where the shards may not lie). Equal inputs give equal bytes; there is no date in it.
"""

import json
from collections import Counter
from collections.abc import Sequence

from panfm.shards.anonymity import SMALL, Anonymity, compute_anonymity
from panfm.shards.cards import is_answered
from panfm.shards.index import ShardSet
from panfm.shards.privacy_page import OPEN, PrivacyReport, Section, SetReport, Table
from panfm.shards.review import read_review_state
from panfm.shards.text_scan import OLD_AGE

DROPPED = (
    ("names, birth dates, addresses, telephone numbers, record numbers", "columns that the card does not name"),
    ("patient, lesion, slide and image ids as written", "replaced by HMAC-SHA256 of them, cut to 64 bits"),
    ("visit dates", "replaced by days since the patient's first visit"),
    ("file and folder names", "replaced by hashed keys"),
    ("EXIF (with GPS), XMP, IPTC, comments, embedded previews", "stripped; only make and model of the camera stay"),
    ("DICOM patient and study tags, private tags", "never copied; only pixels and the tags that the card names"),
    ("label and macro images of slides", "never read"),
)
# What the fields are, for somebody who has not read the schema; those that only say where bytes lie are left out.
FIELDS = {
    "patient_id": "keyed hash",
    "lesion_id": "keyed hash",
    "slide_id": "keyed hash",
    "visit_day": "days since the patient's first visit",
    "institution": "as in the table",
    "device": "make and model of the camera",
    "anatomic_site": "as in the table or the card's map",
    "age": "years",
    "sex": "female, male, other",
    "phototype_low": "Fitzpatrick 1-6",
    "labels": "diagnoses and other labels",
    "confirmed_by": "what proved the diagnosis",
    "follow_up_days": "days",
    "event": "whether the followed event occurred",
    "official_split": "as published",
    "consent_scope": "the same for the whole set",
    "caption_offset": "caption, free text",
    "mask_offset": "outline of the lesion",
    "source_sha256": "fingerprint of the raw file: whoever holds the file can see that it is in the set",
    "phash": "fingerprint of what the image looks like: whoever holds the image can find it",
}
NAMES = {
    "caption_offset": "caption",
    "mask_offset": "lesion mask",
    "phototype_low": "phototype",
    "source_sha256": "fingerprint of the file",
    "phash": "fingerprint of the picture",
}


def build_privacy_report(shard_sets: Sequence[ShardSet], *, age_band: int = 5) -> PrivacyReport:
    """Gather what is kept, what is open, and how alone patients stand, for each shard set by itself."""
    return PrivacyReport(tuple(_report_set(one, age_band) for one in shard_sets))


def _report_set(shard_set: ShardSet, age_band: int) -> SetReport:
    anonymity = compute_anonymity(shard_set, age_band=age_band)
    return SetReport(
        source=shard_set.source,
        title=shard_set.card.title,
        synthetic=shard_set.card.synthetic,
        open_points=_list_open(shard_set),
        sections=(
            _describe_terms(shard_set),
            _describe_kept(shard_set),
            _describe_images(shard_set),
            _describe_texts(shard_set),
            *_describe_anonymity(anonymity),
        ),
    )


def _list_open(shard_set: ShardSet) -> tuple[str, ...]:
    """What the card leaves unsaid and what nobody has looked at yet."""
    card, points = shard_set.card, []
    if card.synthetic:
        return ()
    if not is_answered(card.legal_basis):
        points.append("Legal basis: not in the card (legal_basis).")
    if not is_answered(card.retention):
        points.append("Retention: not in the card (retention): how long may it be kept, and what ends it?")
    if card.identifiers == "private":
        if not is_answered(card.consent_scope):
            points.append("Consent scope: not in the card (consent_scope).")
        if not is_answered(card.key_custodian):
            points.append("Key custody: not in the card (key_custodian): who keeps the key, and who may use it?")
    named = {"legal_basis", "retention", "consent_scope", "key_custodian"}
    if others := [name for name in card.open_questions if name not in named]:
        points.append(f"The card still says TODO: {', '.join(others)}.")
    state = read_review_state(shard_set)
    if not state.is_known:
        points.append("Screening and review: not known of a set at a URL; make this page where its folder is.")
    elif state.num_screened < state.num_samples:
        points.append(
            f"Screening: {state.num_samples - state.num_screened:,} of {state.num_samples:,} images were not screened "
            "for faces and writing (panfm shards review)."
        )
    if state.num_undecided or state.num_to_remove:
        points.append(
            f"Review: {state.num_undecided:,} flagged images wait for a person's decision, {state.num_to_remove:,} for "
            "their removal."
        )
    if "text_scan" not in shard_set.index:
        points.append("Texts: this set was built before texts were scanned for names; build it again.")
    return tuple(points)


def _describe_terms(shard_set: ShardSet) -> Section:
    card, identifiers = shard_set.card, shard_set.index["identifiers"]
    private = card.identifiers == "private"
    if private:
        ids = f"keyed hashes under a secret key, fingerprint {identifiers['key_fingerprint']}"
        custodian = _say(card.key_custodian)
    else:
        ids = "published ids, hashed with a published key: anybody can recompute the hashes"
        custodian = "nobody: the key is published"
    rows = [
        ("Origin (controller)", _say(card.origin)),
        ("Legal basis", _say(card.legal_basis)),
        ("Consent scope", _say(card.consent_scope) if private else card.consent_scope or "not stated"),
        ("Licence", _say(card.licence)),
        ("Permitted uses", ", ".join(card.permitted_uses)),
        ("Access", card.access),
        ("Retention", _say(card.retention)),
        ("Identifiers", ids),
        ("Key custodian", custodian),
        ("Built for", str(shard_set.index.get("use") or "not recorded")),
    ]
    if card.cohort is not None:
        parts = [card.cohort.kind, card.cohort.design, card.cohort.period, card.cohort.places]
        rows.append(("Cohort", ", ".join(part for part in parts if part)))
    return Section("Who, why, how long", table=Table(("Question", "Answer"), tuple(rows)))


def _describe_kept(shard_set: ShardSet) -> Section:
    table, number = shard_set.table, shard_set.num_samples
    rows = []
    for name, meaning in FIELDS.items():
        filled = (
            sum(bool(pairs) for pairs in table["labels"].to_pylist())
            if name == "labels"
            else number - table[name].null_count
        )
        if filled:
            rows.append((NAMES.get(name, name), meaning, _percent(filled, number)))
    cells = Counter(
        name for text in table["tabular"].drop_null().to_pylist() for name, value in json.loads(text).items()
        if value is not None
    )  # fmt: skip
    rows += [(name, "further column that the card declares", _percent(count, number)) for name, count in cells.items()]
    absent = [NAMES.get(name, name) for name in FIELDS if name != "labels" and table[name].null_count == number]
    named = shard_set.card.identifying_columns
    dropped = [f"{what}: {how}" for what, how in DROPPED]
    if named:
        dropped.append(f"columns marked as identifying: {', '.join(named)} (never stored)")
    return Section(
        "What is kept, and what is not",
        (f"Share of {number:,} images with a value. Without any value: {', '.join(absent) or 'none'}.",),
        Table(("Field", "What it is", "Filled"), tuple(rows)),
        tuple(f"Not kept: {one}." for one in dropped),
    )


def _describe_images(shard_set: ShardSet) -> Section:
    state = read_review_state(shard_set)
    kinds = Counter(shard_set.table["extension"].to_pylist())
    stored = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    return Section(
        "Pixels",
        (
            f"Stored: {stored}. Every file is rebuilt from its pixels or its own compressed picture data alone: no "
            "embedded metadata survives. Faces, wristbands, writing and tattoos in the picture cannot be stripped.",
            f"{_capital(str(state))}.",
            "The screening flags likely faces, eyes and writing; it misses many and does not know tattoos. Only a "
            "person who looked at every image can rule them out.",
        ),
    )


def _describe_texts(shard_set: ShardSet) -> Section:
    counts = shard_set.index.get("text_scan")
    if counts is None:
        return Section("Texts", ("Not scanned: the set was built by a version that did not look for names in texts.",))
    if not counts:
        return Section("Texts", ("Captions, labels and other texts were scanned; nothing was found.",))
    what = (
        "What was found in captions was cut out."
        if shard_set.card.identifiers == "private"
        else "The source is public: e-mail addresses and telephone numbers were cut out, the rest stays as published."
    )
    rows = tuple((name, _few(count)) for name, count in sorted(counts.items()))
    return Section("Texts", (what,), Table(("Where and what", "Times"), rows))


def _describe_anonymity(result: Anonymity) -> tuple[Section, ...]:
    units = " and ".join(f"{_few(count)} {kind}s" for kind, count in result.group_kinds.items())
    spread, number = result.spread, result.spread.num_groups
    paragraphs = [
        f"Counted over {units}. Somebody who knows of a person the age band ({result.age_band} years), sex, "
        "phototype, anatomic sites, institution and whether there were several visits looks for all who fit. "
        "Unknown counts as a value of its own."
    ]
    if set(result.group_kinds) - {"patient"}:
        paragraphs.append(
            "Not every image names its patient: lesions, slides or images stand for patients there, and a patient with "
            "several of them counts several times, so that the true numbers may be worse or better."
        )
    k_rows = (
        ("k = 1: nobody else fits", _few(spread.num_alone), _percent(spread.num_alone, number)),
        ("k = 2 to 4", _few(spread.num_few - spread.num_alone), _percent(spread.num_few - spread.num_alone, number)),
        ("k = 5 or more", _few(spread.num_many), _percent(spread.num_many, number)),
    )
    field_rows = tuple(
        (
            one.field,
            _percent(round(one.share_known * number), number),
            str(one.num_values),
            _few(one.without.num_alone),
            _few(one.without.num_few),
            _few(one.alone.num_alone),
            ", ".join(one.rare[:4]) + (f" and {len(one.rare) - 4} more" if len(one.rare) > 4 else "") or "none",
        )
        for one in result.fields
        if one.num_values
    )
    label_rows = tuple(
        (one.label, _few(one.num_labelled), _few(one.num_revealed), str(one.least) if one.least else "no such profile")
        for one in result.diversities
    )
    sections = [
        Section("k-anonymity of the metadata", tuple(paragraphs), Table(("How many fit", "Number", "Share"), k_rows)),
        Section(
            "Which field singles people out",
            (f"With all fields: {_few(spread.num_alone)} stand alone, {_few(spread.num_few)} have k below {SMALL}.",),
            Table(
                (
                    "Field",
                    "Known",
                    "Values",
                    "Alone without it",
                    f"k < {SMALL} without it",
                    "Alone by it",
                    f"Values of fewer than {SMALL}",
                ),
                field_rows,
            ),
            _recommend(result),
        ),
    ]
    if label_rows:
        sections.append(
            Section(
                "What a profile gives away (l-diversity)",
                ("Where all who share a profile (k of 2 or more) share the label too, the profile tells it (l = 1).",),
                Table(("Label", "Labelled", "Given away by their profile", "Least l"), label_rows),
            )
        )
    return tuple(sections)


def _recommend(result: Anonymity) -> tuple[str, ...]:
    """What would help, in plain words, the most helpful first."""
    spread, points = result.spread, []
    if spread.num_few == 0:
        points.append(f"Every profile fits at least {spread.least}: nothing needs to be coarser on this account.")
    else:
        useful = [one for one in result.fields if one.num_values and one.without.num_few < spread.num_few]
        for one in sorted(useful, key=lambda one: (one.without.num_few, one.field))[:2]:
            points.append(
                f"Leaving out or coarsening {one.field} takes those with k below {SMALL} from {_few(spread.num_few)} "
                f"to {_few(one.without.num_few)} at best."
            )
        if result.wider_bands.num_few < spread.num_few:
            points.append(
                f"Age bands of {2 * result.age_band} years instead of {result.age_band} take them to "
                f"{_few(result.wider_bands.num_few)}."
            )
        points.append(
            "The shards hold the exact age; whoever gets these data should be bound not to look for patients, and "
            "gets only the fields that the purpose needs."
        )
    if result.num_old:
        points.append(
            f"{_few(result.num_old)} are older than {OLD_AGE}: give them one common age class before anything leaves."
        )
    return tuple(points)


def _say(text: str | None) -> str:
    return str(text) if is_answered(text) else OPEN


def _few(count: int) -> str:
    return f"<{SMALL}" if 0 < count < SMALL else f"{count:,}"


def _percent(count: int, total: int) -> str:
    if 0 < count < SMALL:
        return "-"
    share = 100 * count / total
    return "<1 %" if 0 < share < 1 else f"{share:.0f} %" if share < 99 or count == total else ">=99 %"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
