"""Renders the simulated app's videos: H.264 files in which topic and flaw can be seen.

The topic is the background colour (eight hues) and the moving shape (circle, square, triangle). Flaws are drawn on top:
a crawling centipede on blood-red blotches (unpleasant), a jagged black speech bubble (vulgar), a red arrow in a yellow
frame (clickbait). So the title alone does not tell what a clickbait video really shows, or that a picture is
unpleasant. The same settings and scene give the same pixels.
"""

import colorsys
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from gubs.simulator.settings import RenderSettings

HUES = 8
_SHAPES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class Scene:
    """The content of a video."""

    video_id: str
    topic: int
    flaw: str
    seconds: float
    seed: int


def render(scene: Scene, settings: RenderSettings) -> bytes:
    """Renders a scene as an MP4 file (H.264, yuv420p)."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=settings.fps)
        stream.width = stream.height = settings.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20"}
        stream.codec_context.thread_count = 1
        for image in frames(scene, settings):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


def frames(scene: Scene, settings: RenderSettings) -> Iterator[Image.Image]:
    """Draws the frames of a scene, `fps` per second."""
    rng = np.random.default_rng(scene.seed)
    phase, speed, scale, light = rng.random(), rng.uniform(0.3, 0.7), rng.uniform(0.24, 0.34), rng.uniform(0.65, 0.85)
    hue = scene.topic % HUES / HUES
    background = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75, light))
    count = max(2, round(scene.seconds * settings.fps))
    for i in range(count):
        image = Image.new("RGB", (settings.size, settings.size), background)
        draw = ImageDraw.Draw(image)
        turn = phase + speed * i / settings.fps
        _draw_shape(draw, _SHAPES[scene.topic // HUES % len(_SHAPES)], turn, scale, settings.size)
        if scene.flaw != "none":
            _FLAW_DRAWINGS[scene.flaw](draw, turn, settings.size)
        yield image


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, turn: float, scale: float, size: int) -> None:
    x = size * (0.5 + 0.3 * math.sin(2 * math.pi * turn))
    y = size * (0.5 + 0.2 * math.cos(2 * math.pi * turn * 0.7))
    r = size * scale
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill="white")
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill="white")
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill="white")


def _draw_unpleasant(draw: ImageDraw.ImageDraw, turn: float, size: int) -> None:
    for k in range(3):
        x, y, r = size * (0.2 + 0.3 * k), size * (0.25 + 0.25 * (k % 2)), size * 0.13
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(110, 0, 0))
    for k in range(9):
        x = size * (0.08 + 0.1 * k)
        y = size * (0.72 + 0.06 * math.sin(2 * math.pi * (turn * 2 + k / 5)))
        r = size * 0.06
        draw.line((x, y - 2.2 * r, x, y + 2.2 * r), fill=(20, 10, 0), width=max(1, size // 56))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(20, 10, 0))


def _draw_vulgar(draw: ImageDraw.ImageDraw, turn: float, size: int) -> None:  # noqa: ARG001 - does not move
    spikes = []
    for k in range(16):
        r = size * (0.3 if k % 2 else 0.19)
        angle = 2 * math.pi * k / 16
        spikes.append((size * 0.68 + r * math.cos(angle), size * 0.3 + 0.8 * r * math.sin(angle)))
    draw.polygon(spikes, fill="black")
    zigzag = [(size * (0.52 + 0.065 * k), size * (0.25 if k % 2 else 0.36)) for k in range(6)]
    draw.line(zigzag, fill=(255, 235, 0), width=max(2, size // 22))


def _draw_clickbait(draw: ImageDraw.ImageDraw, turn: float, size: int) -> None:
    draw.rectangle((0, 0, size - 1, size - 1), outline=(255, 235, 0), width=max(3, size // 12))
    push = size * 0.05 * math.sin(2 * math.pi * turn)
    tip = (size * 0.62 + push, size * 0.62)
    draw.line((size * 0.15 + push, size * 0.85, *tip), fill=(230, 0, 0), width=max(3, size // 10))
    draw.polygon(
        [(tip[0] + size * 0.12, tip[1] - size * 0.1), (tip[0] - size * 0.14, tip[1]), (tip[0], tip[1] + size * 0.16)],
        fill=(230, 0, 0),
    )


_FLAW_DRAWINGS: dict[str, Callable[[ImageDraw.ImageDraw, float, int], None]] = {
    "unpleasant": _draw_unpleasant,
    "vulgar": _draw_vulgar,
    "clickbait": _draw_clickbait,
}
