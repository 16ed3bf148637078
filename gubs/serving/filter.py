"""What the filter decides about a candidate. Pure: no Ray, no vLLM, no HTTP."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from gubs.prompts.answers import read_answer
from gubs.records import TASK_OPTIONS, Option, Task
from gubs.ufm.labels import OptionProbabilities

if TYPE_CHECKING:
    from gubs.ufm.inputs import Prompt


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
    """Mode `reason`: the option of the answer that is shown; mode `score`: the most probable one."""
    reason: str = ""
    """The thought, in mode `reason`."""

    @property
    def skip_probability(self) -> float:
        """P(skip); in the click task P(no click)."""
        return self.probabilities.skip


def decide(
    task: Task, probabilities: OptionProbabilities, threshold: float, texts: Sequence[tuple[str, bool]] = ()
) -> Judgement:
    """Decides about one candidate.

    Args:
        task: of the question.
        probabilities: of the options.
        threshold: P(skip) from which a candidate is dropped.
        texts: in mode `reason`, the whole answers, and whether the policy ended each by itself. The first that agrees
            with the decision is shown; if none does, the first that names an option.
    """
    decision = Decision.DROP if probabilities.skip >= threshold else Decision.KEEP
    read = [read_answer(text, TASK_OPTIONS[task], finished=finished) for text, finished in texts]
    named = [r for r in read if r.option]
    agreeing = [r for r in named if (r.option != Option.A) == (decision is Decision.DROP)]
    shown = next(iter([*agreeing, *named, *read]), None)
    option = shown.option if shown and shown.option else probabilities.best
    return Judgement(decision, probabilities, option, shown.think if shown else "")


def thoughts_seed(version: str, task: Task, prompt: "Prompt") -> int:
    """Seed of a question's first thought, in [0, 2**62); that of thought k is k larger. The same question gets the same
    thoughts from every replica, and no two questions share a random stream, as they would with a fixed seed.

    Args:
        version: of the filter.
        task: of the question.
        prompt: the question; its pictures count by their content hash.
    """
    content = json.dumps([version, str(task), prompt.text, prompt.clip.key if prompt.clip else ""]).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 2
