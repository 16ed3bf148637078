"""Makes small videos of numbered frames: each frame shows its number as bright bars."""

import io
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
    first: int = 0,
) -> Path:
    """Writes a video of numbered frames, starting with the number `first`."""
    with av.open(str(path), "w", format=container, container_options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, pix_fmt, gop
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + i, *size), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, fps)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


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
