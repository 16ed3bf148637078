"""The P(skip) from which a filter drops a video: chosen for a stated goal, on training users."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gubs.evaluate.settings import DecisionSettings


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold, and how it did on the users it was chosen on."""

    value: float
    balanced_accuracy: float
    kept: float
    """Share of the candidates it keeps."""
    lost: float
    """Share of the good candidates (watched, clicked) it drops."""
    n: int


def choose_threshold(skip: Sequence[float], skipped: Sequence[bool], decision: DecisionSettings) -> Threshold:
    """The threshold that meets the goal best; of equal ones, the one that drops least.

    Args:
        skip: P(skip) of each target.
        skipped: what happened.
        decision: the goal. `lose`: drops as much as it can, but at most `share` of what was watched; `keep`: drops the
            most probable skips, and keeps at least `share` of all; `balanced`: the best balanced accuracy.

    Raises:
        ValueError: the targets are all skipped, or none is.
    """
    from sklearn.metrics import roc_curve

    scores, truth = np.asarray(skip, float), np.asarray(skipped, bool)
    if truth.all() or not truth.any():
        raise ValueError("a threshold needs targets that were skipped and targets that were not")
    lost, hits, values = roc_curve(truth, scores, drop_intermediate=False)  # values fall: few drops first
    kept = 1 - (lost * (~truth).sum() + hits * truth.sum()) / len(truth)
    balanced = (hits + 1 - lost) / 2
    allowed = {"lose": lost <= decision.share, "keep": kept >= decision.share}.get(decision.goal)
    quality = balanced if allowed is None else np.where(allowed, 1 - kept, -1.0)
    best = int(quality.argmax())
    value = float(min(values[best], 2.0))  # infinity, for "drop nothing", is no JSON number
    return Threshold(value, float(balanced[best]), float(kept[best]), float(lost[best]), len(truth))


def auc(skip: Sequence[float], skipped: Sequence[bool]) -> float:
    """Area under the ROC curve of P(skip); NaN if the targets are all skipped, or none is."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(skipped, skip)) if len(set(skipped)) == 2 else float("nan")
