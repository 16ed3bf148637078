"""How good the teachers' reasons are where the truth is known: simulated sources only, and never part of a prompt."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from gubs.artifacts import Run
from gubs.prompts.options import SKIP_CAUSES

TRUTH = "truth"


def true_causes(run: Run) -> dict[str, str]:
    """The true cause (option) of every skip, by interaction id; empty where the source does not know."""
    if not run.has(TRUTH):
        return {}
    table = run.artifact(TRUTH).table("skips", ["interaction_id", "cause"])
    return dict(zip(table["interaction_id"].to_pylist(), table["cause"].to_pylist(), strict=True))


def true_flaws(run: Run) -> dict[str, str]:
    """What is wrong with each video ("none" among it), by its id; empty where the source does not know."""
    if not run.has(TRUTH):
        return {}
    table = run.artifact(TRUTH).table("videos", ["video_id", "flaw"])
    return dict(zip(table["video_id"].to_pylist(), table["flaw"].to_pylist(), strict=True))


def score(said: Mapping[str, str], truth: Mapping[str, str]) -> dict[str, Any] | None:
    """Accuracy, confusion and recall per cause of labels (interaction id -> option); None where nothing can be judged.

    `most_frequent` is what always naming the most frequent cause would reach.
    """
    pairs = [(truth[key], option) for key, option in said.items() if key in truth]
    if not pairs:
        return None
    confusion: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for true, option in pairs:
        confusion[true][option] += 1
    totals = {true: sum(row.values()) for true, row in confusion.items()}
    return {
        "judged": len(pairs),
        "unknown": len(said) - len(pairs),
        "accuracy": sum(confusion[t][t] for t in confusion) / len(pairs),
        "most_frequent": max(totals.values()) / len(pairs),
        "per_cause": {
            str(c): {"n": totals[c], "accuracy": confusion[c][c] / totals[c]} for c in SKIP_CAUSES if totals.get(c)
        },
        "confusion": {true: dict(sorted(row.items())) for true, row in sorted(confusion.items())},
    }
