"""A run's own words: what the `tiny` model is taught to read where a log is not the simulated app's.

Only fields are taken, and only of training users: facts about them, their interest tags, and titles, lengths and tags
of videos in their records. What anybody did with a video stays out; lessons invent that.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Run
from gubs.data.ifvr import IFVR
from gubs.errors import ArtifactError
from gubs.prompts import digest
from gubs.records import Split, Task, User, Video

_USERS, _VIDEOS, _TAGS = 400, 1500, 400
"""Most users, videos and tags that lessons draw from."""
_SEED = 20_261_127


@dataclass(frozen=True)
class Vocabulary:
    """Words of a run."""

    users: tuple[User, ...]
    """Training users, with their facts and listed interest tags."""
    videos: tuple[Video, ...]
    """Videos in their records."""
    tags: tuple[str, ...]
    """Topic tags of these videos, most frequent first."""
    measures: tuple[tuple[Task, str], ...]
    """How views of each task went: skips, likes or clicks (`gubs.prompts.digest`)."""

    @classmethod
    def of(cls, run: Run) -> "Vocabulary":
        """Reads it from a run's data set; the same run gives the same.

        Raises:
            ArtifactError: the run has no data set, or that has no training user.
        """
        ifvr, rng = IFVR(run), np.random.default_rng(_SEED)
        users = sorted({u for task in Task for u in ifvr.split_users(task, Split.TRAIN)})
        if not users:
            raise ArtifactError(f"{ifvr.uri} has no training user whose words could be read")
        log = ifvr.log(["user_id", "video_id", "task", "rating", "clicked", "play_rate"])
        log = log.filter(pc.is_in(log["user_id"], value_set=pa.array(users, pa.string())))
        shown = sorted(v for v in pc.unique(log["video_id"]).to_pylist() if v in ifvr.videos)
        tags = Counter(tag for v in shown for tag in ifvr.videos[v].tags)
        return cls(
            tuple(ifvr.users[u] for u in _draw(users, _USERS, rng)),
            tuple(ifvr.videos[v] for v in _draw(shown, _VIDEOS, rng)),
            tuple(tag for tag, _ in tags.most_common(_TAGS)),
            tuple((task, _measure(log.filter(pc.equal(log["task"], str(task))))) for task in _tasks(log)),
        )

    @cached_property
    def identity(self) -> str:
        """Hash of all words."""
        return hashlib.sha256(repr((self.users, self.videos, self.tags, self.measures)).encode()).hexdigest()[:12]

    @property
    def names(self) -> tuple[str, ...]:
        """The tags that a tokenizer keeps in one piece: those of several videos."""
        counts = Counter(tag for v in self.videos for tag in v.tags)
        return tuple(tag for tag in self.tags if counts[tag] > 1)

    @property
    def interests(self) -> tuple[str, ...]:
        """The tags that users list as interests; if nobody lists any, those of several videos."""
        listed = Counter(tag for user in self.users for tag in user.tags)
        return tuple(tag for tag, _ in listed.most_common()) or self.names or self.tags

    def texts(self) -> Iterator[str]:
        """The words alone, for the tokenizer."""
        yield from (f" {word}" for word in digest.words())
        yield from (f'"{tag}"' for tag in self.tags)
        yield from (f'"{video.title}"' for video in self.videos if video.title)


def _draw(names: list[str], count: int, rng: np.random.Generator) -> list[str]:
    return sorted(names[i] for i in rng.permutation(len(names))[:count])


def _tasks(log: pa.Table) -> list[Task]:
    present = set(pc.unique(log["task"]).to_pylist())
    return [task for task in Task if str(task) in present]


def _measure(log: pa.Table) -> str:
    """What the log knows of a task's views."""
    columns = {digest.LIKES: "rating", digest.CLICKS: "clicked", digest.SKIPS: "play_rate"}
    return next((name for name, column in columns.items() if log[column].null_count < log.num_rows), digest.SKIPS)
