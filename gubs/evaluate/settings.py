"""Settings of the evaluation."""

from typing import Literal

from pydantic import Field

from gubs.section import Section


class DecisionSettings(Section):
    """How P(skip) becomes a decision. Chosen on training users that are held out (`ufm.distil.held_out`)."""

    goal: Literal["lose", "keep", "balanced"] = "lose"
    """What the threshold aims at. lose: drop as much as possible, but at most `share` of what users watch (click);
    keep: drop the most probable skips, and keep at least `share` of all; balanced: the best balanced accuracy."""
    share: float = Field(0.1, ge=0, le=1)
    """See `goal`."""
    items: int = Field(400, ge=20)
    """Most targets of held-out users, per task, that calibration and threshold are made from."""


class EvalSettings(Section):
    """Evaluation of a checkpoint on test users."""

    items: int = Field(0, ge=0)
    """Targets judged of each task, drawn at random from the test users; 0 = all."""
    bootstrap: int = Field(1000, ge=0)
    """Resamples of users for the intervals."""
    decision: DecisionSettings = DecisionSettings()
