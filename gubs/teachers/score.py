"""The quality of the teachers' reasons where the truth is known: simulated sources only, and never part of a prompt."""

from collections import Counter, defaultdict
from collections.abc import Mapping

from gubs.artifacts import Run
from gubs.prompts.options import SKIP_CAUSES

TRUTH = "truth"


def true_causes(run: Run) -> dict[str, str]:
    """The true cause (option) of every skip, by interaction id; empty if the source does not know it."""
    return _truth(run, "skips", "interaction_id", "cause")


def true_mechanisms(run: Run) -> dict[str, str]:
    """How every skip came about in the simulation, by interaction id; empty if the source does not know it."""
    return _truth(run, "skips", "interaction_id", "mechanism")


def true_flaws(run: Run) -> dict[str, str]:
    """The flaw of each video (possibly "none"), by video id; empty if the source does not know it."""
    return _truth(run, "videos", "video_id", "flaw")


def score(labels: Mapping[str, str], truth: Mapping[str, str]) -> dict[str, object] | None:
    """Accuracy, confusion and recall per cause of labels (interaction id -> option); None if no label has a truth.

    `most_frequent` is the accuracy of always naming the most frequent cause.
    """
    pairs = [(truth[key], option) for key, option in labels.items() if key in truth]
    if not pairs:
        return None
    confusion: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for true, option in pairs:
        confusion[true][option] += 1
    totals = {true: sum(row.values()) for true, row in confusion.items()}
    return {
        "judged": len(pairs),
        "unknown": len(labels) - len(pairs),
        "accuracy": sum(confusion[t][t] for t in confusion) / len(pairs),
        "most_frequent": max(totals.values()) / len(pairs),
        "per_cause": {
            str(c): {"n": totals[c], "accuracy": confusion[c][c] / totals[c]} for c in SKIP_CAUSES if totals.get(c)
        },
        "confusion": {true: dict(sorted(row.items())) for true, row in sorted(confusion.items())},
    }


def _truth(run: Run, table: str, key: str, value: str) -> dict[str, str]:
    if not run.has(TRUTH):
        return {}
    columns = run.artifact(TRUTH).table(table, [key, value])
    return dict(zip(columns[key].to_pylist(), columns[value].to_pylist(), strict=True))
