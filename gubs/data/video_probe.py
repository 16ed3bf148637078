"""Looks at a video file before it is decoded: is it one, which stream, which packets, what is wrong with it.

Everything here reads with PyAV, whose FFmpeg is newer than decord's and tells more: the time of each packet,
encryption, attached pictures, rotation. One pass over the packets shows whether decord's answers can be trusted.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import BinaryIO

import av
import av.logging
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from gubs.data.decoded import Verdict
from gubs.data.video_file import Unfit, fd_path

_PLAYLISTS_AND_TEXT = {
    *("hls", "dash", "concat", "sdp", "rtsp", "rtp", "sap", "hds", "smoothstreaming", "webm_dash_manifest", "imf"),
    *("tty", "bin", "xbin", "adf", "idf", "lavfi", "rawvideo", "data", "ffmetadata", "image2", "v210", "v210x"),
    *("fbdev", "x11grab", "kmsgrab", "alsa", "oss", "video4linux2,v4l2", "vapoursynth"),
}
"""Formats that open other files or addresses, read devices, or make pictures of any bytes at all."""

_ALLOWED_FORMATS = ",".join(sorted(av.formats_available - _PLAYLISTS_AND_TEXT))
_ENCRYPTED_TAGS = {"encv", "drmi", "drms", "drmt"}
av.logging.set_level(av.logging.ERROR)
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False  # its complaints are asked for, file by file

_END_TOLERANCE_S = 1.0


@contextmanager
def container_of(file: BinaryIO) -> Iterator[InputContainer]:
    """Opens a video container.

    Raises:
        Unfit: undecodable, with FFmpeg's reason.
    """
    options = {"format_whitelist": _ALLOWED_FORMATS, "protocol_whitelist": "file"}
    try:
        container = av.open(fd_path(file), "r", container_options=options, metadata_errors="replace")
    except av.FFmpegError as e:
        if isinstance(e, MemoryError):
            raise
        raise Unfit(Verdict.UNDECODABLE, reason(e)) from None
    with container:
        yield container


def reason(e: BaseException) -> str:
    """FFmpeg's complaint in one line, without the name it knew the file by."""
    log = getattr(e, "log", None)
    said = f"{log[1]}: {log[2].strip()}" if log else ""
    return " ".join(filter(None, [getattr(e, "strerror", None) or type(e).__name__, f"({said})" if said else ""]))


def video_stream(container: InputContainer) -> VideoStream:
    """The stream both decoders would take: FFmpeg's "best" one, cover pictures left aside.

    Raises:
        Unfit: no video stream, an encrypted one, or one no decoder knows.
    """
    films = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not films:
        kinds = ", ".join(sorted({"picture" if s.type == "video" else s.type for s in container.streams})) or "nothing"
        raise Unfit(Verdict.NO_VIDEO_STREAM, f"holds {kinds}")
    best = container.streams.best("video")
    stream = next((s for s in films if best is not None and s.index == best.index), films[0])
    if stream.codec_context is None:
        raise Unfit(Verdict.UNDECODABLE, "no decoder for its codec")
    if stream.codec_context.codec_tag in _ENCRYPTED_TAGS:
        raise Unfit(Verdict.ENCRYPTED, f"codec tag {stream.codec_context.codec_tag}")
    return stream


def prepare(stream: VideoStream, strict: bool = False) -> None:
    """One thread, so that a decoder process takes one core; `strict` makes damage an error instead of a guess."""
    context = stream.codec_context
    context.thread_count = 1
    context.thread_type = "NONE"
    if strict:
        context.options = {"err_detect": "explode"}


@dataclass
class Scan:
    """What one pass over the packets found."""

    codec: str
    format: str
    time_base: Fraction
    rate: float | None
    """Frames a second, if the file says."""
    lone: bool
    """It is the only video stream, cover pictures counted."""
    declared: int
    """Frames the file says it has; 0 where it does not say."""
    pts: list[int | None] = field(default_factory=list)
    """Presentation time of each packet that is to be shown, in decoding order."""
    keys: list[int] = field(default_factory=list)
    """Positions of keyframes in `pts`."""
    hidden: int = 0
    """Packets that an edit list cuts away."""
    packets: list[av.Packet] | None = None
    """All packets of the stream in decoding order, those cut away too, where they were kept."""
    first: VideoFrame | None = None
    """First decoded frame; not decoded where packets are kept."""
    clean_seeks: bool = True
    """Decoding from any keyframe gives the same frames as decoding from the start."""
    damage: str | None = None
    """First thing that went wrong."""

    @property
    def timed(self) -> bool:
        """Every packet has a time of its own, so frames can be picked by it."""
        return bool(self.pts) and None not in self.pts and len(set(self.pts)) == len(self.pts)


def scan(container: InputContainer, stream: VideoStream, keep: bool = False) -> Scan:
    """Reads all packets and decodes the first frame, or with `keep` keeps the packets instead.

    Raises:
        Unfit: encrypted.
    """
    context = stream.codec_context
    found = Scan(
        codec=context.name,
        format=container.format.name,
        time_base=stream.time_base or Fraction(1, 90_000),
        rate=float(stream.average_rate) if stream.average_rate else None,
        lone=len(container.streams.video) == 1,
        declared=stream.frames,
        packets=[] if keep else None,
    )
    prepare(stream)
    nal_length = _nal_length(context.extradata) if found.codec == "h264" else None
    tick_s = {s.index: float(s.time_base or 0) for s in container.streams}
    key_pts, end_s = None, 0.0
    errors = av.logging.get_last_error()[0]
    try:
        for packet in packets_of(container, *container.streams):
            end_s = max(end_s, ((packet.pts or 0) + (packet.duration or 0)) * tick_s[packet.stream.index])
            if packet.stream.index != stream.index:  # a flushing packet's own stream_index is always 0
                continue
            if not keep and found.first is None and found.damage is None:
                _decode_first(found, packet)
            if packet.size == 0:
                continue
            if packet.is_keyframe and _encrypted(packet):
                raise Unfit(Verdict.ENCRYPTED, "its packets are encrypted")
            if packet.is_corrupt:
                found.damage = found.damage or f"packet {len(found.pts)} is cut short"
            if found.packets is not None:
                found.packets.append(packet)
            if packet.is_discard:
                found.hidden += 1
                continue
            if packet.is_keyframe:
                if found.pts and found.codec == "h264" and not _has_idr(bytes(packet), nal_length):
                    found.clean_seeks = False
                found.keys.append(len(found.pts))
                key_pts = packet.pts
            elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
                found.clean_seeks = False  # a picture before its keyframe leans on the group before
            found.pts.append(packet.pts)
    except av.FFmpegError as e:
        if isinstance(e, MemoryError):
            raise
        found.damage = found.damage or reason(e)
    if found.damage is None and av.logging.get_last_error()[0] != errors:
        found.damage = _last_complaint()
    _note_shortfall(found, container, stream, end_s)
    return found


def packets_of(container: InputContainer, *streams: Stream) -> Iterator[av.Packet]:
    """The packets of these streams and, last, one that flushes each; of streams that turn up late nothing."""
    try:
        yield from container.demux(*streams)
    except IndexError:  # PyAV goes on to flush the late ones, which it does not know
        return


def _encrypted(packet: av.Packet) -> bool:
    return packet.has_sidedata("encryption_info") or packet.has_sidedata("encryption_init_info")


def _decode_first(found: Scan, packet: av.Packet) -> None:
    try:
        frames = packet.decode()
    except av.FFmpegError as e:
        if isinstance(e, MemoryError):
            raise
        found.damage = reason(e)
    else:
        found.first = next((f for f in frames if isinstance(f, VideoFrame)), None)


def _note_shortfall(found: Scan, container: InputContainer, stream: VideoStream, end_s: float) -> None:
    """Compares what is there with what the header promises."""
    present = len(found.pts) + found.hidden
    if found.declared:
        missing = found.declared - present
        if missing > 0 and found.damage is None and not _cut_short(container, stream):
            found.hidden += missing  # left out by an edit list
        elif missing > 0:
            found.damage = found.damage or f"{missing} of {found.declared} frames are not in the file"
        return
    promised_s = (container.duration or 0) / 1e6
    start_s = (container.start_time or 0) / 1e6
    lost_s = promised_s - (end_s - start_s)
    if found.rate and present and lost_s > max(_END_TOLERANCE_S, 0.05 * promised_s):
        found.declared = present + round(lost_s * found.rate)
        found.damage = found.damage or f"ends {lost_s:.1f} s before its {promised_s:.1f} s"


def _cut_short(container: InputContainer, stream: VideoStream) -> bool:
    """True unless the index, where there is one, lies within the file."""
    if container.format.name != "mov,mp4,m4a,3gp,3g2,mj2":
        return True
    return any(entry.pos + entry.size > container.size for entry in stream.index_entries)


def _last_complaint() -> str:
    last = av.logging.get_last_error()[1]
    return last[2].strip() if last else "FFmpeg reported an error"


def _nal_length(extradata: bytes | None) -> int | None:
    """Size of the length field before each H.264 unit; None for start codes."""
    return (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else None


def _has_idr(data: bytes, length: int | None) -> bool:
    """True if an H.264 packet holds an instantaneous refresh: nothing after it leans on anything before it."""
    if length is None:
        return False
    at = 0
    while at + length < len(data):
        if data[at + length] & 31 == 5:
            return True
        at += length + int.from_bytes(data[at : at + length], "big")
    return False
