"""Inspects a video file before it is decoded: whether it is one, its stream, its packets, its damage.

Everything here uses PyAV, whose FFmpeg is newer than decord's and reports more: the time of each packet, encryption,
attached pictures, rotation. One pass over the packets shows whether decord's results can be trusted.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import BinaryIO

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.format import Flags
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from gubs.video.decoded import Verdict
from gubs.video.file import Unfit, fd_path, is_whole

_PLAYLISTS_AND_TEXT = {
    *("hls", "dash", "concat", "sdp", "rtsp", "rtp", "sap", "hds", "smoothstreaming", "webm_dash_manifest", "imf"),
    *("tty", "bin", "xbin", "adf", "idf", "lavfi", "rawvideo", "data", "ffmetadata", "image2", "v210", "v210x"),
    *("fbdev", "x11grab", "kmsgrab", "alsa", "oss", "video4linux2,v4l2", "vapoursynth"),
}
"""Formats that open other files or addresses, read devices, or make pictures of arbitrary bytes."""

_ALLOWED_FORMATS = ",".join(sorted(av.formats_available - _PLAYLISTS_AND_TEXT))
_ENCRYPTED_TAGS = {"encv", "drmi", "drms", "drmt"}
_JPEG, _SEVERAL, _HEADERS = b"\xff\xd8", b"MPF\0", 1 << 16
"""Start of a JPEG; mark of a photo with more pictures behind the first (stereo, HDR); bytes in which it stands."""
_STILL_BRANDS = {b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1"}
_PICTURE_FORMATS = {"gif", "apng", "mjpeg", "ico"}
"""Formats of animations whose files hold a picture if they have a single frame."""
MOV, MATROSKA = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"
av.logging.set_level(av.logging.ERROR)
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False  # its errors are read file by file instead

_END_TOLERANCE_S = 1.0
_DURATION_TAG = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")


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
        if container.format.name.endswith("_pipe"):
            raise Unfit(Verdict.UNDECODABLE, f"a picture ({container.format.name.removesuffix('_pipe')}), not a video")
        yield container


def refuse_still_picture(file: BinaryIO, scan: "Scan") -> None:
    """Refuses a file with a single frame in a format for pictures, and the several JPEGs of one photo (MPF).

    Raises:
        Unfit: undecodable.
    """
    head = os.pread(file.fileno(), 12, 0)
    may_be_still = scan.format in _PICTURE_FORMATS or (head[4:8] == b"ftyp" and head[8:] in _STILL_BRANDS)
    if may_be_still and len(scan.pts) + scan.hidden == 1:
        raise Unfit(Verdict.UNDECODABLE, f"a picture ({scan.codec}), not a video")
    if head.startswith(_JPEG) and _SEVERAL in os.pread(file.fileno(), _HEADERS, 0):
        raise Unfit(Verdict.UNDECODABLE, "a photo of several pictures (MPF), not a video")


def reason(e: BaseException) -> str:
    """FFmpeg's error message in one line, without the name under which it opened the file."""
    log = getattr(e, "log", None)
    details = f" ({log[1]}: {log[2].strip()})" if log else ""
    return (getattr(e, "strerror", None) or type(e).__name__) + details


def error_count() -> int:
    """Number of errors that FFmpeg has logged in this process."""
    return av.logging.get_last_error()[0]


def video_stream(container: InputContainer) -> VideoStream:
    """The stream that both decoders take: FFmpeg's "best" one, except for cover pictures.

    Raises:
        Unfit: there is no video stream, it is encrypted, or no decoder supports it.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({"picture" if s.type == "video" else s.type for s in container.streams})) or "nothing"
        raise Unfit(Verdict.NO_VIDEO_STREAM, f"holds {kinds}")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:
        raise Unfit(Verdict.UNDECODABLE, "no decoder for its codec")
    if stream.codec_context.codec_tag in _ENCRYPTED_TAGS:
        raise Unfit(Verdict.ENCRYPTED, f"codec tag {stream.codec_context.codec_tag}")
    return stream


def prepare(stream: VideoStream, strict: bool = False) -> None:
    """Decodes with one thread, since a decoder process has one core; `strict` makes damage an error, not a guess."""
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
    """Frames per second, if the file declares it."""
    only_stream: bool
    """Whether the file has no other video stream, not even a cover picture."""
    declared: int
    """Frames that the file declares; 0 if it declares none."""
    pts: list[int | None] = field(default_factory=list)
    """Presentation times of the packets that are shown, in decoding order."""
    dts: list[int | None] = field(default_factory=list)
    """Their times of decoding."""
    keys: list[int] = field(default_factory=list)
    """Positions of keyframes in `pts`."""
    hidden: int = 0
    """Packets that an edit list removes."""
    packets: list[av.Packet] | None = None
    """All packets of the stream in decoding order, hidden ones included, if they were kept."""
    first: VideoFrame | None = None
    """First decoded frame; None if packets are kept instead."""
    clean_seeks: bool = True
    """Whether decoding from any keyframe gives the same frames as decoding from the start."""
    damage: str | None = None
    """The first error."""
    reorders: bool = False
    """Whether the codec may show frames in another order than it decodes them."""
    raw: bool = False
    """Whether the format is a bare stream without times; those that FFmpeg makes up are not used."""
    end: int | None = None
    """When the last frame ceases to be shown; None if the file does not tell."""

    @property
    def timed(self) -> bool:
        """Whether each packet has the time at which its frame is shown, so that frames can be selected by time.

        Some formats (AVI, ASF) have only times of decoding. These ascend from packet to packet, which times of showing
        do not if frames change their order. What FFmpeg makes of them may leave a gap behind the first frame.
        """
        pts = [p for p in self.pts if p is not None]
        if not pts or self.raw or len(set(pts)) < len(self.pts):
            return False
        if not self.reorders or len(pts) == 1:
            return True
        return any(a > b for a, b in pairwise(pts)) and not (self.without_pts and self._has_gaps(pts))

    @property
    def without_pts(self) -> bool:
        """Whether the format holds times of decoding only."""
        return self.format in {"avi", "asf"}

    def _has_gaps(self, pts: list[int]) -> bool:
        dts = sorted(t for t in self.dts if t is not None)
        return len({p - d for p, d in zip(sorted(pts), dts, strict=False)}) > 1


def scan_packets(file: BinaryIO, container: InputContainer, stream: VideoStream, keep: bool = False) -> Scan:
    """Reads all packets and decodes the first frame; with `keep` it keeps the packets instead.

    Raises:
        Unfit: encrypted.
    """
    scan = _begun(container, stream, keep)
    prepare(stream)
    nal_length = _nal_length(stream.codec_context.extradata) if scan.codec == "h264" else None
    tick_s = {s.index: float(s.time_base or 0) for s in container.streams}
    key_pts, end_s = None, 0.0
    durations: list[int] = []
    errors = error_count()
    try:
        for packet in packets_of(container, *container.streams):
            end_s = max(end_s, ((packet.pts or 0) + (packet.duration or 0)) * tick_s[packet.stream.index])
            if packet.stream.index != stream.index:  # a flushing packet's `stream_index` is always 0
                continue
            if not keep and scan.first is None and scan.damage is None:
                _decode_first(scan, packet)
            if packet.size == 0:
                continue
            if packet.is_keyframe and _is_encrypted(packet):
                raise Unfit(Verdict.ENCRYPTED, "its packets are encrypted")
            if packet.is_corrupt:
                scan.damage = scan.damage or f"packet {len(scan.pts)} is cut short"
            if scan.packets is not None:
                scan.packets.append(packet)
            if packet.is_discard:
                scan.hidden += 1
                continue
            if packet.is_keyframe:
                if scan.pts and scan.codec == "h264" and not _has_idr(bytes(packet), nal_length):
                    scan.clean_seeks = False
                scan.keys.append(len(scan.pts))
                key_pts = packet.pts
            elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
                scan.clean_seeks = False  # a picture before its keyframe depends on the previous group
            scan.pts.append(packet.pts)
            scan.dts.append(packet.dts)
            durations.append(packet.duration or 0)
    except av.FFmpegError as e:
        if isinstance(e, MemoryError):
            raise
        scan.damage = scan.damage or reason(e)
    if scan.damage is None and error_count() != errors:
        scan.damage = _last_error()
    _note_shortfall(scan, file, container, stream, end_s)
    pts = [p for p in scan.pts if p is not None]
    if scan.damage is None and len(pts) == len(durations):
        scan.end = _end(np.array(pts), np.array(durations), scan, container, stream)
    return scan


def _begun(container: InputContainer, stream: VideoStream, keep: bool) -> Scan:
    """What is known before the first packet."""
    context = stream.codec_context
    return Scan(
        codec=context.name,
        format=container.format.name,
        time_base=stream.time_base or Fraction(1, 90_000),
        rate=float(stream.average_rate) if stream.average_rate else None,
        only_stream=len(container.streams.video) == 1,
        declared=stream.frames,
        packets=[] if keep else None,
        reorders=context.reorder_depth > 0,
        raw=bool(Flags(container.format.flags) & Flags.no_timestamps),
    )


def _is_encrypted(packet: av.Packet) -> bool:
    return packet.has_sidedata("encryption_info") or packet.has_sidedata("encryption_init_info")


def _last_error() -> str:
    last = av.logging.get_last_error()[1]
    return last[2].strip() if last else "FFmpeg reported an error"


def packets_of(container: InputContainer, *streams: Stream) -> Iterator[av.Packet]:
    """The packets of these streams and finally one per stream that flushes it; none of streams that appear late."""
    with suppress(IndexError):  # PyAV tries to flush the late ones, which it does not know
        yield from container.demux(*streams)


def _decode_first(scan: Scan, packet: av.Packet) -> None:
    try:
        frames = packet.decode()
    except av.FFmpegError as e:
        if isinstance(e, MemoryError):
            raise
        scan.damage = reason(e)
    else:
        scan.first = next((f for f in frames if isinstance(f, VideoFrame)), None)


def _note_shortfall(scan: Scan, file: BinaryIO, container: InputContainer, stream: VideoStream, end_s: float) -> None:
    """Compares the packets with what the header declares."""
    present = len(scan.pts) + scan.hidden
    whole = is_whole(file, scan.format)
    if scan.format == "avi" and whole:
        scan.declared = present  # an empty chunk, which shows the frame before again, is not a packet
    if scan.declared:
        missing = scan.declared - present
        if missing > 0 and scan.damage is None and not _cut_short(container, stream):
            scan.hidden += missing  # removed by an edit list
        elif missing > 0:
            scan.damage = scan.damage or f"{missing} of {scan.declared} frames are not in the file"
        return
    declared_s, start_s = (container.duration or 0) / 1e6, (container.start_time or 0) / 1e6
    lost_s = declared_s - (end_s - start_s)
    if scan.rate and present and lost_s > max(_END_TOLERANCE_S, 0.05 * declared_s) and not whole:
        scan.declared = present + round(lost_s * scan.rate)
        scan.damage = scan.damage or f"ends {lost_s:.1f} s before its {declared_s:.1f} s"


def _end(
    pts: np.ndarray, durations: np.ndarray, scan: Scan, container: InputContainer, stream: VideoStream
) -> int | None:
    """The end of the last frame by its packet's duration or by the stream's; None if neither can be believed."""
    order = np.argsort(pts)
    pts, durations = pts[order], durations[order]
    last = by_packet = int(pts[-1])
    positive = durations[:-1] > 0
    ratio = np.median(durations[:-1][positive] / np.maximum(np.diff(pts)[positive], 1)) if positive.any() else 1.0
    if ratio >= 2:  # some writers give durations in another unit, and sum them up
        return None
    if ratio > 0.5:  # else they are a default that the frames do not keep
        by_packet += int(durations[-1])
    declared = _declared_end(container, stream, scan.time_base) or 0
    end = declared if scan.format == MOV and declared > last else max(by_packet, declared)
    return end if end > last else None


def _declared_end(container: InputContainer, stream: VideoStream, time_base: Fraction) -> int | None:
    """The end of the stream by its header (after edit lists), in its time base; other streams may be longer."""
    whole = container.duration and round(Fraction(container.duration, 10**6) / time_base)
    if tag := _DURATION_TAG.fullmatch(stream.metadata.get("DURATION", "")):  # Matroska
        hours, minutes, seconds = tag.groups()
        end = round((int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)) / time_base)
        return min(end, whole or end)
    if stream.duration:
        return (stream.start_time or 0) + stream.duration
    return whole if len(container.streams) == 1 else None


def _cut_short(container: InputContainer, stream: VideoStream) -> bool:
    """False only if the file has an index that lies within it."""
    if container.format.name != "mov,mp4,m4a,3gp,3g2,mj2":
        return True
    return any(entry.pos + entry.size > container.size for entry in stream.index_entries)


def _nal_length(extradata: bytes | None) -> int | None:
    """Size of the length field before each H.264 unit; None for start codes."""
    return (extradata[4] & 3) + 1 if extradata and len(extradata) > 4 and extradata[0] == 1 else None


def _has_idr(data: bytes, length: int | None) -> bool:
    """Whether an H.264 packet holds an instantaneous refresh: nothing after it depends on anything before it."""
    if length is None:
        return False
    position = 0
    while position + length < len(data):
        if data[position + length] & 31 == 5:
            return True
        position += length + int.from_bytes(data[position : position + length], "big")
    return False
