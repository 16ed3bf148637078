"""Clips: the stored frames of a video as a model gets them, read from the frame store and cached."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from gubs.artifacts import Run
from gubs.video.decoded import DecodeOptions
from gubs.video.frame_store import FrameStore
from gubs.video.settings import FrameSettings

STAGE = "frames"
_CACHE_BYTES = 256 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """Pictures of a video (an even number of frames) or a single image (a cover)."""

    key: str
    """Content hash: equal keys mean equal pictures."""
    frames: npt.NDArray[np.uint8]
    """(frames, height, width, 3), RGB; multiples of 28 pixels."""
    seconds: float = 0.0
    """Duration that the frames span; 0 for an image."""

    @property
    def kind(self) -> Literal["image", "video"]:
        """`image` if there is a single picture."""
        return "image" if len(self.frames) == 1 else "video"

    def jpegs(self) -> list[bytes]:
        """The pictures as JPEG files, for people to look at."""
        from PIL import Image

        buffers = [io.BytesIO() for _ in self.frames]
        for frame, buffer in zip(self.frames, buffers, strict=True):
            Image.fromarray(frame).save(buffer, "JPEG", quality=85)
        return [b.getvalue() for b in buffers]


class ByteCache(Generic[T]):
    """Keeps the most recently used values up to a total size in bytes; thread-safe."""

    def __init__(self, limit: int, size_of: Callable[[T], int]):
        self._limit, self._size_of, self._size = limit, size_of, 0
        self._values: OrderedDict[str, T] = OrderedDict()
        self._lock = threading.Lock()

    def peek(self, key: str) -> T | None:
        """The value of a key; None if it is not cached."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key]

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of a key; made if it is not cached."""
        if (cached := self.peek(key)) is not None:
            return cached
        value = make()
        with self._lock:
            if key not in self._values:  # otherwise another thread was faster
                self._values[key] = value
                self._size += self._size_of(value)
            while self._size > self._limit and len(self._values) > 1:
                self._size -= self._size_of(self._values.popitem(last=False)[1])
        return value


class StoredFrames:
    """The frames and covers that the stage `frames` stored for the videos of a run."""

    def __init__(self, hashes: Mapping[str, str], store: FrameStore | None):
        """Reads nothing yet.

        Args:
            hashes: content hash of each video that has frames, by video id.
            store: where they are; None only without hashes.
        """
        self.hashes, self._store = hashes, store
        self._clips = ByteCache[Clip](_CACHE_BYTES, lambda clip: clip.frames.nbytes)

    @classmethod
    def of(cls, run: Run) -> Self:
        """Those of a run; none if it has no stage `frames`."""
        if not run.has(STAGE):
            return cls({}, None)
        artifact = run.artifact(STAGE)
        table = artifact.table("frames", ["video_id", "content_hash", "frames"])
        table = table.filter(pc.greater(pc.fill_null(table["frames"], 0), 0))
        hashes = dict(zip(table["video_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))
        options = DecodeOptions.of(FrameSettings(**artifact.manifest.settings["frames"]))
        return cls(hashes, FrameStore(artifact.manifest.info["store_uri"], options))

    @property
    def store(self) -> FrameStore:
        """The store."""
        assert self._store is not None
        return self._store

    def clip(self, video_id: str) -> Clip | None:
        """The video's frames; None if it has none."""
        return self._cached(video_id, cover=False)

    def cover(self, video_id: str) -> Clip | None:
        """The video's cover as a single image; None if it has none."""
        return self._cached(video_id, cover=True)

    def in_memory(self, video_id: str, *, cover: bool) -> Clip | None:
        """The video's frames, or its cover, if they were read before and are kept; never waits for a disk."""
        content_hash = self.hashes.get(video_id)
        return self._clips.peek(_key(content_hash, cover=cover)) if content_hash else None

    def _cached(self, video_id: str, *, cover: bool) -> Clip | None:
        content_hash = self.hashes.get(video_id)
        if content_hash is None:
            return None
        key = _key(content_hash, cover=cover)

        def load() -> Clip:
            columns = ["cover"] if cover else ["frames", "duration_s"]
            row = self.store.lookup([content_hash], columns).to_pylist()[0]
            return Clip(key, _pixels([row["cover"]] if cover else row["frames"]), row.get("duration_s") or 0.0)

        return self._clips.get(key, load)


def _key(content_hash: str, *, cover: bool) -> str:
    return f"{content_hash}-cover" if cover else content_hash


def _pixels(pictures: list[bytes]) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return np.stack([np.asarray(Image.open(io.BytesIO(p)).convert("RGB")) for p in pictures])
