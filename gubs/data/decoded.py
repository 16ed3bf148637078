"""What decoding a video gives: the words shared by the decoder, the store and the stage. Imports no decoder."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from gubs.config import FrameSettings

DECODER_VERSION = 2
"""To be raised when the same settings come to give other pixels."""


class Verdict(StrEnum):
    """What became of a video file."""

    OK = "ok"
    PARTIAL = "partial"
    """Some frames are missing or damaged; the frames kept come from what is left."""
    NO_VIDEO_STREAM = "no_video_stream"
    """Sound, subtitles or data only; also sound with a cover picture."""
    ENCRYPTED = "encrypted"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    """The file, its pictures, or the memory to decode them are over the limit."""
    UNDECODABLE = "undecodable"
    """Not a video, or one of which no frame can be had."""
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    """The decoder process died of it."""
    MISSING = "missing"
    UNREADABLE = "unreadable"
    """A folder, a pipe, a device, or no permission."""


USABLE = frozenset({Verdict.OK, Verdict.PARTIAL})
"""Verdicts that come with frames."""

RETRYABLE = frozenset({Verdict.TIMEOUT, Verdict.CRASHED, Verdict.TOO_LARGE})
"""Verdicts that may be the machine's or the limits' fault rather than the file's."""


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """The part of `FrameSettings` that decides what comes out."""

    count: int = 8
    max_pixels: int = 128 * 28 * 28
    min_pixels: int = 4 * 28 * 28
    quality: int = 92
    max_file_mb: float = 2048.0
    max_source_pixels: int = 8192 * 8192

    @classmethod
    def of(cls, settings: "FrameSettings") -> Self:
        """Takes what matters here from the settings."""
        return cls(
            count=settings.count,
            max_pixels=settings.max_pixels,
            min_pixels=settings.min_pixels,
            quality=settings.quality,
            max_file_mb=settings.max_file_mb,
            max_source_pixels=settings.max_source_pixels,
        )


@dataclass(slots=True)
class Decoded:
    """What became of a file. Frames only with the verdicts `ok` and `partial`."""

    verdict: Verdict
    detail: str = ""
    frames: list[bytes] = field(default_factory=list)
    """JPEG, even in number, in the order of `times_s`."""
    cover: bytes | None = None
    """JPEG of the first decodable frame."""
    times_s: list[float] = field(default_factory=list)
    """When each frame comes on show, in seconds after the first decodable frame."""
    width: int | None = None
    height: int | None = None
    """Size of frames and cover."""
    source_width: int | None = None
    source_height: int | None = None
    """Size as shown: rotated, with square pixels."""
    duration_s: float | None = None
    """Length of the decodable span."""
    declared_frames: int | None = None
    decodable_frames: int | None = None
    decoder: str | None = None
    """decord or pyav."""
