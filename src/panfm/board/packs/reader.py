"""A parquet file from elsewhere, opened in a process of its own before the board's touches it.

    path --Reader--> child process: `read_bounded`, with a limit of memory --> nothing, or a refusal

A damaged or made-up parquet file can end the process that reads it (the C++ below raises what nobody catches), or fill
its memory. It is then the child that ends, and the file is refused like any other. Few imports: the child starts fast.
"""

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from panfm.errors import UserError

MAX_ROWS = 500_000  # the board draws 2,000 resamples of them
MAX_VALUES = 50_000_000  # scores of one file
MAX_TABLE_BYTES = 2 << 30  # as the file itself declares it
MAX_TEXT = 200  # characters of a key, a group, a level
MAX_CHILD_BYTES = 12 << 30  # address space, most of which is never used
MAX_SECONDS = 600.0  # for one file
WAY_OUT = "only predictions as `panfm evaluate run` writes them are read; evaluate and submit again"


def read_bounded(file: Path) -> pa.Table:
    """Read a parquet file of texts, numbers and lists, refusing what is too large before it is spread.

    Texts are read as dictionaries, so that one long text repeated a million times is seen first.

    Raises UserError that names the file.
    """
    try:
        return _read(file)
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: no parquet file ({' '.join(str(error).split())[:120]}); {WAY_OUT}") from None


def _read(file: Path) -> pa.Table:
    with pq.ParquetFile(file) as parquet:
        facts, schema = parquet.metadata, parquet.schema_arrow
        groups = [facts.row_group(number) for number in range(facts.num_row_groups)]
        columns = [group.column(place) for group in groups for place in range(group.num_columns)]
        num_values = max((column.num_values for column in columns), default=0)
        num_bytes = sum(column.total_uncompressed_size for column in columns)
        if facts.num_rows > MAX_ROWS or num_values > MAX_VALUES or num_bytes > MAX_TABLE_BYTES:
            raise UserError(
                f"{file}: {facts.num_rows:,} rows, {num_bytes:,} bytes unpacked; up to {MAX_ROWS:,} rows and "
                f"{MAX_TABLE_BYTES:,} bytes are read, {WAY_OUT}"
            )
        if facts.num_rows == 0:
            raise UserError(f"{file}: no row; {WAY_OUT}")
    texts = [field.name for field in schema if field.type == pa.string()]
    table = pq.read_table(file, read_dictionary=texts)
    for name in texts:
        for chunk in table.column(name).chunks:
            longest = pc.max(pc.utf8_length(chunk.dictionary)).as_py() if len(chunk.dictionary) else 0
            if longest > MAX_TEXT:
                raise UserError(f"{file}: a {name} of {longest:,} characters, up to {MAX_TEXT} are read; {WAY_OUT}")
            if not all(text is None or text.isprintable() for text in chunk.dictionary.to_pylist()):
                raise UserError(f"{file}: a {name} holds control characters; {WAY_OUT}")
    table = table.cast(schema)
    table.validate(full=True)
    return table


class Reader:
    """The child process, started when it is first needed and again after a file ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def try_file(self, file: Path) -> None:
        """Read a file in the child; raises UserError if that refuses it, or ends."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "panfm.board.packs.reader"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None, "both are pipes"
        clock = threading.Timer(MAX_SECONDS, process.kill)
        clock.start()
        try:
            process.stdin.write(json.dumps(str(file)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            clock.cancel()
        if not answer:
            self._end()
            raise UserError(f"{file}: damaged such that reading it ends the reader; {WAY_OUT}")
        refusal = json.loads(answer)
        if refusal is not None:
            raise UserError(refusal)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


def _serve() -> None:
    """The child: a path a line in, null or a refusal a line out."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_CHILD_BYTES, MAX_CHILD_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        refusal = None
        try:
            read_bounded(Path(json.loads(line)))
        except UserError as error:
            refusal = str(error)
        sys.stdout.write(json.dumps(refusal) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
