"""Settings of the evaluation."""

from typing import Literal

from pydantic import Field

from gubs.section import Section


class DecisionSettings(Section):
    """How P(skip) becomes a decision. Chosen on training users that no policy is trained on (`ufm.held_out`)."""

    goal: Literal["lose", "keep", "balanced"] = "lose"
    """What the threshold aims at. lose: drop as much as possible, but at most `share` of what users watch (click);
    keep: drop the most probable skips, and keep at least `share` of all; balanced: the best balanced accuracy."""
    share: float = Field(0.1, ge=0, le=1)
    """See `goal`."""
    thoughts: int = Field(4, ge=1)
    """Answers sampled per candidate; their mean option probabilities decide, in evaluations (modes `calibrated` and
    `filter`) and in the service's mode `reason`. After one thought the letter is all but certain, so one answer ranks
    nothing finely. 1 = the greedy answer alone."""
    items: int = Field(400, ge=20)
    """Most targets of held-out users, per task, that calibration and threshold are made from."""


class PublicSettings(Section):
    """The "10 + 10" protocols on data of choices and ratings (paper, Table 3)."""

    sampled_users: int = Field(1000, ge=0)
    """Users asked about, drawn from those with enough records (paper: 1,000); 0 = all."""
    each: int = Field(10, ge=1)
    """Positive items, and as many negative ones, of each user (paper: 10)."""
    least_profile: int = Field(10, ge=1)
    """Users with fewer records beside the candidates are left out."""
    available: bool = True
    """Negatives are items that somebody had chosen before the user's last record. `false` draws them from all times, as
    the literature does; where the data set grows, "never seen before" then gives them away."""


class SasrecSettings(Section):
    """SASRec, the sequential recommender shown as a row in the tables."""

    length: int = Field(50, ge=2)
    """Items that it sees at once: a user's latest ones; longer sequences are cut for training."""
    width: int = Field(64, ge=8)
    """Size of the embeddings."""
    blocks: int = Field(2, ge=1)
    """Attention blocks."""
    heads: int = Field(2, ge=1)
    """Heads of each."""
    dropout: float = Field(0.3, ge=0, lt=1)
    """Dropout of embeddings, attention and feed-forward layers."""
    epochs: int = Field(40, ge=1)
    """Passes over all items of all users."""
    batch: int = Field(128, ge=1)
    """Windows of users per step."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate of Adam."""
    sasrec_workers: int = Field(1, ge=1)
    """Ray Train workers."""


class SimulateSettings(Section):
    """The role `annotator` as simulated user in the "10 + 10" protocols."""

    strategies: tuple[Literal["plain", "recagent", "agent4rec", "simuser"], ...] = (
        *("plain", "recagent", "agent4rec", "simuser"),
    )
    """What a prompt says about the user; see `gubs/evaluate/simulators.py`."""
    forms: tuple[Literal["list", "point"], ...] = ("list", "point")
    """Whether a prompt asks about a user's whole list or about one item."""
    protocols: tuple[str, ...] = ()
    """Names of protocols; empty = all."""
    asked_users: int = Field(0, ge=0)
    """Users of each protocol that the model is asked about; 0 = all."""
    probes: int = Field(100, ge=0)
    """Items whose title the model is asked for by id, to see whether it has memorised the data set."""


class SensitivitySettings(Section):
    """What a policy's answers depend on: the same targets, asked about with changed prompts."""

    items: int = Field(200, ge=1)
    """Targets asked about, of each task: the first ones that `gubs judge` draws in the natural mix."""


class EvalSettings(Section):
    """Evaluation of a checkpoint on test users, and the tables that it stands in."""

    items: int = Field(0, ge=0)
    """Targets judged of each task, drawn at random from the test users; 0 = all."""
    bootstrap: int = Field(1000, ge=0)
    """Resamples of users for the intervals."""
    decision: DecisionSettings = DecisionSettings()

    least_users: int = Field(100, ge=1)
    """A table about fewer test users is flagged: its figures cannot tell predictors apart."""
    least_slice: int = Field(50, ge=2)
    """Slices of the test users (by age, group, ...) with fewer targets are left out of the report."""
    sensitivity: SensitivitySettings = SensitivitySettings()
    public: PublicSettings = PublicSettings()
    simulate: SimulateSettings = SimulateSettings()
    sasrec: SasrecSettings = SasrecSettings()
