"""Sample v1: what panfm knows about one image, from the archive to the prediction. Runs without torch.

A sample lies in a tar as `<key>.jpg|png|webp`, `<key>.json` (this model), optionally `<key>.mask.png` and `<key>.txt`.
`samples.parquet` holds the same fields, one row a sample, plus where its bytes lie (INDEX_FIELDS).
Unknown stays null: nothing is invented.
"""

from typing import Annotated, Literal, get_args

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

SCHEMA_VERSION: Literal[1] = 1

Modality = Literal["clinical", "dermoscopic", "total_body", "histopathology"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
Confirmation = Literal["histopathology", "follow_up", "consensus", "confocal", "single_expert"]
Colour = Literal["srgb", "converted", "untagged", "unconvertible"]
Phototype = Annotated[int, Field(ge=1, le=6)]
Key = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]+$", max_length=128)]


class Sample(BaseModel):
    """One image with its metadata, as `<key>.json` holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    key: Key  # unique inside a shard set; hashed, never a file name
    source: str
    modality: Modality
    patient_id: str | None = None  # keyed hashes (pseudonymised, not anonymous)
    lesion_id: str | None = None
    slide_id: str | None = None
    group_id: str  # patient, else lesion, else slide, else the sample itself: no split cuts through it
    group_kind: Literal["patient", "lesion", "slide", "sample"]
    visit_day: int | None = None  # days since the patient's first visit
    institution: str | None = None
    device: str | None = None  # camera make and model
    anatomic_site: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)  # label name -> value
    confirmed_by: Confirmation | None = None
    follow_up_days: int | None = None
    event: bool | None = None  # whether the followed event occurred at follow_up_days
    age: float | None = None  # years
    sex: Literal["female", "male", "other"] | None = None
    phototype_low: Phototype | None = None  # Fitzpatrick, a range: some sources give pairs
    phototype_high: Phototype | None = None
    phototype_source: str | None = None  # who said so: clinician, annotator, estimate, ...
    tabular: dict[str, float | str | bool] = Field(default_factory=dict)  # extra columns that the card declares
    official_split: str | None = None
    licence: str
    permitted_uses: tuple[str, ...] = ()
    consent_scope: str | None = None
    synthetic: bool = False
    mpp: float | None = None  # microns per pixel, delivered
    x0: int | None = None  # tile origin in level-0 pixels
    y0: int | None = None
    level: int | None = None
    tissue_fraction: float | None = None
    colour: Colour | None = None  # of a tile: how its ICC profile was treated
    width: int  # stored pixels
    height: int
    original_width: int
    original_height: int
    sha256: str  # of the stored image bytes
    source_sha256: str  # of the file that it came from
    phash: str | None = None  # 256-bit perceptual hash, hexadecimal; null: too little contrast to recognise


_TEXT = pa.string()
_LABELS = pa.map_(pa.string(), pa.string())
SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", _TEXT, nullable=False),
        pa.field("source", _TEXT, nullable=False),
        pa.field("modality", _TEXT, nullable=False),
        pa.field("patient_id", _TEXT),
        pa.field("lesion_id", _TEXT),
        pa.field("slide_id", _TEXT),
        pa.field("group_id", _TEXT, nullable=False),
        pa.field("group_kind", _TEXT, nullable=False),
        pa.field("visit_day", pa.int32()),
        pa.field("institution", _TEXT),
        pa.field("device", _TEXT),
        pa.field("anatomic_site", _TEXT),
        pa.field("labels", _LABELS),
        pa.field("confirmed_by", _TEXT),
        pa.field("follow_up_days", pa.int32()),
        pa.field("event", pa.bool_()),
        pa.field("age", pa.float32()),
        pa.field("sex", _TEXT),
        pa.field("phototype_low", pa.int8()),
        pa.field("phototype_high", pa.int8()),
        pa.field("phototype_source", _TEXT),
        pa.field("tabular", _TEXT),  # JSON: the columns differ from source to source
        pa.field("official_split", _TEXT),
        pa.field("licence", _TEXT, nullable=False),
        pa.field("permitted_uses", pa.list_(pa.string())),
        pa.field("consent_scope", _TEXT),
        pa.field("synthetic", pa.bool_(), nullable=False),
        pa.field("mpp", pa.float32()),
        pa.field("x0", pa.int32()),
        pa.field("y0", pa.int32()),
        pa.field("level", pa.int8()),
        pa.field("tissue_fraction", pa.float32()),
        pa.field("colour", _TEXT),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
        pa.field("sha256", _TEXT, nullable=False),
        pa.field("source_sha256", _TEXT, nullable=False),
        pa.field("phash", _TEXT),
        # Where the bytes lie: shard file name, then offset and length of each member's payload in it.
        pa.field("shard", _TEXT, nullable=False),
        pa.field("extension", _TEXT, nullable=False),  # jpg, png or webp
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("mask_offset", pa.int64()),
        pa.field("mask_length", pa.int64()),
        pa.field("caption_offset", pa.int64()),
        pa.field("caption_length", pa.int64()),
    ],
    metadata={"panfm_schema": str(SCHEMA_VERSION)},
)
