"""What is known of images besides their pixels, as numbers that a linear probe can take.

    ShardSet, rows           ->  read_metadata       ->  Metadata: one column a fact, unknown where unknown
    Metadata, training rows  ->  encode_metadata     ->  [N, E]; what is unknown tells nothing
    Metadata                 ->  encode_missingness  ->  [N, F]; what is unknown, and nothing else

Read are age, sex, anatomic site and the columns that the source card declares as tabular. Never the institution and
never the device: both give a diagnosis away through where the patient was sent.
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from panfm.shards.index import ShardSet

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

PHOTOTYPE = "phototype"


@dataclass(frozen=True)
class Metadata:
    """Columns of N images by name: numbers [N], NaN where unknown; categories [N], None where unknown."""

    numbers: dict[str, Floats]
    categories: dict[str, list[str | None]]
    num_rows: int

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns."""
        return (*self.numbers, *self.categories)


def read_metadata(shard_set: ShardSet, rows: Ints, *, with_phototype: bool = False) -> Metadata:
    """Read the columns of `rows`; one that is unknown everywhere is left out.

    A tabular column is a number where all its values are; otherwise (words, yes and no) a category. with_phototype: the
    middle of the recorded range, as a number: for an ablation only, since skin type should not decide a diagnosis.
    """
    names = ["age", "sex", "anatomic_site", "tabular", "phototype_low", "phototype_high"]
    table = shard_set.table.select(names).take(pa.array(rows)).to_pydict()
    columns: dict[str, list[float | str | bool | None]] = {name: table[name] for name in names[:3]}
    tabular = [json.loads(text) if text else {} for text in table["tabular"]]
    for name in sorted({name for values in tabular for name in values}):
        columns[name] = [values.get(name) for values in tabular]
    if with_phototype:
        ends = zip(table["phototype_low"], table["phototype_high"], strict=True)
        columns[PHOTOTYPE] = [None if low is None or high is None else (low + high) / 2 for low, high in ends]
    numbers: dict[str, Floats] = {}
    categories: dict[str, list[str | None]] = {}
    for name, values in columns.items():
        known = [value for value in values if value is not None]
        if not known:
            continue
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
            numbers[name] = np.array([np.nan if value is None else float(value) for value in values])
        else:
            categories[name] = [None if value is None else str(value) for value in values]
    return Metadata(numbers, categories, num_rows=len(rows))


def encode_metadata(metadata: Metadata, train: Ints) -> Floats:
    """Encode all N images by what the training rows show -> [N, E].

    Numbers: standardised, unknown = 0. Categories: one column for each that training has, centred on its share of the
    known training rows, unknown (or unseen in training) = 0 in all. So an unknown value adds exactly what the training
    mean would, and no model that is linear in it can tell by it that it was unknown.
    """
    parts: list[Floats] = []
    for values in metadata.numbers.values():
        known = values[train][~np.isnan(values[train])]
        if len(np.unique(known)) > 1:
            parts.append(np.nan_to_num((values - known.mean()) / known.std())[:, None])
    for names in metadata.categories.values():
        array = np.array([name if name is not None else "" for name in names])
        is_known = np.array([name is not None for name in names])
        trained = array[train][is_known[train]]
        seen = np.unique(trained)
        if len(seen) < 2:
            continue
        shares = (trained[:, None] == seen).mean(axis=0)
        inside = is_known & np.isin(array, seen)
        parts.append(((array[:, None] == seen) - shares) * inside[:, None])
    return np.concatenate(parts, axis=1) if parts else np.zeros((metadata.num_rows, 0))


def encode_missingness(metadata: Metadata) -> Floats:
    """Encode which facts are known of each image -> [N, F], 1 = known; a column that is always known is left out."""
    flags = [~np.isnan(values) for values in metadata.numbers.values()]
    flags += [np.array([name is not None for name in names]) for names in metadata.categories.values()]
    varying = [flag for flag in flags if not flag.all()]
    return np.stack(varying, axis=1).astype(np.float64) if varying else np.zeros((metadata.num_rows, 0))
