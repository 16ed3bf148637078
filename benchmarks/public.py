"""Reading public data sets that are larger than memory: time, rows per second, peak memory of all processes.

Writes the layout of a data set, drawn at random, and reads it with `gubs ingest`'s stage in a process of its own, whose
memory is measured as in `preprocess.py`.

    python benchmarks/public.py --source netflix --rows 1e7 --work DIR --json out.json
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from preprocess import watched

FILES = 4
"""Files of the Netflix Prize."""
RATINGS_PER_FILM, RATINGS_PER_USER = 5_650, 209
"""Of the whole data set: 17,770 films, 480,189 users, 100.5 M ratings."""
REVIEWS_PER_PLACE, REVIEWS_PER_USER, REVIEW_CHARS = 46, 3.5, 570
"""Of the whole data set: 150,346 places, 1,987,897 users, 7.0 M reviews in 5.3 GB."""


def write_netflix(folder: Path, rows: int) -> None:
    """`combined_data_*.txt` and `movie_titles.csv`."""
    films, users = max(FILES, rows // RATINGS_PER_FILM), max(10, rows // RATINGS_PER_USER)
    rng, film = np.random.default_rng(0), 0
    for number in range(FILES):
        with (folder / f"combined_data_{number + 1}.txt").open("w") as file:
            for _ in range(films // FILES):
                film += 1
                n = rows // (films // FILES * FILES)
                ids, stars, days = rng.integers(users, size=n), rng.integers(1, 6, n), rng.integers(0, 2200, n)
                dates = (np.datetime64("1999-11-11") + days).astype(str)
                file.write(f"{film}:\n")
                file.writelines(f"{u},{s},{d}\n" for u, s, d in zip(ids.tolist(), stars.tolist(), dates, strict=True))
    (folder / "movie_titles.csv").write_text("".join(f"{i + 1},2000,Film {i + 1}\n" for i in range(film)))


def write_yelp(folder: Path, rows: int) -> None:
    """The files of reviews, places and users."""
    users, places = max(10, int(rows / REVIEWS_PER_USER)), max(10, rows // REVIEWS_PER_PLACE)
    rng, text = np.random.default_rng(0), "Good. " * (REVIEW_CHARS // 6)
    days = (np.datetime64("2006-01-01T10:00:00") + rng.integers(0, 5 * 10**8, rows)).astype(str)
    drawn = zip(rng.integers(users, size=rows).tolist(), rng.integers(places, size=rows).tolist(), days, strict=True)
    with (folder / "yelp_academic_dataset_review.json").open("w") as file:
        for i, (user, place, day) in enumerate(drawn):
            row: dict[str, object] = {"review_id": f"{i:022}", "user_id": f"{user:022}", "business_id": f"{place:022}"}
            row |= {"stars": float(1 + i % 5), "useful": 0, "funny": 0, "cool": 0, "text": text}
            file.write(json.dumps(row | {"date": day.replace("T", " ")}) + "\n")
    _write_lines(
        folder / "yelp_academic_dataset_business.json",
        ({"business_id": f"{i:022}", "name": f"Place {i}", "categories": "Food, Bars"} for i in range(places)),
    )
    _write_lines(
        folder / "yelp_academic_dataset_user.json",
        ({"user_id": f"{i:022}", "name": "N", "yelping_since": "2010-01-01 10:00:00"} for i in range(users)),
    )


def _write_lines(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


WRITERS: dict[str, Callable[[Path, int], None]] = {"netflix": write_netflix, "yelp": write_yelp}


def read(kind: str, folder: Path, out: Path) -> int:
    """The stage raw; returns how many interactions it has."""
    from gubs import stages
    from gubs.artifacts import Run
    from gubs.config import load_settings

    run = Run(out.absolute())
    stages.make(["raw"], run, load_settings("paper", [f"source.kind={kind}", f"source.path={folder}"]))
    return run.artifact("raw").manifest.tables["interactions"].rows


def measured(kind: str, folder: Path, out: Path) -> dict[str, Any]:
    """Reads the data set in a process of its own."""
    command = [sys.executable, __file__, "--source", kind, "--read", str(folder), "--work", str(out)]
    printed, figures = watched(command)
    return figures if "failed" in figures else figures | {"kept": int(printed.split()[-1])}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", choices=sorted(WRITERS), required=True)
    parser.add_argument("--rows", type=float, default=1e7)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data set and the run")
    parser.add_argument("--only-write", action="store_true", help="leave the reading to another call")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        print(read(args.source, args.read, args.work))
        return
    rows = int(args.rows)
    folder = args.work / f"{args.source}-{rows}"
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        WRITERS[args.source](folder, rows)
        (folder / "done").touch()
    if args.only_write:
        return
    size = sum(f.stat().st_size for f in folder.iterdir()) / 2**30
    result = {"source": args.source, "rows": rows, "gib": round(size, 2)}
    result |= measured(args.source, folder, args.work / f"run-{args.source}")
    result["rows_per_s"] = round(rows / result["seconds"])
    print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
