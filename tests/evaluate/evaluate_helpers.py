"""Small data of choices for the tests of protocols and baselines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gubs.data.sources.reading import clicks
from gubs.evaluate.feedback import Feedback, from_tables

Choice = tuple[str, str, int | None, float | None]


def feedback_of(rows: Sequence[Choice], items: Sequence[str] = (), parts: Sequence[str] | None = None) -> Feedback:
    """Rows are (user, item, time, stars)."""
    users, films, times, stars = zip(*rows, strict=True)
    table = pa.table(
        {
            "user_id": list(users),
            "video_id": list(films),
            "timestamp": pa.array(times, pa.int64()),
            "rating": pa.array(stars, pa.float64()),
        }
    )
    log = clicks(table, "user_id", "video_id")
    divided = None if parts is None else pa.table({"interaction_id": log["interaction_id"], "part": list(parts)})
    return from_tables(log, items, divided)


def two_tastes(users: int = 60, items: int = 40, each: int = 14, seed: int = 0) -> list[Choice]:
    """Half of the users choose mostly from the first half of the items, the others from the second, and like those."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(users):
        own = np.arange(items) // (items // 2) == user % 2
        chance = np.where(own, 0.9, 0.1)
        for k, item in enumerate(rng.choice(items, each, replace=False, p=chance / chance.sum())):
            stars = float(rng.integers(3, 6) if own[item] else rng.integers(1, 4))
            rows.append((f"u{user:03}", f"i{item:02}", 100 * k + user, stars))
    return rows


def movielens_folder(folder: Path) -> Path:
    """A folder in the layout of MovieLens 100K: 20 users, 30 films, 14 ratings each."""
    folder.mkdir()
    lines = [f"{u[1:]}\t{i[1:]}\t{int(s or 0)}\t{880_000_000 + (t or 0)}" for u, i, t, s in two_tastes(20, 30)]
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    films = [f"{i}|Film {i} (1990)|01-Jan-1990||url|" + "|".join("0" * 19) for i in range(30)]
    (folder / "u.item").write_text("\n".join(films) + "\n")
    return folder
