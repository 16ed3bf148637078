"""Clustering at scale: time and peak memory for 10 K, 100 K and 1 M users against 50 typical users.

Each size runs in a process of its own, so that peak memory is its own; the users are made first and stand apart.

    python benchmarks/ugm_scale.py --json out.json
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

GROUPS, TOP, TOPICS, OCCUPATIONS, TAGS = 50, 60, 300, 20, 6


def run_size(users: int) -> dict[str, Any]:
    """Makes that many users with six tags each, clusters them, and measures."""
    import numpy as np

    from gubs.records import User
    from gubs.ugm.cluster import TfidfEncoder, cluster

    rng = np.random.default_rng(0)
    names = [f"topic {i}" for i in range(TOPICS)]
    tags, ages = rng.integers(0, TOPICS, (users, TAGS)), rng.integers(15, 80, users)
    jobs = rng.integers(0, OCCUPATIONS, users)
    crowd = [
        User(f"u{i}", int(ages[i]), "female", f"job {jobs[i]}", {}, [names[t] for t in tags[i]]) for i in range(users)
    ]
    made = _peak_gib()
    started = time.perf_counter()
    clusters = cluster(crowd, list(range(GROUPS)), TfidfEncoder(), TOP)
    seconds = time.perf_counter() - started
    members = sum(len(c.members) for c in clusters)
    return {"users": users, "seconds": seconds, "peak_gib": _peak_gib(), "of_it_users_gib": made, "members": members}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Runs all sizes and prints a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for users in args.users:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            r = pool.apply(run_size, (users,))
        results.append(r)
        per_user = 1e6 * r["seconds"] / users
        memory = f"peak {r['peak_gib']:.2f} GiB ({r['of_it_users_gib']:.2f} before clustering)"
        print(
            f"{users:>9,} users x {GROUPS} groups: {r['seconds']:6.1f} s ({per_user:.0f} us a user), {memory}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"groups": GROUPS, "top": TOP, "results": results}, indent=1))


if __name__ == "__main__":
    main()
