"""Decodes one video file to a verdict and a few small frames at fixed times, as JPEG.

The rule for times: the decodable span, from the first frame's time to the end of the last, is divided into `count`
equal segments, and each gives the frame shown at its middle. A video with no more than `count` frames gives all of
them, the last one twice if their number is odd. If the resolution changes within a video, all frames get the size of
the first.

PyAV decodes H.264, the most common codec, after one pass that scans the packets and keeps them in memory; it skips what
no requested frame depends on (whole groups before a clean keyframe, and pictures to which no other refers). decord
decodes other codecs if it can be trusted: it seeks to a keyframe and counts frames from there, so it silently returns
wrong frames if a keyframe is not a clean entry point (open groups of pictures, intra refresh) or if packets have no
times (MPEG-TS and PS). The scan detects these; PyAV, which can check each frame's time, decodes them instead. If
anything looks damaged, or packets have times of decoding only (B-frames in AVI), PyAV decodes the file again, strictly
and from front to back: decoders give frames in the order in which they are shown, whatever their times say.
"""

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from itertools import islice, pairwise
from typing import BinaryIO, cast

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import SideData
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.file import Unfit, fd_path, opened, refuse_encrypted_matroska, refuse_text
from gubs.video.scan import (
    MATROSKA,
    MOV,
    Scan,
    container_of,
    error_count,
    packets_of,
    prepare,
    reason,
    refuse_still_picture,
    scan_packets,
    video_stream,
)

GRID = 28
"""Sides are multiples of this: Qwen2.5-VL's patch of 14, merged two by two."""

_EXACT_FORMATS = {MOV, MATROSKA, "avi"}
"""Containers with an index, in which seeks have proved exact."""

_DECORD_CODECS = {"vp8", "libvpx", "vp9", "libvpx-vp9", "mpeg4", "hevc"}
"""Codecs that decord decodes exactly. It gives wrong frames of H.263 and RPZA, and does not know newer ones."""

_SEEK_WORTH = 64
"""Number of packets to skip above which a seek pays off."""

_KEPT_BYTES = 64 << 20
"""Files up to this size are kept in memory while they are decoded."""

_MAX_PROBLEMS = 10_000
"""Errors after which decoding stops."""


Size = tuple[int, int]
"""Width, height."""

Loading = Callable[[], AbstractContextManager[None]]
"""A context in which a library is loaded."""


def decode(
    path: str, options: DecodeOptions, stderr_size: Callable[[], int] = lambda: 0, loading: Loading = nullcontext
) -> Decoded:
    """Decodes one file; never raises because of the file.

    May hang, crash or take any amount of memory, as decoders do: run it in a `DecoderProcess`.

    Args:
        path: a local path.
        options: what to take from it.
        stderr_size: bytes written to the standard error so far, the only place where decord reports errors.
        loading: entered while decord is loaded; most files do not need it.

    Returns:
        The verdict, and the frames if it is `ok` or `partial`.
    """
    try:
        with opened(path, options.max_file_mb * 2**20) as file:
            refuse_text(file)
            refuse_encrypted_matroska(file)
            return _VideoFile(file, options, stderr_size, loading).decode()
    except Unfit as e:
        return Decoded(e.verdict, e.detail)
    except OSError as e:
        return Decoded(Verdict.UNREADABLE, f"cannot be read: {e.strerror or e}")
    except MemoryError as e:
        return Decoded(Verdict.TOO_LARGE, f"out of memory: {reason(e)}")


def sample(pts: Sequence[int], end: Fraction | int, count: int) -> list[int]:
    """Indices of the frames to take, by the rule of this module.

    Args:
        pts: times of the frames in any unit, ascending.
        end: when the last frame ceases to be shown.
        count: number of frames to take, even.
    """
    n = len(pts)
    if n <= count:
        return [*range(n), *([n - 1] if n % 2 else [])]
    middles = (pts[0] + Fraction(2 * k + 1, 2 * count) * (end - pts[0]) for k in range(count))
    return [bisect_right(pts, m) - 1 for m in middles]


def _end(pts: Sequence[int], scan: Scan) -> Fraction | int:
    """When the last frame ceases to be shown; it counts as long as the average frame if the file does not tell."""
    if scan.end is not None and scan.end > pts[-1]:
        return scan.end
    step = (
        Fraction(pts[-1] - pts[0], len(pts) - 1) if len(pts) > 1 else 1 / (Fraction(scan.rate or 25) * scan.time_base)
    )
    return pts[-1] + step


def target_size(width: int, height: int, min_pixels: int, max_pixels: int) -> Size:
    """Size on the grid, within the pixel budget and near the aspect ratio of width x height.

    Follows Qwen's rule (each side rounded to the grid, both scaled if the area is out of bounds); if its rounding
    leaves the bounds, takes the allowed size with the nearest aspect ratio.
    """
    w, h = max(GRID, round(width / GRID) * GRID), max(GRID, round(height / GRID) * GRID)
    if w * h > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        w, h = (max(GRID, math.floor(side / shrink / GRID) * GRID) for side in (width, height))
    elif w * h < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * grow / GRID) * GRID for side in (width, height))
    if min_pixels <= w * h <= max_pixels:
        return w, h
    return _nearest_allowed(width, height, min_pixels, max_pixels)


def _nearest_allowed(width: int, height: int, min_pixels: int, max_pixels: int) -> Size:
    most, least = max_pixels // GRID**2, math.ceil(min_pixels / GRID**2)
    sizes = [(a, b) for a in range(1, most + 1) for b in range(1, most // a + 1)]
    allowed = [s for s in sizes if s[0] * s[1] >= least] or sizes
    a, b = min(allowed, key=lambda s: (abs(math.log(s[0] * height / (s[1] * width))), -s[0] * s[1]))
    return a * GRID, b * GRID


class _VideoFile:
    """An open file on its way to a `Decoded`."""

    def __init__(self, file: BinaryIO, options: DecodeOptions, stderr_size: Callable[[], int], loading: Loading):
        self.file, self.options, self.stderr_size, self.loading = file, options, stderr_size, loading
        self.reformatter = VideoReformatter()
        self.pixel_aspect = 1.0
        self.display_size: Size | None = None
        """Size of the first frame as players show it; it decides the size of all frames."""

    def decode(self) -> Decoded:
        """Scans, then takes the frames the fast way, or the strict way if anything is wrong."""
        with container_of(self.file) as container:
            stream = video_stream(container)
            scan = self._scan(container, stream)
            pts = sorted(p for p in scan.pts if p is not None)
            sound = scan.damage is None and scan.timed
            if sound and scan.packets is not None:
                indices = sample(pts, _end(pts, scan), self.options.count)
                times = [pts[0], *(pts[i] for i in indices)]
                images = self._frames_at(times, _needed_frames(stream, scan, times))
                return self._pack(scan, pts, indices, images, "pyav") if images else self._strictly(scan)
        if not sound or scan.first is None:
            return self._strictly(scan)
        indices = sample(pts, _end(pts, scan), self.options.count)
        cover = self._shrink(scan.first)
        images, decoder = self._with_decord(scan, indices, cover.size), "decord"
        if images is None:
            times = [pts[i] for i in indices]
            images, decoder = self._frames_at(times, _sought_frames(self.file, scan, times)), "pyav"
        if images is None:
            return self._strictly(scan)
        return self._pack(scan, pts, indices, [cover, *images], decoder)

    def _scan(self, container: InputContainer, stream: VideoStream) -> Scan:
        self._refuse_giant(stream.codec_context.width, stream.codec_context.height)
        self.pixel_aspect = float(stream.sample_aspect_ratio or 1)
        # In other formats the two fields of a picture may come in separate packets.
        exact = stream.codec_context.name == "h264" and container.format.name in _EXACT_FORMATS
        scan = scan_packets(self.file, container, stream, keep=exact and container.size <= _KEPT_BYTES)
        if not scan.pts:
            raise Unfit(Verdict.UNDECODABLE, f"0 frames of {scan.declared} ({scan.damage or 'no packets'})")
        refuse_still_picture(self.file, scan)
        if scan.first is not None:
            self._refuse_giant(scan.first.width, scan.first.height)
        return scan

    def _refuse_giant(self, width: int, height: int) -> None:
        if width * height > self.options.max_source_pixels:
            limit = self.options.max_source_pixels
            raise Unfit(Verdict.TOO_LARGE, f"pictures of {width} x {height}, the limit is {limit} pixels")

    def _frames_at(self, times: list[int], frames: Iterator[VideoFrame]) -> list[Image.Image] | None:
        """The images of the frames with exactly these times; None if one is missing or anything looks wrong."""
        images: dict[int, Image.Image] = {}
        errors = error_count()
        try:
            for frame in frames:
                if frame.is_corrupt or any(t > cast(int, frame.pts) for t in images):
                    return None
                self._refuse_giant(frame.width, frame.height)
                images[cast(int, frame.pts)] = self._shrink(frame)
        except av.FFmpegError as e:
            if isinstance(e, MemoryError):
                raise
            return None
        if error_count() != errors or not images.keys() >= set(times):
            return None
        return [images[t] for t in times]

    def _with_decord(self, scan: Scan, indices: list[int], size: Size) -> list[Image.Image] | None:
        """The frames by decord; None if it cannot be trusted, fails, or reports errors."""
        if not (scan.only_stream and scan.format in _EXACT_FORMATS and scan.clean_seeks and not scan.hidden):
            return None
        turn = _orientation(scan.first) if scan.first is not None else None
        if scan.codec not in _DECORD_CODECS or not (turn is None or (scan.format == MOV and turn in _TURNS.values())):
            return None
        with self.loading():
            import decord
        before = self.stderr_size()
        rows = sorted(set(indices))
        try:
            reader = decord.VideoReader(fd_path(self.file), width=size[0], height=size[1], num_threads=1)
            if len(reader) != len(scan.pts):
                return None
            batch = reader.get_batch(rows).asnumpy()
        except (decord.DECORDError, RuntimeError, AssertionError):  # raised if it cannot open or decode
            return None
        if self.stderr_size() != before or batch.shape[1:] != (size[1], size[0], 3):
            return None
        images = {i: Image.fromarray(frame) for i, frame in zip(rows, batch, strict=True)}
        return [images[i] for i in indices]

    def _strictly(self, scan: Scan) -> Decoded:
        """Decodes everything and takes the frames from those without damage."""
        self.display_size = None
        problems = [scan.damage] if scan.damage else []
        times = [frame.pts for frame in self._clean_frames(problems)]
        if not times:
            raise Unfit(Verdict.UNDECODABLE, f"0 frames of {self._declared(scan)} ({'; '.join(problems[:2])})")
        pts = _times_in_order(times, scan)
        if scan.raw or pts is None:
            pts, scan.time_base = list(range(len(times))), 1 / Fraction(scan.rate or 25).limit_denominator(10**6)
            scan.end = None
            scan.pts = list(pts) if scan.raw and not problems else scan.pts  # some of its packets hold no picture
        indices = sample(pts, _end(pts, scan), self.options.count)
        selected = {0, *indices}
        frames = enumerate(islice(self._clean_frames([]), max(selected) + 1))
        small = {i: self._shrink(f) for i, f in frames if i in selected}
        if len(small) != len(selected):
            raise Unfit(Verdict.UNDECODABLE, "gives different frames each time it is decoded")
        if problems and not scan.damage:
            scan.damage = problems[0]
        return self._pack(scan, pts, indices, [small[0], *(small[i] for i in indices)], "pyav")

    def _clean_frames(self, problems: list[str]) -> Iterator[VideoFrame]:
        """All frames without damage: after an error, none until the next keyframe."""
        with container_of(self.file) as container:
            stream = video_stream(container)
            prepare(stream, strict=True)
            clean_from: int | None = None
            lost = False
            packets = packets_of(container, stream)
            while True:
                try:
                    packet = next(packets)
                    if lost and packet.is_keyframe:
                        lost, clean_from = False, packet.pts
                    frames = stream.decode(packet)
                except StopIteration:
                    return
                except av.FFmpegError as e:
                    if isinstance(e, MemoryError):
                        raise
                    problems.append(reason(e))
                    lost = True
                    if len(problems) > _MAX_PROBLEMS:
                        return
                    continue
                for frame in frames:
                    clean = clean_from is None or frame.pts is None or frame.pts >= clean_from
                    if isinstance(frame, VideoFrame) and not lost and clean and not frame.is_corrupt:
                        self._refuse_giant(frame.width, frame.height)
                        yield frame

    def _shrink(self, frame: VideoFrame) -> Image.Image:
        """The frame upright, with square pixels, at the target size of the first frame."""
        turn = _orientation(frame)
        if self.display_size is None:
            self.display_size = _display_size(frame, self.pixel_aspect, turn)
        width, height = target_size(*self.display_size, self.options.min_pixels, self.options.max_pixels)
        size = (height, width) if turn in _SIDEWAYS else (width, height)
        small = self.reformatter.reformat(frame, *size, format="rgb24", interpolation="BILINEAR", threads=1)
        plane = small.planes[0]
        image = Image.frombytes("RGB", size, bytes(plane), "raw", "RGB", plane.line_size, 1)
        return image if turn is None else image.transpose(turn)

    def _pack(
        self, scan: Scan, pts: Sequence[int], indices: list[int], images: list[Image.Image], decoder: str
    ) -> Decoded:
        n, seconds = len(pts), float(scan.time_base)
        cover, *frames = images
        jpegs = {i: self._jpeg(image) for i, image in dict(zip(indices, frames, strict=True)).items()}
        assert self.display_size is not None
        declared = self._declared(scan) or n
        partial = n < declared
        return Decoded(
            Verdict.PARTIAL if partial else Verdict.OK,
            f"{n} of {declared} frames ({scan.damage or 'frames are missing'})" if partial else "",
            frames=[jpegs[i] for i in indices],
            cover=self._jpeg(cover),
            times_s=[(pts[i] - pts[0]) * seconds for i in indices],
            width=cover.width,
            height=cover.height,
            source_width=self.display_size[0],
            source_height=self.display_size[1],
            duration_s=float(_end(pts, scan) - pts[0]) * seconds,
            declared_frames=declared,
            decodable_frames=n,
            decoder=decoder,
        )

    def _declared(self, scan: Scan) -> int:
        return max(scan.declared, len(scan.pts) + scan.hidden) - scan.hidden

    def _jpeg(self, image: Image.Image) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.options.quality)
        return out.getvalue()


def _times_in_order(times: Sequence[int | None], scan: Scan) -> list[int] | None:
    """Ascending times of frames that were decoded in this order; None if they are useless.

    If they come from times of decoding, the first frame is shown at the first of these, the second at the second, and
    so on.
    """
    pts = [t for t in times if t is not None]
    if len(pts) < len(times) or len(set(pts)) < len(pts):
        return None
    dts = sorted(t for t in scan.dts if t is not None)
    decoding = scan.without_pts or any(a > b for a, b in pairwise(pts))
    if not decoding or len(set(dts)) != len(pts):
        return sorted(pts)
    scan.end = scan.end and scan.end - max(pts) + dts[-1]
    return dts


def _needed_frames(stream: VideoStream, scan: Scan, times: Sequence[int]) -> Iterator[VideoFrame]:
    """The frames with these times, decoding only what they depend on; they are the same bit for bit.

    Between two requested frames it continues from the last clean keyframe if that is nearer, and it skips pictures that
    are neither requested nor referred to.
    """
    packets, context, requested = scan.packets or [], stream.codec_context, set(times)
    keys = scan.keys if scan.clean_seeks and not scan.hidden else []

    def decoded(packet: av.Packet | None) -> Iterator[VideoFrame]:
        return (frame for frame in stream.decode(packet) if frame.pts in requested)

    start = 0
    for stop in [i for i, packet in enumerate(packets) if packet.pts in requested and not packet.is_discard]:
        key = max((k for k in keys if k <= stop), default=0)
        if key > start:
            yield from decoded(None)
            context.flush_buffers()
            start = key
        context.skip_frame = "NONREF"
        for packet in packets[start:stop]:  # none of them is requested
            yield from decoded(packet)
        context.skip_frame = "DEFAULT"
        yield from decoded(packets[stop])
        start = stop + 1
    yield from decoded(None)


def _sought_frames(file: BinaryIO, scan: Scan, times: Sequence[int]) -> Iterator[VideoFrame]:
    """The frames with these times, seeking where that saves much; frames that cannot be decoded are left out."""
    with container_of(file) as container:
        stream = video_stream(container)
        prepare(stream)
        for start, part in _parts(scan, sorted(set(times))):
            if start is not None:
                container.seek(start, stream=stream)
            for frame in (frame for packet in packets_of(container, stream) for frame in stream.decode(packet)):
                if frame.pts in part:
                    yield frame
                if frame.pts is None or frame.pts >= part[-1]:
                    break


def _parts(scan: Scan, times: Sequence[int]) -> list[tuple[int | None, list[int]]]:
    """Divides the times into parts that are decoded without a seek: (keyframe time to seek to, times)."""
    position = {p: i for i, p in enumerate(scan.pts)}
    parts: list[tuple[int | None, list[int]]] = [(None, [])]
    last = 0
    for p in times:
        before = scan.keys[: bisect_right(scan.keys, position[p])]
        key = next((k for k in reversed(before) if (scan.pts[k] or 0) <= p), 0)
        if scan.format in _EXACT_FORMATS and key - last > _SEEK_WORTH:
            parts.append((scan.pts[key], []))
        parts[-1][1].append(p)
        last = position[p]
    return [part for part in parts if part[1]]


_Turn = Image.Transpose
_TURNS = {90: _Turn.ROTATE_90, 180: _Turn.ROTATE_180, 270: _Turn.ROTATE_270}
_SIDEWAYS = {_Turn.ROTATE_90, _Turn.ROTATE_270, _Turn.TRANSPOSE, _Turn.TRANSVERSE}
_UPRIGHT: dict[tuple[bool, bool], _Turn | None] = {
    (True, True): None,
    (False, True): _Turn.FLIP_LEFT_RIGHT,
    (True, False): _Turn.FLIP_TOP_BOTTOM,
    (False, False): _Turn.ROTATE_180,
}
"""Signs of a and d of a display matrix, if it has no other entries."""
_TURNED = {
    (True, True): _Turn.TRANSPOSE,
    (True, False): _Turn.ROTATE_270,
    (False, True): _Turn.ROTATE_90,
    (False, False): _Turn.TRANSVERSE,
}
"""Signs of b and c of a display matrix, if it has no other entries."""
_SKEW = 0.02
"""Share of the other entries up to which a matrix counts as a quarter turn."""


def _display_size(frame: VideoFrame, pixel_aspect: float, turn: _Turn | None) -> Size:
    """Width and height as players show them."""
    stretch = pixel_aspect if 0.1 < pixel_aspect < 10 else 1.0
    width, height = max(1, round(frame.width * stretch)), frame.height
    return (height, width) if turn in _SIDEWAYS else (width, height)


def _orientation(frame: VideoFrame) -> _Turn | None:
    """How the frame is to be turned or mirrored; only quarter turns, as in players.

    A display matrix moves the point (x, y) to (a x + c y, b x + d y), with y downwards.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except (
        ValueError
    ):  # PyAV does not know all types of side data, such as EXIF, and refuses them all if there is another
        return _TURNS.get(frame.rotation % 360)
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(cast(SideData, matrix)), "=i4")[:5].tolist()
    if max(abs(b), abs(c)) <= _SKEW * min(abs(a), abs(d)):
        return _UPRIGHT[a > 0, d > 0]
    if max(abs(a), abs(d)) <= _SKEW * min(abs(b), abs(c)):
        return _TURNED[b > 0, c > 0]
    return None
