"""A filter as one folder that a replica loads: policy, group profiles, the people and videos it knows, thresholds.

    filter/
      manifest.json       what made it; its content hash is the filter's version
      filter.json         see `FilterConfig`
      policy/             a checkpoint that transformers and vLLM load
      users, videos, views, groups, memberships, encoder, centres, frames, held_out  (Parquet)

Pictures stay in the frame store, whose address is in `filter.json`. The folder may be at any URI; `policy/` is copied
to this machine once per version.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError

from gubs import prompts
from gubs.artifacts import Artifact, JsonObject, Run
from gubs.errors import ArtifactError, PlatformError
from gubs.evaluate.held_out import DecisionRule
from gubs.prompts.people import Person, Taste, View
from gubs.records import GroupProfile, Task, User, Video
from gubs.serving.filter import Mode
from gubs.ufm.checkpoint import POLICY
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.ugm.placement import CENTRES, Placement
from gubs.video.clips import StoredFrames
from gubs.video.decoded import DecodeOptions
from gubs.video.frame_store import FrameStore

STAGE = "filter"
CONFIG = "filter.json"
_PEOPLE_CACHE, _VIDEO_CACHE = 4096, 32_768


class FilterConfig(BaseModel):
    """What a replica has to know of a filter beside its tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    policy: str
    """Stage of the policy."""
    tasks: tuple[Task, ...]
    model: ModelSettings
    inputs: InputSettings
    rollout: RolloutSettings
    pictures: bool
    """The data set has videos with frames; otherwise prompts show topic tags."""
    decisions: dict[Task, dict[Mode, DecisionRule]]
    """How each task is decided in each mode, from held-out training users."""
    thoughts: int = 1
    """Answers sampled per candidate in mode `reason`, whose mean decides; 1 = the greedy answer."""
    modes: tuple[Mode, ...]
    """Modes that may be asked; without `score` if its AUC is below the bar."""
    refused: str = ""
    """Why `score` may not be asked."""
    prompts: dict[str, str]
    """Hash of each prompt template that the policy was trained with."""
    frame_store: str = ""
    frames: DecodeOptions | None = None

    def answers(self, task: Task, mode: Mode) -> bool:
        """Whether it may be asked: the mode is not refused, and has a rule for the task."""
        return mode in self.modes and mode in self.decisions.get(task, {})

    def rule(self, task: Task, mode: Mode) -> DecisionRule:
        """How it decides.

        Raises:
            KeyError: the filter has no rule for this task and mode.
        """
        return self.decisions[task][mode]


class Bundle:
    """A loaded filter. People and videos stay in columns: a million of them cost no Python objects."""

    def __init__(self, uri: str):
        """Opens a filter.

        Args:
            uri: its folder, a path or any URI that fsspec knows.

        Raises:
            ArtifactError: there is no finished filter, or it is of another version of gubs or its prompts.
        """
        root, _, name = uri.rstrip("/").rpartition("/")
        self.artifact: Artifact = Run(root or ".").artifact(name)
        if self.artifact.manifest.kind != STAGE:
            raise ArtifactError(f"{uri} is not a filter: run `gubs filter`")
        fs, path = self.artifact.run.fs, self.artifact.run.path(name, CONFIG)
        try:
            self.config = FilterConfig.model_validate_json(fs.cat_file(path))
        except ValidationError as e:
            raise ArtifactError(
                f"{uri}/{CONFIG} is of another version of gubs ({e.errors()[0]['msg']}): run `gubs filter --force`"
            ) from None
        _check_prompts(uri, self.config.prompts)
        self._users = _Rows(self.artifact.table("users"), "user_id")
        self._videos = _Rows(self.artifact.table("videos"), "video_id")
        self._views = _Rows(self.artifact.table("views"), "user_id")
        self._memberships = _Rows(self.artifact.table("memberships"), "user_id")
        self.person = lru_cache(_PEOPLE_CACHE)(self._person)
        self.video = lru_cache(_VIDEO_CACHE)(self._video)

    @property
    def version(self) -> str:
        """Hash of the filter's content."""
        return self.artifact.content

    @cached_property
    def groups(self) -> dict[str, GroupProfile]:
        """Groups with a profile, by id."""
        return {g.group_id: g for g in GroupProfile.from_table(self.artifact.table("groups"))}

    @cached_property
    def pictures(self) -> StoredFrames:
        """The stored pictures of the videos."""
        table = self.artifact.table("frames")
        hashes = dict(zip(table["video_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))
        store = FrameStore(self.config.frame_store, self.config.frames) if self.config.frames else None
        return StoredFrames(hashes, store)

    @property
    def user_ids(self) -> Sequence[str]:
        """Ids of the users it knows."""
        return self._users.ids

    @property
    def video_ids(self) -> Sequence[str]:
        """Ids of the videos it knows."""
        return self._videos.ids

    def _video(self, video_id: str) -> Video | None:
        """A video it knows; None if it does not."""
        rows = self._videos.of(video_id)
        return Video.from_row(rows[0]) if rows else None

    def _person(self, user_id: str, task: Task) -> Person | None:
        """A user it knows, with the history of a task; None if it does not know the user."""
        users = self._users.of(user_id)
        if not users:
            return None
        row = users[0]
        taste = Taste(row["taste"], tuple(row["taste_tags"] or ()), row["taste_until"]) if row["taste"] else None
        user = User.from_row({k: v for k, v in row.items() if not k.startswith("taste")})
        views = tuple(self._view(v) for v in self._views.of(user_id) if v["task"] == str(task))
        return Person(user, views, taste)

    def _view(self, row: JsonObject) -> View:
        fields = {k: v for k, v in row.items() if k not in ("user_id", "task", "video_id")}
        return View(self.video(row["video_id"]) or Video(row["video_id"]), **fields)

    def groups_of(self, user_id: str) -> list[str]:
        """Groups of a user it knows, most similar first; those of another user come from `place`."""
        rows = sorted(self._memberships.of(user_id), key=lambda r: -(r["similarity"] or 0.0))
        return [r["group_id"] for r in rows if r["group_id"] in self.groups]

    def place(self, person: Person) -> str | None:
        """The group of a person it does not know: that of the nearest typical user whose threshold is reached."""
        if self._placement is None:
            return None
        (place,) = self._placement.place([person.with_tags])
        return place[0] if place else None

    @cached_property
    def _placement(self) -> Placement | None:
        """As the UGM left it; None without groups."""
        if CENTRES not in self.artifact.manifest.tables or not self.groups:
            return None
        try:
            return Placement.read(self.artifact)
        except (OSError, ValueError, PlatformError) as e:  # of a sentence encoder, which lies elsewhere
            text = str(e).strip().partition("\n")[0]
            raise ArtifactError(
                f"{self.artifact.uri}: what places users in groups cannot be loaded on this machine: {text}"
            ) from None

    def load(self) -> None:
        """Reads now what the first request would wait for: the list of pictures, the groups, and what places users.

        Raises:
            ArtifactError: some of it is not there.
        """
        _ = self.pictures, self.groups, self._placement

    def local_policy(self) -> Path:
        """Folder of the policy on this machine; copied once per version if the filter is elsewhere."""
        run, stage = self.artifact.run, self.artifact.stage
        if "://" not in run.uri or run.uri.startswith("file://"):
            return Path(run.path(stage, POLICY))
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gubs" / "filters" / self.version
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
                run.fs.get(run.path(stage, POLICY), f"{folder}/policy", recursive=True)
                try:
                    Path(folder, "policy").rename(cache)
                except OSError:  # another replica of this machine was faster
                    shutil.rmtree(Path(folder, "policy"), ignore_errors=True)
        return cache


def _check_prompts(uri: str, asked: Mapping[str, str]) -> None:
    """Raises `ArtifactError` if the policy was trained with other prompts than it would be asked with here."""
    try:
        changed = [name for name, now in prompts.hashes(asked).items() if now != asked[name]]
    except FileNotFoundError as e:
        changed = [str(e.filename)]
    if changed:
        raise ArtifactError(
            f"{uri} was made with other prompts ({', '.join(changed)} changed): serve it with the version of gubs that "
            "made it, or run `gubs filter` again"
        )


class _Rows:
    """A table, found by a column that need not be unique."""

    def __init__(self, table: pa.Table, key: str):
        order = pc.sort_indices(table, sort_keys=[(key, "ascending")])
        self._table = table.take(order).combine_chunks()
        keys = self._table[key].combine_chunks().dictionary_encode() if table.num_rows else None
        self.ids: list[str] = keys.dictionary.to_pylist() if keys is not None else []
        counts = np.bincount(keys.indices.to_numpy(), minlength=len(self.ids)) if keys is not None else np.zeros(0, int)
        ends = np.cumsum(counts)
        self._places = {name: (int(e - n), int(n)) for name, n, e in zip(self.ids, counts, ends, strict=True)}

    def of(self, name: str) -> list[JsonObject]:
        """The rows of a key, in the table's order."""
        place = self._places.get(name)
        return self._table.slice(*place).to_pylist(maps_as_pydicts="strict") if place else []


def write_config(path: str, config: FilterConfig, fs: object) -> None:
    """Writes `filter.json`."""
    fs.pipe_file(path, config.model_dump_json(indent=1).encode())  # type: ignore[attr-defined]


def content_of(policy: Path, config: FilterConfig, tables: Mapping[str, str]) -> str:
    """Identity of a filter: its policy with tokenizer and processor, what it was told, and its tables."""
    digest = hashlib.sha256()
    digest.update(config.model_dump_json().encode())
    digest.update(json.dumps(dict(sorted(tables.items()))).encode())
    for file in sorted(p for p in policy.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(policy)).encode())
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()[:16]
