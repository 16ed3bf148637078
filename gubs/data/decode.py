"""Decodes one video file: a verdict, and a few small frames at fixed times as JPEG.

The rule for times: the decodable span, from the first frame's time to the end of the last, is cut into `count` equal
segments, and of each the frame on show at its middle is taken. A video with no more than `count` frames gives all of
them, the last one twice if their number is odd.

H.264, which most videos are, is decoded by PyAV in the same pass that scans the packets: they stay in memory, and what
no wanted frame leans on is not decoded (whole groups before a clean keyframe, and pictures that none refers to). Other
codecs are decord's where it can be trusted. It seeks by keyframe and counts frames from there, and so returns wrong
frames without a word where a keyframe is no clean entry point (open groups of pictures, intra refresh) or where packets
have no times (MPEG-TS and PS). The scan tells; PyAV, which can check each frame's time, does the rest, and does it
again, strictly and from front to back, where anything looks damaged.
"""

import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from itertools import pairwise
from typing import BinaryIO, cast

import av
import av.logging
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from PIL import Image

from gubs.data.decoded import Decoded, DecodeOptions, Verdict
from gubs.data.video_file import Unfit, fd_path, opened, refuse_encrypted_matroska, refuse_text
from gubs.data.video_probe import Scan, container_of, packets_of, prepare, reason, scan, video_stream

GRID = 28
"""Sides are multiples of this: Qwen2.5-VL's patch of 14, merged two by two."""

_EXACT_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"}
"""Containers with an index, in which seeks were found exact."""

_SEEK_WORTH = 64
"""Packets to be skipped from which a seek is worth it."""

_KEPT_BYTES = 64 << 20
"""Files up to this size are held in memory while they are decoded."""

_MAX_PROBLEMS = 10_000
"""Errors after which a file is given up."""


Size = tuple[int, int]
"""Width, height."""


Loading = Callable[[], AbstractContextManager[None]]
"""Entered while a library is loaded."""


def decode(
    path: str, options: DecodeOptions, heard: Callable[[], int] = lambda: 0, loading: Loading = nullcontext
) -> Decoded:
    """Decodes one file; never raises for anything that is the file's fault.

    May hang, crash or take any memory, for decoders do: run it in a `DecoderProcess`.

    Args:
        path: a local path.
        options: what to take from it.
        heard: how much has been written to the standard error so far; decord's complaints are seen nowhere else.
        loading: entered while decord is loaded, which most files do without.
    """
    try:
        with opened(path, options.max_file_mb * 2**20) as file:
            refuse_text(file)
            refuse_encrypted_matroska(file)
            return _Film(file, options, heard, loading).decode()
    except Unfit as e:
        return Decoded(e.verdict, e.detail)
    except OSError as e:
        return Decoded(Verdict.UNREADABLE, f"cannot be read: {e.strerror or e}")
    except MemoryError as e:
        return Decoded(Verdict.TOO_LARGE, f"out of memory: {reason(e)}")


def sample(pts: Sequence[int], count: int) -> list[int]:
    """Indices of the frames to take, by the rule of this module.

    Args:
        pts: times of the frames in any unit, ascending.
        count: frames wanted, even.
    """
    n = len(pts)
    if n <= count:
        return [*range(n), *([n - 1] if n % 2 else [])]
    first, length = pts[0], pts[-1] - pts[0]
    middles = (first + (2 * k + 1) * length * n // (2 * count * (n - 1)) for k in range(count))
    return [bisect_right(pts, m) - 1 for m in middles]


def target_size(width: int, height: int, min_pixels: int, max_pixels: int) -> Size:
    """Size on the grid, within the pixel budget and near the aspect of width x height.

    Qwen's rule (each side rounded to the grid, both scaled if the area is out of bounds); where its rounding leaves
    the bounds, the allowed size nearest in aspect.
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


class _Film:
    """One open file on its way to a `Decoded`."""

    def __init__(self, file: BinaryIO, options: DecodeOptions, heard: Callable[[], int], loading: Loading):
        self.file, self.options, self.heard, self.loading = file, options, heard, loading
        self.reformatter = VideoReformatter()
        self.pixel_aspect = 1.0

    def decode(self) -> Decoded:
        """Scans, then takes the frames the fast way, or the strict way where anything is wrong."""
        with container_of(self.file) as container:
            stream = video_stream(container)
            found = self._scan(container, stream)
            pts = sorted(p for p in found.pts if p is not None)
            sound = found.damage is None and found.timed
            if sound and found.packets is not None:
                indices = sample(pts, self.options.count)
                images = self._from_packets(stream, found, [pts[0], *(pts[i] for i in indices)])
                return self._pack(found, pts, indices, images, "pyav") if images else self._strictly(found)
        if not sound or found.first is None:
            return self._strictly(found)
        indices = sample(pts, self.options.count)
        cover = self._shrink(found.first)
        images, decoder = self._with_decord(found, indices, cover.size), "decord"
        if images is None:
            images, decoder = self._with_pyav(found, [pts[i] for i in indices]), "pyav"
        if images is None:
            return self._strictly(found)
        return self._pack(found, pts, indices, [cover, *images], decoder)

    def _scan(self, container: InputContainer, stream: VideoStream) -> Scan:
        """Looks at the packets.

        Raises:
            Unfit: encrypted, pictures too large, not a video at all.
        """
        self._refuse_giant(stream.codec_context.width, stream.codec_context.height)
        self.pixel_aspect = float(stream.sample_aspect_ratio or 1)
        # Elsewhere than in these formats the two fields of a picture may come in packets of their own.
        exact = stream.codec_context.name == "h264" and container.format.name in _EXACT_FORMATS
        found = scan(container, stream, keep=exact and container.size <= _KEPT_BYTES)
        if not found.pts:
            raise Unfit(Verdict.UNDECODABLE, f"0 frames of {found.declared} ({found.damage or 'no packets'})")
        if found.first is not None:
            self._refuse_giant(found.first.width, found.first.height)
        return found

    def _refuse_giant(self, width: int, height: int) -> None:
        if width * height > self.options.max_source_pixels:
            limit = self.options.max_source_pixels
            raise Unfit(Verdict.TOO_LARGE, f"pictures of {width} x {height}, the limit is {limit} pixels")

    def _from_packets(self, stream: VideoStream, found: Scan, wanted: list[int]) -> list[Image.Image] | None:
        """The frames with exactly these times, ascending; None if one cannot be had or anything looks wrong."""
        images: dict[int, Image.Image] = {}
        errors = av.logging.get_last_error()[0]
        try:
            for frame in _needed_frames(stream, found, wanted):
                if frame.is_corrupt:
                    return None
                self._refuse_giant(frame.width, frame.height)
                images[cast(int, frame.pts)] = self._shrink(frame)
        except av.FFmpegError as e:
            if isinstance(e, MemoryError):
                raise
            return None
        if av.logging.get_last_error()[0] != errors:
            return None
        return [images[p] for p in wanted] if all(p in images for p in wanted) else None

    def _with_decord(self, found: Scan, indices: list[int], size: Size) -> list[Image.Image] | None:
        """The frames by decord; None where it cannot be trusted, fails, or complains."""
        if not (found.lone and found.format in _EXACT_FORMATS and found.clean_seeks and not found.hidden):
            return None
        with self.loading():
            import decord
        before = self.heard()
        wanted = sorted(set(indices))
        try:
            reader = decord.VideoReader(fd_path(self.file), width=size[0], height=size[1], num_threads=1)
            if len(reader) != len(found.pts):
                return None
            batch = reader.get_batch(wanted).asnumpy()
        except (decord.DECORDError, RuntimeError, AssertionError):  # what it raises when it cannot open or decode
            return None
        if self.heard() != before or batch.shape[1:] != (size[1], size[0], 3):
            return None
        images = {i: Image.fromarray(frame) for i, frame in zip(wanted, batch, strict=True)}
        return [images[i] for i in indices]

    def _with_pyav(self, found: Scan, wanted: list[int]) -> list[Image.Image] | None:
        """The frames with exactly these times; None if one cannot be had or anything looks wrong."""
        images: dict[int, Image.Image] = {}
        errors = av.logging.get_last_error()[0]
        with container_of(self.file) as container:
            stream = video_stream(container)
            prepare(stream)
            try:
                for frame in _frames_at(container, stream, found, sorted(set(wanted))):
                    if frame.is_corrupt:
                        return None
                    images[cast(int, frame.pts)] = self._shrink(frame)
            except av.FFmpegError as e:
                if isinstance(e, MemoryError):
                    raise
                return None
        if av.logging.get_last_error()[0] != errors:
            return None
        return [images[p] for p in wanted] if all(p in images for p in wanted) else None

    def _strictly(self, found: Scan) -> Decoded:
        """Decodes all, counts the frames without damage, and takes the frames from those."""
        problems = [found.damage] if found.damage else []
        times = [frame.pts for frame in self._clean_frames(problems)]
        if not times:
            raise Unfit(Verdict.UNDECODABLE, f"0 frames of {self._declared(found)} ({'; '.join(problems[:2])})")
        pts = [t for t in times if t is not None]
        if len(pts) < len(times) or any(a >= b for a, b in pairwise(pts)):  # no times to go by: count
            pts, found.time_base = list(range(len(times))), 1 / Fraction(found.rate or 25).limit_denominator(10**6)
        indices = sample(pts, self.options.count)
        kept = {0, *indices}
        small = {i: self._shrink(f) for i, f in _enumerate_until(self._clean_frames([]), max(kept)) if i in kept}
        if len(small) != len(kept):
            raise Unfit(Verdict.UNDECODABLE, "gives other frames each time it is decoded")
        if problems and not found.damage:
            found.damage = problems[0]
        return self._pack(found, pts, indices, [small[0], *(small[i] for i in indices)], "pyav")

    def _clean_frames(self, problems: list[str]) -> Iterator[VideoFrame]:
        """All frames without damage: after an error nothing counts until a keyframe starts afresh."""
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
                    late = clean_from is None or frame.pts is None or frame.pts >= clean_from
                    if isinstance(frame, VideoFrame) and not lost and late and not frame.is_corrupt:
                        self._refuse_giant(frame.width, frame.height)
                        yield frame

    def _shrink(self, frame: VideoFrame) -> Image.Image:
        """The frame upright, with square pixels, at the target size."""
        shown = _shown_size(frame, self.pixel_aspect)
        width, height = target_size(*shown, self.options.min_pixels, self.options.max_pixels)
        turn = _quarter_turns(frame)
        size = (height, width) if turn % 180 else (width, height)
        small = self.reformatter.reformat(frame, *size, format="rgb24", interpolation="BILINEAR", threads=1)
        plane = small.planes[0]
        image = Image.frombytes("RGB", size, bytes(plane), "raw", "RGB", plane.line_size, 1)
        if turn:
            image = image.rotate(turn, expand=True)
        image.info["shown"] = shown
        return image

    def _pack(
        self, found: Scan, pts: Sequence[int], indices: list[int], images: list[Image.Image], decoder: str
    ) -> Decoded:
        n, seconds = len(pts), float(found.time_base)
        cover, *frames = images
        encoded: dict[int, bytes] = {}
        for i, image in zip(indices, frames, strict=True):
            if i not in encoded:
                encoded[i] = self._jpeg(image)
        step = (pts[-1] - pts[0]) / (n - 1) if n > 1 else 1 / (found.rate or 25) / seconds
        declared = self._declared(found) or n
        damage = found.damage or ("frames are missing" if n < declared else "")
        return Decoded(
            Verdict.PARTIAL if damage and n < declared else Verdict.OK,
            f"{n} of {declared} frames ({damage})" if damage and n < declared else "",
            frames=[encoded[i] for i in indices],
            cover=self._jpeg(cover),
            times_s=[(pts[i] - pts[0]) * seconds for i in indices],
            width=cover.width,
            height=cover.height,
            source_width=cover.info["shown"][0],
            source_height=cover.info["shown"][1],
            duration_s=(pts[-1] - pts[0] + step) * seconds,
            declared_frames=declared,
            decodable_frames=n,
            decoder=decoder,
        )

    def _declared(self, found: Scan) -> int:
        return max(found.declared, len(found.pts) + found.hidden) - found.hidden

    def _jpeg(self, image: Image.Image) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=self.options.quality)
        return out.getvalue()


def _needed_frames(stream: VideoStream, found: Scan, wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """The frames with these times, decoding as little as gives them bit for bit.

    Between two wanted frames it goes on from the last clean keyframe, if that is nearer, and pictures that no other
    refers to are decoded only if they are wanted.
    """
    packets, context, left = found.packets or [], stream.codec_context, set(wanted)
    keys = found.keys if found.clean_seeks and not found.hidden else []
    at = 0
    for stop in [i for i, packet in enumerate(packets) if packet.pts in left and not packet.is_discard]:
        key = max((k for k in keys if k <= stop), default=0)
        if key > at:
            yield from (f for f in stream.decode(None) if f.pts in left)
            context.flush_buffers()
            at = key
        context.skip_frame = "NONREF"
        for packet in packets[at:stop]:  # those wanted are stops themselves
            yield from (f for f in stream.decode(packet) if f.pts in left)
        context.skip_frame = "DEFAULT"
        yield from (f for f in stream.decode(packets[stop]) if f.pts in left)
        at = stop + 1
    yield from (f for f in stream.decode(None) if f.pts in left)


def _frames_at(
    container: InputContainer, stream: VideoStream, found: Scan, wanted: Sequence[int]
) -> Iterator[VideoFrame]:
    """Decodes up to each wanted time, seeking where that saves much; frames that cannot be had are left out."""
    for start, times in _legs(found, wanted):
        if start is not None:
            container.seek(start, stream=stream)
        left = set(times)
        frames = (frame for packet in packets_of(container, stream) for frame in stream.decode(packet))
        for frame in frames:
            if frame.pts in left:
                yield frame
            if frame.pts is None or frame.pts >= times[-1]:
                break


def _legs(found: Scan, wanted: Sequence[int]) -> list[tuple[int | None, list[int]]]:
    """Splits wanted times into runs that are decoded in one go: (keyframe time to seek to, times)."""
    position = {p: i for i, p in enumerate(found.pts)}
    legs: list[tuple[int | None, list[int]]] = [(None, [])]
    at = 0
    for p in wanted:
        before = found.keys[: bisect_right(found.keys, position[p])]
        key = next((k for k in reversed(before) if (found.pts[k] or 0) <= p), 0)
        if found.format in _EXACT_FORMATS and key - at > _SEEK_WORTH:
            legs.append((found.pts[key], []))
        legs[-1][1].append(p)
        at = position[p]
    return [leg for leg in legs if leg[1]]


def _enumerate_until(frames: Iterator[VideoFrame], last: int) -> Iterator[tuple[int, VideoFrame]]:
    for i, frame in enumerate(frames):
        yield i, frame
        if i >= last:
            return


def _shown_size(frame: VideoFrame, pixel_aspect: float) -> Size:
    """Width and height as a player shows them."""
    stretch = pixel_aspect if 0.1 < pixel_aspect < 10 else 1.0
    width, height = max(1, round(frame.width * stretch)), frame.height
    return (height, width) if _quarter_turns(frame) % 180 else (width, height)


def _quarter_turns(frame: VideoFrame) -> int:
    """Degrees to turn the frame anticlockwise; as players do, only by quarters."""
    return frame.rotation % 360 if frame.rotation % 90 == 0 else 0
