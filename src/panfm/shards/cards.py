"""Source cards: the first document of the way. One YAML file says what a source is and how its table is read.

    data_shards/NAME.yaml, or the user's own file  ->  SourceCard (frozen, strict)  ->  sources.read_records

A card holds the origin, cohort, licence and permitted uses of a source; where its rows come from (a table, further
tables joined to it, or the files themselves); which columns mean which field of a Sample, which values mean what; and
the counts to expect. A new archive needs a card, never a line of code.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from panfm.config import read_yaml, validate
from panfm.files import find_resource, list_resources
from panfm.shards.schema import Modality
from panfm.shards.spreadsheets import Dialect
from panfm.shards.wsi import SlideSettings

Use = Literal["research", "education", "commercial"]
MEMBER_MARK = "::"  # FILE::MEMBER names a member of a .zip or .hdf5 file
TEMPLATE = re.compile(r"\{([^{}]+)\}")  # {column} of a path

# What a column of the table can be. `key` names the image (else `path` does), `visit_date` becomes `visit_day`,
# `phototype` sets both ends of the range; the others are fields of Sample.
ColumnField = Literal[
    "path",
    "key",
    "mask_path",
    "caption",
    "modality",
    "patient_id",
    "lesion_id",
    "slide_id",
    "visit_date",
    "visit_day",
    "institution",
    "device",
    "anatomic_site",
    "confirmed_by",
    "follow_up_days",
    "event",
    "age",
    "sex",
    "phototype",
    "phototype_low",
    "phototype_high",
    "phototype_source",
    "official_split",
    "mpp",
]
ConstantField = Literal[
    "institution", "device", "anatomic_site", "confirmed_by", "sex", "phototype_source", "official_split", "mpp"
]


def _text_keys(values: Any) -> Any:
    """CSV cells are text, so `0: benign` in YAML means "0"; YAML's yes, no, on and off would not survive that."""
    if not isinstance(values, dict):
        return values
    for key in values:
        if isinstance(key, bool):
            raise ValueError(f"the key {key} was read by YAML as a truth value; put the cell's text in quotes")
    return {key if isinstance(key, str) else str(key): value for key, value in values.items()}


def _as_tuple(value: Any) -> Any:
    """One text where a list of texts may stand."""
    return (value,) if isinstance(value, str) else value


# Cell text -> our value; null means "unknown". A map is closed: a cell that it does not list is an error.
ValueMap = Annotated[dict[str, str | None], BeforeValidator(_text_keys)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Cohort(BaseModel):
    """Whose skin it is, and how the images came together: what a reader must know before a claim."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    design: Literal["retrospective", "prospective", "mixed", "unknown"]
    kind: Literal["registry", "clinical", "challenge", "atlas", "web", "trial", "synthetic"]
    period: str | None = None  # when the images were taken
    places: str | None = None
    inclusion: str | None = None  # who is in it, and what proved the diagnosis
    access: str | None = None  # on which terms it is given


class LabelColumn(BaseModel):
    """Where a label comes from, and what its values are called with us.

    Either `column` (with `values`, a closed map) or `one_hot` (column -> value; exactly one of the columns holds 1).
    `codes` names a coding system (icd10, snomed) and the code of each value: they become labels NAME#SYSTEM.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str | None = None
    values: ValueMap | None = None
    others: Literal["error", "keep", "unknown"] = "error"  # what a cell is that `values` does not list
    one_hot: ValueMap | None = None
    codes: dict[str, dict[str, str]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if (self.column is None) == (self.one_hot is None):
            raise ValueError("give either column (with values) or one_hot (column -> value), not both")
        if self.one_hot is not None and self.values is not None:
            raise ValueError("values belongs to column; one_hot names its values itself")
        if self.others != "error" and self.values is None:
            raise ValueError("others says what becomes of cells that values does not list; give values too")
        return self

    @property
    def known_values(self) -> frozenset[str] | None:
        """All values that it may take; None: any text."""
        if self.one_hot is None and (self.values is None or self.others == "keep"):
            return None
        return frozenset(value for value in (self.one_hot or self.values or {}).values() if value is not None)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the table that it reads."""
        return (self.column,) if self.column is not None else tuple(self.one_hot or ())


class ImageEntry(BaseModel):
    """One image of a row: templates of its file, `{column}` standing for a cell; the first file that exists is it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Texts
    modality: Modality | None = None  # null: the card's, or columns.modality
    mask: Texts = ()  # an image without any of these files has no mask


class Join(BaseModel):
    """A further table (or listing), matched row by row: `match` maps columns so far to columns of this table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table: str | None = None
    listing: Texts = ()
    dialect: Dialect = Dialect()
    match: dict[str, str]  # (`on` would be a truth value to YAML)
    required: bool = True  # false: a row without a partner has unknown cells
    mark: dict[str, str] = Field(default_factory=dict)  # further cells of the rows that have a partner: {split: train}
    prefix: str = ""  # put before this table's column names; without it an earlier column of the same name stays

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if (self.table is None) == (not self.listing):
            raise ValueError("give either table or listing")
        if not self.match:
            raise ValueError("match is empty; it maps a column so far to the column of this table that must equal it")
        return self


class Derived(BaseModel):
    """A column made of others: the first group of `pattern` in `column`, or `template` with cells filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str | None = None
    pattern: str | None = None
    template: str | None = None

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if (self.template is None) == (self.column is None) or (self.column is None) != (self.pattern is None):
            raise ValueError("give either column and pattern, or template")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression ({error})") from None
            if groups != 1:
                raise ValueError(f"pattern {self.pattern!r} has {groups} groups; it needs exactly one, in brackets")
        return self


class ExpectedCounts(BaseModel):
    """What the source's own publication counts; a build reports every difference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int | None = None
    patients: int | None = None
    lesions: int | None = None
    masks: int | None = None
    labels: dict[str, dict[str, int]] = Field(default_factory=dict)  # label name -> value -> number of images


class SourceCard(BaseModel):
    """One source of images: what it is, what may be done with it, and how to read it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    title: str
    origin: str
    citation: str | None = None
    licence: str
    permitted_uses: tuple[Use, ...]
    consent_scope: str | None = None
    legal_basis: str | None = None
    identifiers: Literal["public", "private"]
    id_namespace: str | None = None  # cards with one namespace share their patients; default: the card's name
    synthetic: bool = False
    access: Literal["open", "request", "private"]
    how_to_obtain: str
    note: str | None = None  # what a reader must mind before a claim

    cohort: Cohort | None = None
    retention: str | None = None  # how long it may be kept, and what ends it
    key_custodian: str | None = None  # who keeps the key of private ids

    # Where rows come from: a table relative to the root (CSV, Excel, JSON, Parquet), or the files below the root.
    table: str | None = None
    dialect: Dialect = Dialect()
    listing: Texts = ()  # patterns like "train/{class}/{name}.jpg"; each {part} is a column, `path` and `stem` too
    dicom_tags: tuple[str, ...] = ()  # header tags of listed DICOM files that become columns
    joins: tuple[Join, ...] = ()
    optional_columns: tuple[str, ...] = ()  # columns that some downloads lack: then every cell of them is unknown
    derive: dict[str, Derived] = Field(default_factory=dict)  # new column -> how it is made; in this order
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # column -> cell texts; other rows are not read

    # What the columns mean.
    modality: Modality | None = None  # null: columns.modality or the entries of images say it
    images: dict[str, ImageEntry] = Field(default_factory=dict)  # null: columns.path, or the listed file
    columns: dict[ColumnField, str] = Field(default_factory=dict)
    values: dict[ColumnField, ValueMap] = Field(default_factory=dict)
    missing: tuple[str, ...] = ()  # cell texts that mean "unknown", besides the empty cell
    labels: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+(@[a-z0-9_]+)?$")], LabelColumn] = Field(
        default_factory=dict
    )  # NAME, or NAME@READER where several readers' labels stand side by side
    tabular: tuple[str, ...] = ()  # further columns, kept under their own names
    constants: dict[ConstantField, str | float] = Field(default_factory=dict)
    identifying_columns: tuple[str, ...] = ()  # never stored; their texts are looked for in everything that is
    text_scan_allow: tuple[str, ...] = ()  # fields whose texts name nobody though the scan thinks so: labels.diagnosis
    patient_aliases: str | None = None  # CSV with patient_id, same_as: one patient written several ways
    corrections: str | None = None  # CSV with key, label, old, new, version: corrected labels, in order of version
    lesion_id_scope: Literal["source", "patient"] = "source"  # patient: lesion 1 of A is not lesion 1 of B
    date_format: str = "%Y-%m-%d"  # of columns.visit_date, as strptime reads it
    slides: SlideSettings | None = None  # set: the files are whole-slide images, to be cut into tiles
    expected: ExpectedCounts = Field(default_factory=ExpectedCounts)

    @field_validator("permitted_uses", mode="after")
    @classmethod
    def _check_uses(cls, uses: tuple[Use, ...]) -> tuple[Use, ...]:
        if not uses:
            raise ValueError("a source without a permitted use cannot be built; name research, education or commercial")
        return uses

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if (self.table is None) == (not self.listing):
            raise ValueError("give either table (one row an image) or listing (patterns of the files), not both")
        if self.dicom_tags and not self.listing:
            raise ValueError("dicom_tags reads the headers of listed files; give listing instead of table")
        if self.images and ("path" in self.columns or "mask_path" in self.columns):
            raise ValueError("images names the files; leave columns.path and columns.mask_path out")
        if not self.images and not self.listing and "path" not in self.columns:
            raise ValueError("columns.path is missing; it names the column with the image files (or give images)")
        in_column = "modality" in self.columns
        if self.modality is not None and in_column:
            raise ValueError("give either modality (one for all images) or columns.modality (a column), not both")
        in_entries = bool(self.images) and all(entry.modality is not None for entry in self.images.values())
        if self.modality is None and not in_column and not in_entries:
            raise ValueError("give either modality (one for all images) or columns.modality (a column)")
        if strange := [
            name
            for name in (self.columns.get(field) for field in ("path", "mask_path"))
            if name and set(name) & set("{}")
        ]:
            raise ValueError(f"the column {strange[0]!r} cannot name files: braces stand for columns; rename it")
        if doubled := set(self.constants) & set(self.columns):
            raise ValueError(f"{', '.join(sorted(doubled))} is given both in constants and in columns; keep one")
        if unused := set(self.values) - set(self.columns):
            raise ValueError(f"values.{min(unused)} maps a field that columns does not name; add it or leave it out")
        if self.slides is not None and self.modality != "histopathology":
            raise ValueError("a card with slides must have modality: histopathology")
        return self

    @property
    def open_questions(self) -> tuple[str, ...]:
        """The fields that still say TODO, as `panfm shards draft` leaves them for a person."""
        texts = {name: value for name, value in self.__dict__.items() if isinstance(value, str)}
        if self.cohort is not None:
            texts |= {f"cohort.{name}": value for name, value in self.cohort.__dict__.items() if value is not None}
        return tuple(name for name, value in texts.items() if not is_answered(value))

    @property
    def image_entries(self) -> dict[str, ImageEntry]:
        """The images of a row by name: `images`, or the one that columns.path or the listing names."""
        if self.images:
            return self.images
        path = self.columns.get("path", "path")
        masks = (f"{{{self.columns['mask_path']}}}",) if "mask_path" in self.columns else ()
        return {"image": ImageEntry(path=(f"{{{path}}}",), mask=masks)}

    @property
    def namespace(self) -> str:
        """What keeps the hashed ids of this source apart from those of others."""
        return self.id_namespace or self.name


def is_answered(text: str | None) -> bool:
    """Whether a text of a card says something: it is there, and not the TODO of a draft or a template."""
    return bool(text) and not str(text).startswith("TODO")


def load_card(name: str | Path) -> SourceCard:
    """Read a source card by path, or by the name of a shipped one ("ham10000").

    Raises UserError naming the file, the key, its value and the rule.
    """
    path = find_resource("data_shards", name)
    return validate(SourceCard, read_yaml(path), where=str(path))


def find_placeholders(template: str) -> list[str]:
    """The columns that a template names: "{a}/{b}.jpg" -> ["a", "b"]."""
    return TEMPLATE.findall(template)


def list_cards() -> dict[str, Path]:
    """List the shipped source cards by name."""
    return list_resources("data_shards")
