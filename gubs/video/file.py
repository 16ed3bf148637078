"""Checks of a video file that need no decoder: is it readable, too large, plain text, encrypted?"""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from gubs.video.decoded import Verdict

_TEXT_PROBE = 1024


class Unfit(Exception):  # noqa: N818 - a verdict, not an error of ours
    """Ends the decoding of a file with a verdict."""

    def __init__(self, verdict: Verdict, detail: str):
        super().__init__(detail)
        self.verdict, self.detail = verdict, detail


@contextmanager
def opened(path: str, max_bytes: float = float("inf")) -> Iterator[io.BufferedReader]:
    """Opens a regular file without blocking on pipes.

    Raises:
        Unfit: missing, unreadable, empty, or too large.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise Unfit(Verdict.MISSING, "there is no such file") from None
    except (OSError, ValueError) as e:
        raise Unfit(Verdict.UNREADABLE, f"cannot be opened: {getattr(e, 'strerror', None) or e}") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise Unfit(Verdict.UNREADABLE, "not a regular file")
    with os.fdopen(fd, "rb") as f:
        if status.st_size == 0:
            raise Unfit(Verdict.EMPTY, "zero bytes")
        if status.st_size > max_bytes:
            raise Unfit(Verdict.TOO_LARGE, f"{status.st_size / 2**20:.0f} MiB, the limit is {max_bytes / 2**20:.0f}")
        yield f


def refuse_text(file: BinaryIO) -> None:
    """Refuses plain text, which FFmpeg might mistake for a playlist that names other files.

    Raises:
        Unfit: undecodable.
    """
    head = os.pread(file.fileno(), _TEXT_PROBE, 0)
    if head.startswith(b"YUV4MPEG2") or any(b < 32 and b not in b"\t\n\r\f\x1b" for b in head):
        return
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as e:
        if e.start < len(head) - 3:  # otherwise only the last character was cut off
            return
    raise Unfit(Verdict.UNDECODABLE, "plain text, not a video")


def fd_path(file: BinaryIO) -> str:
    """A name for an open file from which a decoder can infer nothing, whatever the file is called."""
    return f"/proc/self/fd/{file.fileno()}"


_SEGMENT, _TRACKS, _TRACK, _TRACK_TYPE = 0x18538067, 0x1654AE6B, 0xAE, 0x83
_ENCODINGS, _ENCODING, _ENCRYPTION = 0x6D80, 0x6240, 0x5035
_EBML_HEAD = 1 << 20
_Span = tuple[int, int]


def refuse_encrypted_matroska(file: BinaryIO) -> None:
    """Refuses WebM and Matroska whose video is encrypted, which FFmpeg does not report.

    Raises:
        Unfit: encrypted.
    """
    data = os.pread(file.fileno(), _EBML_HEAD, 0)
    if data[:4] != b"\x1aE\xdf\xa3":
        return
    for track in _elements(data, (0, len(data)), _SEGMENT, _TRACKS, _TRACK):
        video = any(data[a:b].endswith(b"\x01") for a, b in _elements(data, track, _TRACK_TYPE))
        if video and any(_elements(data, track, _ENCODINGS, _ENCODING, _ENCRYPTION)):
            raise Unfit(Verdict.ENCRYPTED, "its video track has ContentEncryption")


def is_whole(file: BinaryIO, container: str) -> bool:
    """Whether a file is as long as its container says; false if that is not known.

    Args:
        file: the file.
        container: FFmpeg's name of its format.
    """
    check = {"matroska,webm": _is_whole_matroska, "avi": _is_whole_riff, "flv": _is_whole_flv, "asf": _is_whole_asf}
    return container in check and check[container](file.fileno(), os.fstat(file.fileno()).st_size)


def _is_whole_riff(fd: int, size: int) -> bool:
    end = 0
    while end < size and os.pread(fd, 4, end) == b"RIFF":
        length = int.from_bytes(os.pread(fd, 4, end + 4), "little")
        if not length:  # its writer was stopped
            return False
        end += 8 + length
    return 0 < end <= size


def _is_whole_flv(fd: int, size: int) -> bool:
    """Whether the file ends with a whole tag, behind which its length is repeated."""
    length = int.from_bytes(os.pread(fd, 4, size - 4), "big")
    if not 11 < length < size - 4:
        return False
    return int.from_bytes(os.pread(fd, 3, size - 4 - length + 1), "big") + 11 == length


_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def _is_whole_asf(fd: int, size: int) -> bool:
    head = os.pread(fd, 1 << 16, 0)
    at = head.find(_ASF_FILE_PROPERTIES)
    return at >= 0 and 0 < int.from_bytes(head[at + 40 : at + 48], "little") <= size


def _is_whole_matroska(fd: int, file_size: int) -> bool:
    """Whether the file holds all of its first segment."""
    data = os.pread(fd, _EBML_HEAD, 0)
    position = 0
    for _ in range(2):  # the header, then the segment
        ident, start = _ebml_number(data, position, keep_marker=True)
        size, start = _ebml_number(data, start, keep_marker=False)
        position = start + size
    return ident == _SEGMENT and size != len(data) and position <= file_size


def _elements(data: bytes, span: _Span, *path: int) -> Iterator[_Span]:
    """Spans of the elements inside data[span] that have this path of element ids."""
    start, end = span
    while start < end:
        ident, start = _ebml_number(data, start, keep_marker=True)
        size, start = _ebml_number(data, start, keep_marker=False)
        stop = min(end, start + size)
        if ident == path[0]:
            if len(path) == 1:
                yield start, stop
            else:
                yield from _elements(data, (start, stop), *path[1:])
        start = stop


def _ebml_number(data: bytes, start: int, keep_marker: bool) -> tuple[int, int]:
    """A variable-length number and its end; the end is beyond the data if it is not a number."""
    length = 9 - data[start].bit_length() if start < len(data) else 9
    if length > 8:
        return 0, len(data) + 1
    value, end = int.from_bytes(data[start : start + length], "big"), start + length
    if keep_marker:
        return value, end
    unknown = (1 << (7 * length)) - 1
    value &= unknown
    return (len(data) if value == unknown else value), end
