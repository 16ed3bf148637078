"""`gubs groups assign`: places the users of a table in the groups of a run, without a language model."""

from collections.abc import Iterator
from pathlib import PurePosixPath

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import Run
from gubs.errors import ArtifactError, InputError
from gubs.records import User, conform
from gubs.ugm.placement import Placement

ASSIGNED = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        ("group_id", pa.string()),
        ("name", pa.string()),
        ("similarity", pa.float64()),
    ]
)
"""One row per user in the table's order; all but `user_id` is null for users who reach no group's threshold."""
_BATCH = 65_536


def assign_table(run: Run, source: str, target: str = "") -> tuple[str, int, int]:
    """Places every user of a Parquet file; reads and writes it piece by piece.

    Args:
        run: has the groups.
        source: columns `user_id` and, as far as they are known, age, gender, occupation, other, tags.
        target: file to write; empty = beside the source, as `<name>.groups.parquet`.

    Returns:
        The file written, the number of users in a group, the number of all.

    Raises:
        ArtifactError: the run has no groups, or they were made from other data than it holds now.
        InputError: the file cannot be read as users.
    """
    ugm = run.artifact("ugm")
    if remade := ugm.remade_inputs():
        raise ArtifactError(f"{ugm.uri} was made from another {', '.join(remade)}: `gubs ugm --force` remakes it")
    placement = Placement.read(ugm)
    groups = ugm.table("groups", ["group_id", "name"])
    names = dict(zip(groups["group_id"].to_pylist(), groups["name"].to_pylist(), strict=True))
    target = target or f"{source.removesuffix(PurePosixPath(source).suffix)}.groups.parquet"
    placed = total = 0
    with fsspec.open(target, "wb") as file, pq.ParquetWriter(file, ASSIGNED, compression="zstd") as writer:
        for users in _users(source):
            rows = []
            for user, membership in zip(users, placement.place(users), strict=True):
                group, similarity = membership or (None, None)
                name = names[group] if group else None
                rows.append({"user_id": user.user_id, "group_id": group, "name": name, "similarity": similarity})
            writer.write_table(pa.Table.from_pylist(rows, schema=ASSIGNED))
            placed, total = placed + sum(r["group_id"] is not None for r in rows), total + len(rows)
    return target, placed, total


def _users(source: str) -> Iterator[list[User]]:
    try:
        with fsspec.open(source, "rb") as file:
            for batch in pq.ParquetFile(file, pre_buffer=False).iter_batches(_BATCH, use_threads=False):
                yield list(User.from_table(conform(pa.Table.from_batches([batch]), "users")))
    except FileNotFoundError:
        raise InputError(f"{source} does not exist") from None
    except KeyError as e:
        raise InputError(f"{source}: {e.args[0]}") from None
    except pa.ArrowException as e:
        raise InputError(f"{source} cannot be read as a table of users in Parquet: {str(e).splitlines()[0]}") from None
