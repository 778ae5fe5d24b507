"""Reporting checklists: a YAML file each, items in short words, and where a paper's report answers them.

    checklists/NAME.yaml -> Checklist -> a table of the report

An item that the report cannot answer says so: the authors must. The items are paraphrased; the originals count.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from panfm.config import read_yaml, validate

FOLDER = Path(__file__).parent / "checklists"
NAMES = ("tripod_ai", "claim")
BY_AUTHORS = "to be answered by the authors"


class ChecklistItem(BaseModel):
    """One item; answered: the title of the section that answers it, null = the authors must."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: str
    item: str
    answered: str | None


class Checklist(BaseModel):
    """All items of one guideline."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    citation: str
    items: tuple[ChecklistItem, ...]


def read_checklist(name: str) -> Checklist:
    """Read a shipped checklist: tripod_ai or claim."""
    path = FOLDER / f"{name}.yaml"
    return validate(Checklist, read_yaml(path), where=str(path))
