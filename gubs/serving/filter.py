"""What the filter decides about a candidate. Pure: no Ray, no vLLM, no HTTP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from gubs.prompts.answers import read_answer
from gubs.records import TASK_OPTIONS, Option, Task
from gubs.ufm.labels import OptionProbabilities


class Mode(StrEnum):
    """How the policy is asked."""

    REASON = "reason"
    """A thought, then the option."""
    SCORE = "score"
    """The option's probabilities after an empty thought; needs a distilled policy."""


class Decision(StrEnum):
    """What happens to a candidate."""

    KEEP = "keep"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the policy said about a candidate, and what follows from it."""

    decision: Decision
    probabilities: OptionProbabilities
    option: Option
    """Mode `reason`: the option that was written; mode `score`: the most probable one."""
    reason: str = ""
    """The thought, in mode `reason`."""

    @property
    def skip_probability(self) -> float:
        """P(skip); in the click task P(no click)."""
        return self.probabilities.skip


def judge(
    task: Task, probabilities: OptionProbabilities, threshold: float, *, text: str = "", finished: bool = True
) -> Judgement:
    """Decides about one candidate.

    Args:
        task: of the question.
        probabilities: of the options.
        threshold: P(skip) from which a candidate is dropped.
        text: the whole answer, in mode `reason`.
        finished: the policy ended the answer by itself.
    """
    reading = read_answer(text, TASK_OPTIONS[task], finished=finished) if text else None
    option = reading.option if reading and reading.option else probabilities.best
    decision = Decision.DROP if probabilities.skip >= threshold else Decision.KEEP
    return Judgement(decision, probabilities, option, reading.think if reading else "")


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


def choose_threshold(skip: Sequence[float], skipped: Sequence[bool]) -> Threshold:
    """The threshold with the best balanced accuracy; of equal ones, the one that drops least.

    Args:
        skip: P(skip) of each target.
        skipped: what happened.

    Raises:
        ValueError: the targets are all skipped, or none is.
    """
    from sklearn.metrics import roc_curve

    scores, truth = np.asarray(skip, float), np.asarray(skipped, bool)
    if truth.all() or not truth.any():
        raise ValueError("a threshold needs targets that were skipped and targets that were not")
    false_alarms, hits, values = roc_curve(truth, scores, drop_intermediate=False)  # values fall: few drops first
    balanced = (hits + 1 - false_alarms) / 2
    best = int(balanced.argmax())
    value = float(min(values[best], 2.0))  # infinity, for "drop nothing", is no JSON number
    return Threshold(
        value, float(balanced[best]), float((scores < value).mean()), float(false_alarms[best]), len(truth)
    )


def auc(skip: Sequence[float], skipped: Sequence[bool]) -> float:
    """Area under the ROC curve of P(skip); NaN if the targets are all skipped, or none is."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(skipped, skip)) if len(set(skipped)) == 2 else float("nan")


def thresholds_in(config: Mapping[str, Mapping[str, Mapping[str, float]]], task: Task, mode: Mode) -> float | None:
    """The default threshold of a filter for a task and mode; None if it has none."""
    entry = config.get(str(task), {}).get(str(mode))
    return None if entry is None else entry["value"]
