"""Sample tables without images, for tests of what is drawn."""

import numpy as np

from panfm.data.batch import NO_GROUP
from panfm.data.selection import RECORD, SampleTable, Section
from panfm.shards.schema import MODALITIES


def make_table(*sizes: tuple[str, str, int], lesion_size: int = 0) -> SampleTable:
    """A table of (source, modality, number of samples); lesions of `lesion_size` neighbours, 0: none."""
    names = tuple(dict.fromkeys(name for name, _, _ in sizes))
    records = np.zeros(sum(count for _, _, count in sizes), dtype=RECORD)
    sections, first = [], 0
    for name, kind, count in sorted(sizes):
        part = records[first : first + count]
        part["source"], part["modality"] = names.index(name), MODALITIES.index(kind)
        part["row"] = np.arange(count)
        sections.append(Section(f"{name}/{kind}", kind, first, count))
        first += count
    records["lesion"] = np.arange(records.size) // lesion_size if lesion_size else NO_GROUP
    records["patient"] = records["lesion"]
    return SampleTable(names, ((),) * len(names), tuple(sections), {"records": records})


def find_units(table: SampleTable, samples: np.ndarray) -> np.ndarray:
    """Number of the section of each sample."""
    return np.searchsorted([section.first for section in table.sections], samples, side="right") - 1
