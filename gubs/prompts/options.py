"""The options of the UFM's multiple-choice question, in the words of every prompt.

The meanings are the paper's (section on labels, appendix A.2): a fast skip is due to the content, the recommendation,
or the user's own situation.
"""

from collections.abc import Sequence

from gubs.records import TASK_OPTIONS, Option, Task

OPTION_TEXTS: dict[Task, dict[Option, str]] = {
    Task.SEQUENTIAL: {
        Option.A: "The user goes on watching, no fast skip.",
        Option.B: "Fast skip because of the content: it is vulgar, its title promises what it does not show, or its "
        "pictures are hard to bear (blood, snakes, crawling insects).",
        Option.C: "Fast skip because of the recommendation: it misjudges this taste, brings the same thing again, or "
        "offers too little variety.",
        Option.D: "Fast skip because of the user's moment: a slip of the finger, no time, or no wish to watch now.",
    },
    Task.CLICK: {Option.A: "The user clicks this video.", Option.B: "The user does not click this video."},
}

SKIP_CAUSES: tuple[Option, ...] = (Option.B, Option.C, Option.D)
"""The options that say why a video was skipped."""


def option_lines(task: Task, options: Sequence[Option] | None = None, letters: Sequence[Option] | None = None) -> str:
    """The options (all of the task, or some), one per line: `A: ...`; `letters` are shown instead of their own."""
    texts, options = OPTION_TEXTS[task], options or TASK_OPTIONS[task]
    return "\n".join(f"{letter}: {texts[o]}" for letter, o in zip(letters or options, options, strict=True))
