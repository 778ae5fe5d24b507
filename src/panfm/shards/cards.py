"""Source cards: the first document of the way. One YAML file says what a source is and how its table is read.

    data_shards/NAME.yaml, or the user's own file  ->  SourceCard (frozen, strict)  ->  sources.read_records

A card holds the origin, licence and permitted uses of a source, which columns of its table mean which field of a
Sample, which values mean what, and the counts to expect. A new archive needs a card, never a line of code.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from panfm.config import read_yaml, validate
from panfm.files import find_resource, list_resources
from panfm.shards.schema import Modality
from panfm.shards.wsi import SlideSettings

Use = Literal["research", "education", "commercial"]

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


# Cell text -> our value; null means "unknown". A map is closed: a cell that it does not list is an error.
ValueMap = Annotated[dict[str, str | None], BeforeValidator(_text_keys)]


class LabelColumn(BaseModel):
    """Where a label comes from: its column, and what the column's values are called with us."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: str
    values: ValueMap | None = None


class ExpectedCounts(BaseModel):
    """What the source's own publication counts; a build reports every difference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    images: int | None = None
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

    table: str  # CSV file, relative to the root of the source
    modality: Modality | None = None  # null: columns.modality says it row by row
    only: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # column -> cell texts; other rows are not read
    columns: dict[ColumnField, str]
    values: dict[ColumnField, ValueMap] = Field(default_factory=dict)
    missing: tuple[str, ...] = ()  # cell texts that mean "unknown", besides the empty cell
    labels: dict[str, LabelColumn] = Field(default_factory=dict)
    tabular: tuple[str, ...] = ()  # further columns, kept under their own names
    constants: dict[ConstantField, str | float] = Field(default_factory=dict)
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
        if "path" not in self.columns:
            raise ValueError("columns.path is missing; it names the column with the image files")
        if (self.modality is None) == ("modality" not in self.columns):
            raise ValueError("give either modality (one for all images) or columns.modality (a column), not both")
        if doubled := set(self.constants) & set(self.columns):
            raise ValueError(f"{', '.join(sorted(doubled))} is given both in constants and in columns; keep one")
        if unused := set(self.values) - set(self.columns):
            raise ValueError(f"values.{min(unused)} maps a field that columns does not name; add it or leave it out")
        if self.slides is not None and self.modality != "histopathology":
            raise ValueError("a card with slides must have modality: histopathology")
        return self

    @property
    def namespace(self) -> str:
        """What keeps the hashed ids of this source apart from those of others."""
        return self.id_namespace or self.name


def load_card(name: str | Path) -> SourceCard:
    """Read a source card by path, or by the name of a shipped one ("ham10000").

    Raises UserError naming the file, the key, its value and the rule.
    """
    path = find_resource("data_shards", name)
    return validate(SourceCard, read_yaml(path), where=str(path))


def list_cards() -> dict[str, Path]:
    """List the shipped source cards by name."""
    return list_resources("data_shards")
