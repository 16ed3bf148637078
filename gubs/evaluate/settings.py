"""Settings of the evaluation."""

from pydantic import Field

from gubs.section import Section


class EvalSettings(Section):
    """Evaluation of a checkpoint on test users."""

    items: int = Field(0, ge=0)
    """Targets judged of each task, drawn at random from the test users; 0 = all."""
    bootstrap: int = Field(1000, ge=0)
    """Resamples of users for the intervals."""
