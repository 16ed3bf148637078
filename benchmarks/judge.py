"""Does judging stream? 1,000 test users x 20 targets: memory while it grows, and a kill that costs no answer.

`gubs judge base` answers about all targets of a simulated app's test users. It is killed with all its processes, and
run again. Memory is the sum of PSS of all processes, every second, beside the number of answers stored by then. The
policy was never trained: what it answers does not matter here.

    python benchmarks/judge.py --work DIR --json out.json
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.ifvr import IFVR
from gubs.records import Split, Task
from gubs.stages import make

STAGE = "eval-base"
_EVERY_S = 1.0
_LATE_VIEWS = 0.5
"""Share of a test user's records that are targets."""


@dataclass
class Memory:
    """Memory that a command took while it ran."""

    mib: list[float] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    """Stored when `mib` was measured; as long as `mib`."""

    def peak(self, low: float, high: float) -> float:
        """The highest memory while the answers were between two numbers, in MiB; 0 if none was measured."""
        return max((m for m, n in zip(self.mib, self.answers, strict=True) if low <= n < high), default=0.0)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--users", type=int, default=1000, help="test users")
    parser.add_argument("--targets", type=int, default=20, help="targets per test user, about")
    parser.add_argument("--killed-at", type=float, default=0.4, help="share of the answers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings = [
        f"synthetic.users={3 * args.users}",  # at most half of those with enough views are test users
        "synthetic.sequential_share=0.7",
        f"views_per_user={args.targets / _LATE_VIEWS * 1.2:g}",
        f"splits.test_users={args.users}",
        f"evaluate.items={args.users * args.targets}",
        "evaluate.decision.thoughts=1",
        "evaluate.decision.items=400",
        "splits.click_targets=2",
    ]
    run = Run(args.work / "run")
    make(["frames", "labels"], run, load_settings("tiny", settings))
    figures = measured(run, settings, args.killed_at)
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


def measured(run: Run, settings: list[str], killed_at: float) -> dict[str, Any]:
    """The figures of both attempts."""
    ifvr = IFVR(run)
    targets = ifvr.targets(Task.SEQUENTIAL, [Split.TEST]).num_rows
    began = time.monotonic()
    first, stored, _ = attempt(run, settings, int(killed_at * 2 * targets))
    second, _, output = attempt(run, settings)
    seconds = time.monotonic() - began
    words = re.search(r"([\d,]+) answers, ([\d,]+) of them from an earlier attempt", output)
    if not words:
        raise SystemExit(f"the second attempt did not resume where the first was killed:\n{output[-3000:]}")
    answers, earlier = (int(w.replace(",", "")) for w in words.groups())
    rows = run.artifact(STAGE).table("predictions").select(["interaction_id", "mode"]).to_pylist()
    asked = [r for r in rows if r["mode"] in ("greedy", "sampled")]
    return {
        "test users": len(ifvr.split_users(Task.SEQUENTIAL, Split.TEST)),
        "sequential targets": targets,
        "answers": answers,
        "stored when it was killed": stored,
        "not asked again": earlier,
        "predictions twice": len(asked) - len({(r["interaction_id"], r["mode"]) for r in asked}),
        "seconds": seconds,
        "peak MiB": {
            f"{100 * low:.0f} to {100 * high:.0f} % of the answers": max(
                m.peak(low * answers, high * answers) for m in (first, second)
            )
            for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 1.01))
        },
    }


def attempt(run: Run, settings: list[str], until: int | None = None) -> tuple[Memory, int, str]:
    """Runs the command, to its end or until so many answers are stored; its memory, the answers, and its output."""
    command = [sys.executable, "-m", "gubs.cli", "judge", "base", "--run", run.uri, *settings]
    memory, log = Memory(), Path(run.uri).parent / "judge.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        while process.poll() is None:
            parent = psutil.Process(process.pid)
            parts = [parent, *parent.children(recursive=True)]
            memory.mib.append(sum(map(_pss, parts)) / 2**20)
            memory.answers.append(_stored(run))
            if until is not None and memory.answers[-1] >= until:
                _end(parts)
                process.wait()
                return memory, _stored(run), log.read_text()
            time.sleep(_EVERY_S)
    if process.returncode:
        raise SystemExit(log.read_text()[-3000:])
    return memory, 0, log.read_text()


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def _stored(run: Run) -> int:
    """Answers in files."""
    folder = Path(run.path(f"{STAGE}.partial", "answers"))
    try:
        return sum(pq.read_metadata(f).num_rows for f in folder.glob("*.parquet"))
    except OSError:  # the stage has just become whole
        return 0


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    main()
