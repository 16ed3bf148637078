"""The result of decoding a video, shared by the decoder, the store and the stage. Imports no decoder."""

from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from gubs.video.settings import FrameSettings

DECODER_VERSION = 3
"""Raise it when the same settings give other pixels than before."""


class Verdict(StrEnum):
    """The outcome of decoding a video file."""

    OK = "ok"
    PARTIAL = "partial"
    """Some frames are missing or damaged; the stored frames come from the others."""
    NO_VIDEO_STREAM = "no_video_stream"
    """Only sound, subtitles or data; also sound with a cover picture."""
    ENCRYPTED = "encrypted"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    """The file, its pictures, or the memory to decode them exceed the limit."""
    UNDECODABLE = "undecodable"
    """Not a video, or one without a single decodable frame."""
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    """The decoder process died."""
    MISSING = "missing"
    UNREADABLE = "unreadable"
    """A folder, a pipe, a device, or no permission."""


USABLE = frozenset({Verdict.OK, Verdict.PARTIAL})
"""Verdicts with frames."""

RETRYABLE = frozenset({Verdict.TIMEOUT, Verdict.CRASHED, Verdict.TOO_LARGE})
"""Verdicts that may be due to the machine or the limits rather than the file."""


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """The part of `FrameSettings` that decides the result."""

    count: int = 8
    max_pixels: int = 128 * 28 * 28
    min_pixels: int = 4 * 28 * 28
    quality: int = 92
    max_file_mb: float = 2048.0
    max_source_pixels: int = 8192 * 8192

    @classmethod
    def of(cls, settings: "FrameSettings") -> Self:
        """Takes the options from the settings."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


@dataclass(slots=True)
class Decoded:
    """The result for one file. Only the verdicts `ok` and `partial` come with frames."""

    verdict: Verdict
    detail: str = ""
    frames: list[bytes] = field(default_factory=list)
    """JPEG, even in number, in the order of `times_s`."""
    cover: bytes | None = None
    """JPEG of the first decodable frame."""
    times_s: list[float] = field(default_factory=list)
    """When each frame is shown first, in seconds after the first decodable frame."""
    width: int | None = None
    height: int | None = None
    """Size of the frames and the cover."""
    source_width: int | None = None
    source_height: int | None = None
    """Size of the video as players show it: rotated, with square pixels."""
    duration_s: float | None = None
    """Length of the decodable span."""
    declared_frames: int | None = None
    decodable_frames: int | None = None
    decoder: str | None = None
    """decord or pyav."""
