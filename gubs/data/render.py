"""Draws the synthetic videos: H.264 files in which topic and flaw can be seen, rendered on Ray Data.

Topic: colour of the ground (eight hues) and the moving shape (circle, square, triangle). Flaws are drawn on top: a
crawling centipede on blood-red blotches (unpleasant), a jagged black speech bubble (vulgar), a red arrow in a yellow
frame (clickbait). A title alone therefore cannot tell what a clickbait video really shows, nor that a picture is
unpleasant. The same settings and video give the same pixels.
"""

import colorsys
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from gubs.artifacts import Artifact, Run, fingerprint, write_atomically, writing
from gubs.cluster import quiet_ray_data
from gubs.config import RenderSettings, Settings
from gubs.data.sources.world import TOPICS

HUES = 8
_SHAPES = ("circle", "square", "triangle")
_BATCH = 16
"""Videos a Ray task renders; what a kill can lose is one unfinished file a worker."""


@dataclass(frozen=True)
class Scene:
    """What one video shows."""

    video_id: str
    topic: int
    flaw: str
    seconds: float
    seed: int


def render_stage(
    run: Run, settings: Settings, *, force: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Artifact, bool]:
    """Renders the videos of the run's synthetic source into the artifact `videos`. Needs Ray to be initialised.

    Files that an interrupted attempt has finished are kept.

    Returns:
        The artifact (table `files`: video_id, file, bytes) and whether it was made now.
    """
    truth = run.artifact("truth")
    inputs = {"truth": truth.fingerprint}
    mark = fingerprint("videos", settings.render.model_dump(), inputs)
    if found := run.finished("videos", mark, force):
        return found, False
    scenes = _scenes(
        truth.table("videos"), run.artifact("raw").table("videos", ["video_id", "duration_s"]), settings.render
    )
    with writing(run, "videos", fingerprint=mark, settings=settings, inputs=inputs, resumable=True) as out:
        done = {name.rsplit("/", 1)[-1] for name in run.fs.ls(out.folder, detail=False)}
        left = [s for s in scenes if _file_name(s.video_id) not in done]
        for count, _ in enumerate(
            _render_on_ray(left, run.uri, out.folder, settings.render), start=len(scenes) - len(left) + 1
        ):
            if on_progress:
                on_progress(count, len(scenes))
        for name in run.fs.ls(out.folder, detail=False):
            if ".mp4.tmp-" in name:  # half written by a killed attempt
                run.fs.rm_file(name)
        files = [_file_name(s.video_id) for s in scenes]
        sizes = {e["name"].rsplit("/", 1)[-1]: e["size"] for e in run.fs.ls(out.folder, detail=True)}
        out.write_table(
            "files",
            pa.table({"video_id": [s.video_id for s in scenes], "file": files, "bytes": [sizes[f] for f in files]}),
        )
        out.info = {
            "videos": len(scenes),
            "rendered_now": len(left),
            "found_from_earlier_attempt": len(scenes) - len(left),
        }
    return run.artifact("videos"), True


def render(scene: Scene, settings: RenderSettings) -> bytes:
    """One video as an MP4 file (H.264, yuv420p)."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=settings.fps)
        stream.width = stream.height = settings.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20"}
        stream.codec_context.thread_count = 1
        for image in frames(scene, settings):
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return buffer.getvalue()


def frames(scene: Scene, settings: RenderSettings) -> Iterator[Image.Image]:
    """The pictures of a scene, `fps` a second."""
    rng = np.random.default_rng(scene.seed)
    phase, speed, scale, light = rng.random(), rng.uniform(0.3, 0.7), rng.uniform(0.24, 0.34), rng.uniform(0.65, 0.85)
    hue = scene.topic % HUES / HUES
    ground = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.75, light))
    count = max(2, round(scene.seconds * settings.fps))
    for i in range(count):
        image = Image.new("RGB", (settings.size, settings.size), ground)
        draw = ImageDraw.Draw(image)
        turn = phase + speed * i / settings.fps
        _draw_shape(draw, _SHAPES[scene.topic // HUES % len(_SHAPES)], turn, scale, settings.size)
        if scene.flaw != "none":
            _FLAW_DRAWINGS[scene.flaw](draw, turn, settings.size)
        yield image


def _scenes(truth: pa.Table, videos: pa.Table, settings: RenderSettings) -> list[Scene]:
    topics = {t.name: i for i, t in enumerate(TOPICS)}
    duration = dict(zip(videos["video_id"].to_pylist(), videos["duration_s"].to_pylist(), strict=True))
    return [
        Scene(
            row["video_id"], topics[row["topic"]], row["flaw"], min(duration[row["video_id"]], settings.max_seconds), i
        )
        for i, row in enumerate(truth.to_pylist())
    ]


def _render_on_ray(scenes: list[Scene], run_uri: str, folder: str, settings: RenderSettings) -> Iterator[str]:
    """Renders the scenes on the cluster; yields the ids of finished videos as they come."""
    import ray.data

    if not scenes:
        return
    quiet_ray_data()

    def render_batch(batch: pa.Table) -> pa.Table:
        fs = Run(run_uri).fs
        for row in batch.to_pylist():
            scene = Scene(**row)
            write_atomically(fs, f"{folder}/{_file_name(scene.video_id)}", render(scene, settings))
        return batch.select(["video_id"])

    table = pa.Table.from_pylist([asdict(s) for s in scenes])
    blocks = max(1, math.ceil(len(scenes) / _BATCH))
    dataset = (
        ray.data.from_arrow(table)
        .repartition(blocks)
        .map_batches(render_batch, batch_size=_BATCH, batch_format="pyarrow")
    )
    for row in dataset.iter_rows():
        yield row["video_id"]


def _file_name(video_id: str) -> str:
    return f"{video_id}.mp4"


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


def _draw_vulgar(draw: ImageDraw.ImageDraw, turn: float, size: int) -> None:  # noqa: ARG001 - it does not move
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
