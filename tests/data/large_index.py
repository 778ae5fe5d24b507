"""A shard set whose index has as many rows as a test asks for, all of them images of one small built set."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from panfm.data.selection import COLUMNS
from panfm.files import compute_file_sha256, read_json, write_json
from panfm.shards.index import PLACE_COLUMNS

IMAGES_PER_LESION = 3


def enlarge(shard_set: Path, out: Path, num_rows: int) -> Path:
    """Copy a built set and repeat its rows, under other names and in other lesions, to `num_rows`.

    Columns that the loader does not read are left out: they would be read as null.
    """
    shutil.copytree(shard_set, out)
    table = pq.read_table(out / "samples.parquet", columns=[*COLUMNS, *PLACE_COLUMNS])
    numbers = np.arange(num_rows)
    table = table.take(pa.array(numbers % table.num_rows))
    numbers, lesions = (pc.cast(pa.array(values), pa.string()) for values in (numbers, numbers // IMAGES_PER_LESION))
    for name, text in (
        ("key", pc.utf8_lpad(numbers, 17, "k")),
        ("sha256", pc.utf8_lpad(numbers, 64, "0")),
        ("lesion_id", pc.utf8_lpad(lesions, 17, "l")),
        ("patient_id", pc.utf8_lpad(lesions, 17, "p")),
        ("group_id", pc.utf8_lpad(lesions, 17, "p")),
    ):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), text)
    pq.write_table(table, out / "samples.parquet", compression="zstd", row_group_size=100_000)
    changes = {"num_samples": num_rows, "samples_sha256": compute_file_sha256(out / "samples.parquet")}
    write_json(out / "index.json", read_json(out / "index.json") | changes)
    return out
