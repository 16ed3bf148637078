"""Regroups rows by user through files: each reader of a log writes what it read in pieces by part, and each part is
then put together from all files.

A file is an Arrow stream with one batch per part, so a part is read from it alone. Ray Data's own shuffle does the same
in memory, and spills; see docs/measurements.md for why files were chosen.
"""

from collections.abc import Iterable, Sequence

import fsspec
import pyarrow as pa
from pyarrow import ipc

from gubs.artifacts import write_atomically

_WRITE = ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READ = ipc.IpcReadOptions(use_threads=False)


def write_pieces(fs: fsspec.AbstractFileSystem, path: str, parts: Iterable[pa.Table]) -> None:
    """Writes the rows of each part, whole or not at all; at least one part, all of one schema."""
    sink, writer = pa.BufferOutputStream(), None
    for part in parts:
        writer = writer or ipc.new_file(sink, part.schema, options=_WRITE)
        batches = part.combine_chunks().to_batches()
        writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], part.schema))
    assert writer is not None
    writer.close()
    write_atomically(fs, path, sink.getvalue().to_pybytes())


def read_pieces(fs: fsspec.AbstractFileSystem, paths: Sequence[str], part: int) -> pa.Table:
    """The rows of one part from all files, in the order of the files; at least one path."""
    batches = []
    for path in paths:
        with fs.open(path, "rb") as f, ipc.open_file(pa.PythonFile(f, mode="r"), options=_READ) as reader:
            batches.append(reader.get_batch(part))
    return pa.Table.from_batches(batches)
