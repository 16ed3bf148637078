"""Settings of the UFM's training."""

from typing import Literal

from pydantic import Field

from gubs.section import Section


class RewardSettings(Section):
    """Which parts of the reward count (Eq. 4; the paper's Table 10 switches them off one by one)."""

    format: bool = True
    """r_format: 1 for `<think>..</think><answer>..</answer>` with nothing after it."""
    skip: bool = True
    """r_skip: 1 for being right about skip or no skip (click task: about clicking)."""
    choice: bool = True
    """r_choice: 1 for the right option."""


class AdvantageSettings(Section):
    """How the rewards of one group (T, S and G samples) become advantages (Eqs. 5 and 6, Table 11)."""

    rule: Literal["paper", "weighted", "anchored"] = "paper"
    """`paper`: weight the rewards, then standardise. `weighted`: standardise the raw rewards, then weight. `anchored`:
    the same, with mean and deviation of the T samples only. Under `paper` six equal rewards push S and G down."""
    weight_user: float = Field(0.7, ge=0)
    """W of the T samples (paper: 0.7)."""
    weight_group: float = Field(0.15, ge=0)
    """W of the G sample (paper: 0.15)."""
    weight_similar: float = Field(0.15, ge=0)
    """W of the S sample (paper: 0.15)."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""
