"""What the filter decides about a candidate. Pure: no Ray, no vLLM, no HTTP."""

from dataclasses import dataclass
from enum import StrEnum

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
