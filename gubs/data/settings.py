"""Settings that lead from logs to the IF-VR data set: source, filters, splits."""

from typing import Literal

from pydantic import Field, model_validator

from gubs.section import Section

NULLS = (
    *("nan", "null", "none", "na", "n/a", "nil", "nat", "undefined", "(null)", "<na>", "#n/a", "#na", "<null>"),
    *("\\N", "-", "--"),
)
"""Words for a missing value, as data frames, databases and spreadsheets write them."""

SEPARATORS = "|;,"
"""Separators of lists, strongest first."""


class SourceSettings(Section):
    """The source of logs and videos."""

    kind: Literal[
        "synthetic",
        "logs",
        "movielens",
        "amazon",
        "agent4rec",
        "kuairand",
        "microlens",
        "mind",
        "netflix",
        "yelp",
    ] = "synthetic"
    """The layout of the source's files; `synthetic` = the simulated app, `logs` = your own tables."""
    path: str = ""
    """Folder (or file) of the source's data; unused by `synthetic`."""
    videos_dir: str = ""
    """Folder of video files, if the source's table names none; a file's stem is the id of its video."""
    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """Share of malformed rows above which a file is refused."""
    unseen: int = Field(0, ge=0)
    """`movielens` only: number of unrated films added for each rating of a user. They are drawn evenly from those that
    somebody had rated by then, and count as shown but not clicked. Ratings become clicks without stars: the question is
    whether a user picks a film, not whether the user likes it."""
    columns: dict[str, str | dict[str, str]] = Field(default_factory=dict)
    """`logs` only: our column name -> its name in your files, where they differ; for one table only with the table's
    name before it: `source.columns.videos.duration_s=length`."""
    units: dict[str, str | dict[str, str]] = Field(default_factory=dict)
    """`logs` only: unit of a column, if its name does not say: `source.units.watch=ms`,
    `source.units.videos.duration=min`, `source.units.play_rate=percent`."""
    nulls: tuple[str, ...] = NULLS
    """`logs` only: words for a missing value, in upper or lower case; titles are free text and keep them."""
    separators: str = SEPARATORS
    """`logs` only: characters that separate the tags of a cell, strongest first; the strongest in the cell is used."""

    @model_validator(mode="after")
    def _has_a_path(self) -> "SourceSettings":
        if self.kind != "synthetic" and not self.path:
            raise ValueError(f"source.kind={self.kind} needs source.path=FOLDER")
        if self.kind != "logs" and "://" in self.path:
            raise ValueError(
                f"source.kind={self.kind} reads a local folder, not {self.path}: mount it, or copy the files"
            )
        return self


class FilterSettings(Section):
    """The paper's noise criteria and minimum counts."""

    noise: bool = True
    """Apply the three noise criteria (an operation before and after, the gap, no app exit)."""
    noise_scope: Literal["skips", "all"] = "skips"
    """What the noise criteria apply to: fast skips only, since the aim is to keep the meaningful ones (the paper speaks
    of implicit negative feedback), or all sequential views."""
    max_gap_s: float = Field(120.0, gt=0)
    """Longest time between the operations before and after (paper: 2 minutes)."""
    min_video_views: int = Field(10, ge=0)
    """Videos with fewer views are removed (paper: 10)."""
    min_user_exposures: int = Field(30, ge=0)
    """Click users with fewer exposures are removed (paper: 30)."""
    fixed_point: bool = True
    """Repeat the two minimum filters until nothing changes, so that both hold in the result; otherwise one pass."""


class SplitSettings(Section):
    """Test users, histories and targets."""

    test_users: int = Field(1000, ge=1)
    """Test users per task (paper: 1,000), but at most half of the users."""
    ugm_users: int = Field(1000, ge=1)
    """Users that the UGM groups, drawn from the training users (paper: 1,000)."""
    click_targets: int = Field(10, ge=1)
    """Last records of a click user that are predicted, or as many as come closest in whole pages (paper: 6 in one
    place, 10 in another)."""
    min_history: int = Field(2, ge=1)
    """Users with a shorter history are left out (and counted): there is too little to predict from."""
    held_out_videos: float = Field(0.0, ge=0, lt=1)
    """Share of the videos kept for test users' targets, which are about no other videos: evaluation then asks about
    videos that nothing was trained on or counted from. 0 = test users are new, videos are not."""


class DataSettings(Section):
    """How logs of any size are read and split. None of it changes a row of the result."""

    ray_from_rows: int = Field(2_000_000, ge=0)
    """Logs of at least this many rows (estimated for text files) are read and split on Ray; smaller ones in one
    process, which is faster than starting Ray."""
    part_rows: int = Field(1_000_000, ge=1)
    """Approximate rows per part: larger tables are cut by user into files of this size. A worker holds one part in
    memory (about 0.6 GiB per million rows)."""
