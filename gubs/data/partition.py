"""Which part of a table a user belongs to, the order of users, and the seeded draw: all by hashes of the user's id.

A part is a range of hashes, and users stand in the order of their hashes. So tables cut into any number of parts, read
one after the other, are the same table; and whether a user is drawn depends on the seed and the user's id, not on the
order or the place of any row. Plain functions over Arrow columns: no Ray, no files.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_KEY = "gubs user order "
"""16 characters: the key of the hash that orders users. Another one would move every user to another part."""


def hashes(ids: pa.Array, key: str = _KEY) -> Hashes:
    """A 64-bit hash of each id (SipHash of its UTF-8), the same on every machine.

    Args:
        ids: texts, no nulls.
        key: 16 characters; each gives other hashes.
    """
    return pd.util.hash_array(ids.to_numpy(zero_copy_only=False), hash_key=key, categorize=False)


def draw_hashes(ids: pa.Array, seed: int, purpose: int) -> Hashes:
    """The lots of a draw: the ids with the smallest are drawn.

    Args:
        ids: user ids, no nulls.
        seed: of the run.
        purpose: what is drawn, so that two draws are independent.
    """
    return hashes(ids, f"{seed % 10**12:012d}{purpose % 10_000:04d}")


def parts_of(ids: Hashes, parts: int) -> Ints:
    """The part of each hash, from 0: a range of hashes."""
    return ((ids >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True)
class Users:
    """The users of a block in their order, and which of them each row belongs to."""

    ids: pa.Array
    """Distinct ids, by hash."""
    hashes: Hashes
    """Of each id."""
    codes: Ints
    """For each row, the place of its user in `ids`."""

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Users":
        """The users of a column of ids without nulls."""
        encoded = column.combine_chunks().dictionary_encode()
        ids, id_hashes = encoded.dictionary, hashes(encoded.dictionary)
        order = _order(ids, id_hashes)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        codes = place[encoded.indices.to_numpy(zero_copy_only=False)]
        return cls(ids.take(pa.array(order)), id_hashes[order], codes)

    @cached_property
    def in_order(self) -> Ints:
        """Positions of the rows by user; a user's rows keep their order."""
        return np.argsort(self.codes, kind="stable")

    def starts(self, parts: int) -> Ints:
        """(parts + 1,) where each part begins among the rows in order, and where the last one ends."""
        of_users = np.searchsorted(parts_of(self.hashes, parts), np.arange(parts + 1))
        rows = np.concatenate([[0], np.cumsum(np.bincount(self.codes, minlength=len(self.ids)))])
        return rows[of_users].astype(np.int64)


def _order(ids: pa.Array, id_hashes: Hashes) -> Ints:
    order = np.argsort(id_hashes)
    if (id_hashes[order][1:] == id_hashes[order][:-1]).any():  # two ids with one hash: the ids decide
        return np.array(sorted(order.tolist(), key=lambda i: (id_hashes[i], ids[i].as_py())), np.int64)
    return order


def cut(table: pa.Table, parts: int) -> Iterator[pa.Table]:
    """The table in parts by the column `user_id`, users in order; a user's rows keep their order."""
    users = Users.of(table["user_id"])
    ordered = table.take(pa.array(users.in_order))
    starts = users.starts(parts)
    for start, end in pairwise(starts.tolist()):
        yield ordered.slice(start, end - start)
