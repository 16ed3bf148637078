"""Makes small videos of numbered frames: each frame shows its number as bright bars."""

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def picture(i: int, width: int = 160, height: int = 96) -> np.ndarray:
    """A frame with a moving pattern and its number in its lower half."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([(x + 3 * i) % 256, (2 * y + i) % 256, (x + y + 5 * i) % 256], -1).astype(np.uint8) // 2
    for bit in range(BITS):
        image[height // 2 :, bit * width // BITS : (bit + 1) * width // BITS] = 255 if i >> bit & 1 else 0
    return image


def frame_number(jpeg: bytes) -> int:
    """The number that a frame shows."""
    image = np.asarray(Image.open(io.BytesIO(jpeg)))
    h, w = image.shape[:2]
    lights = [
        image[3 * h // 4 :, int((b + 0.3) * w / BITS) : int((b + 0.7) * w / BITS)].mean() > 128 for b in range(BITS)
    ]
    return sum(1 << b for b, lit in enumerate(lights) if lit)


def make_video(
    path: Path,
    codec: str = "libx264",
    frames: int = 48,
    *,
    fps: int = 24,
    pix_fmt: str = "yuv420p",
    size: tuple[int, int] = (160, 96),
    pts: Sequence[int] | None = None,
    gop: int = 12,
    options: dict[str, str] | None = None,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    rotation: int = 0,
    matrix: Sequence[int] = (),
    last: int = 1,
    b_frames: int = 0,
    first: int = 0,
) -> Path:
    """Writes a video of numbered frames, starting with the number `first`; the last is shown for `last` frames."""
    with av.open(str(path), "w", format=container, container_options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
        stream.codec_context.thread_count = (
            1  # on a busy machine, libvpx's VP8 was seen to wait for its threads forever
        )
        if rotation:
            stream.set_display_rotation(rotation)
        if matrix:
            stream.set_display_matrix(matrix)
        if b_frames:
            stream.codec_context.max_b_frames = b_frames
        packets = []
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + i, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, fps)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last > 1:
            max(packets, key=lambda p: p.pts).duration = last
        for packet in packets:
            out.mux(packet)
    return path


def make_changing_video(
    path: Path, codec: str, sizes: Sequence[tuple[int, int]], frames: int = 24, options: dict[str, str] | None = None
) -> Path:
    """Writes numbered frames in one stream whose pictures change their size: as many `frames` of each size."""
    tick, packets = Fraction(1, 25), []
    for part, size in enumerate(sizes):
        encoder = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.pix_fmt = *size, "yuv420p"
        encoder.time_base, encoder.framerate, encoder.gop_size = tick, 25, 12
        encoder.options = dict(options or {})
        for i in range(part * frames, (part + 1) * frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, tick
            packets += encoder.encode(frame)
        packets += encoder.encode(None)
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=dict(options or {}))
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for packet in packets:
            packet.stream, packet.time_base = stream, tick
            out.mux(packet)
    return path


def set_edits(path: Path, edits: Sequence[tuple[int, int]]) -> Path:
    """Gives the only track of an .mp4 file this edit list: duration in milliseconds, start in the track's ticks."""
    data = bytearray(path.read_bytes())
    moov = _box(data, 0, len(data), b"moov")
    assert moov.stop == len(data), "the index must come last, or its size would move the pictures"
    trak = _box(data, moov.start + 8, moov.stop, b"trak")
    old = _box(data, trak.start + 8, trak.stop, b"edts")
    entries = b"".join(struct.pack(">IiHH", *edit, 1, 0) for edit in edits)
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    data[old.start : old.stop] = edts
    for box in (trak, moov):
        data[box.start : box.start + 4] = struct.pack(">I", len(box) + len(edts) - len(old))
    path.write_bytes(data)
    return path


def _box(data: bytearray, start: int, stop: int, name: bytes) -> range:
    while start < stop:
        size = int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] == name:
            return range(start, start + size)
        start += size
    raise AssertionError(f"no box {name!r}")


def make_sound(path: Path, cover: bool = False) -> Path:
    """Writes one second of sound, with a cover picture if `cover` is set."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mp3" if path.suffix == ".mp3" else "aac", rate=44100)
        art = None
        if cover:
            art = out.add_stream("png", rate=1)
            art.width, art.height, art.pix_fmt = 32, 32, "rgb24"
            art.disposition = av.stream.Disposition.attached_pic
        for _ in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 44100
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if art is not None:
            out.mux(art.encode(av.VideoFrame.from_ndarray(picture(1, 32, 32), format="rgb24")))
            out.mux(art.encode(None))
    return path
