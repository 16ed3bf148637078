"""The reward of one answer: R(o) = r_format + r_skip + r_choice, each 0 or 1 (Eq. 4)."""

from dataclasses import dataclass

from gubs.prompts.answers import Reading, read_answer
from gubs.records import TASK_OPTIONS, Option, Task
from gubs.ufm.settings import RewardSettings


@dataclass(frozen=True, slots=True)
class RewardParts:
    """The three parts of Eq. 4, each 0 or 1; a part that is turned off is 0."""

    format: float
    skip: float
    choice: float

    @property
    def total(self) -> float:
        """R(o), from 0 to 3."""
        return self.format + self.skip + self.choice


def reward_answer(
    text: str, gold: Option | None, task: Task, settings: RewardSettings, finished: bool
) -> tuple[RewardParts, Reading]:
    """Reads an answer and rewards it.

    The parts are independent: a right option in a malformed answer (text after it, say) gets r_skip and r_choice, but
    not r_format. An answer that names no option gets neither r_skip nor r_choice.

    Args:
        text: the response, special tokens removed.
        gold: the record's option, the same for the T, S and G samples; None = a skip of unknown reason (r_choice is 0).
        task: decides the options (sequential A-D, click A and B).
        settings: which parts count (Table 10).
        finished: the model ended the answer. If the token limit cut it off, it gets no format reward, even if the text
            looks complete.

    Raises:
        ValueError: `gold` is not an option of the task.
    """
    options = TASK_OPTIONS[task]
    if gold is not None and gold not in options:
        raise ValueError(f"gold option {gold!r} is not an option of the {task} task ({', '.join(options)})")
    reading = read_answer(text, options, finished=finished)
    parts = RewardParts(
        format=float(settings.format and finished and reading.well_formed),
        skip=float(settings.skip and skip_right(reading.option, gold)),
        choice=float(settings.choice and gold is not None and reading.option == gold),
    )
    return parts, reading


def outcome_only(settings: RewardSettings) -> RewardSettings:
    """The rewards where reasons are unknown: without r_choice, which would be for option A alone."""
    return settings.model_copy(update={"choice": False})


def is_right(answer: Option | None, gold: Option | None) -> bool:
    """Whether an answer is the gold option, or a skip where no more is known (None)."""
    return skip_right(answer, gold) if gold is None else answer == gold


def skip_right(answer: Option | None, gold: Option | None) -> bool:
    """Right about skip or no skip: A against the rest. In the click task, with A and B only, right about the click."""
    return answer is not None and (answer == Option.A) == (gold == Option.A)
