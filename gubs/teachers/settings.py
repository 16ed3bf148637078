"""Settings of the teachers."""

from typing import Literal

from pydantic import Field, model_validator

from gubs.section import Section


class TeacherSettings(Section):
    """SFT examples, reasons of skips, user profiles. The LLM sees no pictures, only titles, lengths and tags."""

    author: Literal["annotator", "script"] = "annotator"
    """Who writes SFT examples and reasons of skips: the LLM in the role `annotator`, or simple rules that need no LLM
    (see teachers/script.py) and fit small runs."""
    script_mistakes: float = Field(0.0, ge=0, le=1)
    """Share of dislikes, drawn at random, for which the scripted teacher does not blame the content whatever the user
    complains about: no teacher is perfect, and learning from users' actions is meant to correct that."""
    script_flaws: bool = False
    """Simulated sources: tell the scripted teacher, which sees no pictures, which videos have a flaw (not whether a
    user minded it)."""
    train_labels: Literal["teacher", "truth", "naive"] = "teacher"
    """Where the reasons of training users' skips come from: the teacher (`author`) or, on simulated sources, the true
    causes. `naive`: the true causes, but of skips that nobody meant (accidents, exits, interruptions) what their fields
    suggest: how somebody reads the log who takes every skip for intended."""
    test_labels: Literal["teacher", "truth", "meant"] = "teacher"
    """The same for test users. `meant`: the true causes; what ended by an accident, exit or interruption is not judged
    at all."""
    sft_dislikes: int = Field(0, ge=0)
    """Explicit dislikes of training users that become SFT examples, drawn at random; 0 = all (paper: 50 K)."""
    sft_watched: float = Field(0, ge=0, le=10)
    """Targets of training users that were not fast skips and become SFT examples of option A, per dislike that becomes
    one; drawn at random, by the scripted teacher only (paper: none). A small model forgets an option that no example
    has, and GRPO cannot reinforce an answer that is never sampled."""
    sft_views: int = Field(0, ge=0)
    """Sequential targets of training users, half of them fast skips, that become SFT examples because the log knows
    what happened; drawn at random, by the scripted teacher only, whose reason for a skip is a guess (paper: none)."""
    script_digest: bool = False
    """Let the scripted teacher note how the user's earlier views went, and leave out its conclusion; for prompts that
    show the same (`ufm.inputs.digest`)."""
    sft_click_users: int = Field(1000, ge=0)
    """Training users, drawn at random, whose clicks become SFT examples (paper: 1,000)."""
    sft_click_each: int = Field(1, ge=1)
    """Maximum number of targets of each kind, clicked and unclicked, per drawn user."""
    train_skips: int = Field(0, ge=0)
    """Fast skips of training users that get a reason, drawn at random; 0 = all."""
    test_skips: int = Field(0, ge=0)
    """The same for test users (paper: 72 K for both)."""
    rounds: int = Field(3, ge=1, le=10)
    """Rounds of giving and judging a reason before a person is asked (paper: 3)."""
    profiles: bool = True
    """Let the annotator write a profile of each user who lists no tags and has rated something (A.7), for prompts and
    groups."""
    profile_items: int = Field(50, ge=1)
    """Rated items, drawn at random, from which a user's profile is written (paper: 50)."""
    profile_users: int = Field(0, ge=0)
    """Users who get a profile: test users first, then the UGM's, then others; 0 = all."""
    history_items: int = Field(20, ge=0)
    """Latest views of a user's history shown in a prompt; 0 = all."""
    max_text: int = Field(200, ge=20)
    """Maximum characters shown of a title, a tag or another single field."""
    think_chars: int = Field(1500, ge=80)
    """Maximum characters of a chain of thought; the UFM has 512 tokens for its answer."""
    reason_chars: int = Field(600, ge=40)
    """Maximum characters of a rationale or criticism."""
    profile_chars: int = Field(800, ge=40)
    """Maximum characters of a user profile."""

    @model_validator(mode="after")
    def _consistent(self) -> "TeacherSettings":
        scripted = [f"teachers.{n}" for n in ("sft_watched", "sft_views", "script_digest") if getattr(self, n)]
        if scripted and self.author != "script":
            are, them = ("are", "them") if len(scripted) > 1 else ("is", "it")
            raise ValueError(f"{', '.join(scripted)} {are} for teachers.author=script only: set {them} to 0")
        return self
