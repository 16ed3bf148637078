"""The letter of an answer as a token: where it stands in a response, and how probable the policy finds each option.

An option's letter need not be a token of its own. In Qwen's vocabulary `<answer>A` is `<`, `answer`, `>A`. So the whole
answers of all options are encoded: what they share before they first differ is forced (or has been written), and the
first token that differs is the option's label.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gubs.errors import SettingsError
from gubs.prompts.answers import ANSWER, answer_without_thought
from gubs.records import TASK_OPTIONS, Option, Task

if TYPE_CHECKING:
    from gubs.ufm.inputs import Inputs

_LONGEST_OPENING = 8
"""Most tokens that `<answer>` and a letter take."""


@dataclass(frozen=True, slots=True)
class OptionProbabilities:
    """How probable the policy finds each option at the place of the letter."""

    options: Mapping[Option, float]
    """They add up to 1."""
    mass: float
    """Probability of all options together; the rest is that of other tokens."""

    @property
    def skip(self) -> float:
        """P(skip); in the click task P(no click)."""
        return 1.0 - self.options[Option.A]

    @property
    def best(self) -> Option:
        """The most probable option."""
        return max(self.options, key=lambda o: self.options[o])

    def at(self, threshold: float) -> Option:
        """The option if skips are called from P(skip) >= `threshold` on: A, or the most probable of the others."""
        others = [o for o in self.options if o != Option.A]
        return max(others, key=lambda o: self.options[o]) if self.skip >= threshold else Option.A


def mean_options(answers: Iterable[OptionProbabilities | None]) -> OptionProbabilities | None:
    """The mean over several answers to one question, without those that name no option; None if none does.

    After a thought the letter is all but certain, so one answer's probabilities are near 0 or 1; the mean over thoughts
    tells how sure the policy is.
    """
    read = [a for a in answers if a is not None]
    if not read:
        return None
    mean = {o: sum(a.options[o] for a in read) / len(read) for o in read[0].options}
    return OptionProbabilities(mean, sum(a.mass for a in read) / len(read))


@dataclass(frozen=True)
class Labels:
    """The options of a task as tokens of one vocabulary."""

    options: tuple[Option, ...]
    tokens: tuple[int, ...]
    """Label of each option."""
    forced: tuple[int, ...]
    """The answer with an empty thought, up to the label."""

    @classmethod
    def of(cls, inputs: "Inputs", task: Task) -> "Labels":
        """The labels of a task.

        Raises:
            SettingsError: the vocabulary does not tell the options apart by one token.
        """
        options = TASK_OPTIONS[task]
        answers = [inputs.answer_ids(answer_without_thought(o)) for o in options]
        same = next(i for i, column in enumerate(zip(*answers, strict=False)) if len(set(column)) > 1)
        tokens = tuple(a[same] for a in answers)
        if len(set(tokens)) < len(options):
            raise SettingsError(f"the model's vocabulary has no label of its own for each of {', '.join(options)}")
        return cls(options, tokens, tuple(answers[0][:same]))

    def place(self, ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> int | None:
        """Where a response names its option: index of the label in `ids`; None if it names none.

        Args:
            ids: tokens of the response.
            decode: tokens to text.
        """
        for i in reversed([i for i, token in enumerate(ids) if token in self.tokens]):
            option = self.options[self.tokens.index(ids[i])]
            if decode(ids[max(0, i - _LONGEST_OPENING) : i + 1]).endswith(f"{ANSWER}{option}"):
                return i
        return None

    def probabilities(self, logprobs: Sequence[float]) -> OptionProbabilities:
        """Probabilities from the log-probabilities of `tokens`, in their order."""
        raw = [math.exp(value) for value in logprobs]
        mass = sum(raw)
        shares = [value / mass for value in raw] if mass else [1.0 / len(raw)] * len(raw)
        return OptionProbabilities(dict(zip(self.options, shares, strict=True)), mass)
