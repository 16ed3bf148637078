"""What the options of the UFM's multiple-choice question mean, in the words every prompt uses.

The meanings are those of the paper (section on labels, appendix A.2): a fast skip comes from the content, from the
recommendation, or from the user's own moment.
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
    Task.CLICK: {
        Option.A: "The user clicks this video.",
        Option.B: "The user does not click this video.",
    },
}

SKIP_CAUSES: tuple[Option, ...] = (Option.B, Option.C, Option.D)
"""The options that say why a video was skipped."""


def option_lines(task: Task, options: Sequence[Option] | None = None) -> str:
    """The options (all of the task, or some), a line each: `A: ...`."""
    texts = OPTION_TEXTS[task]
    return "\n".join(f"{option}: {texts[option]}" for option in options or TASK_OPTIONS[task])
