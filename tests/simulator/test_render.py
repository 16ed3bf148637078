import contextlib
import io
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.simulator import stage as simulator_stage
from gubs.simulator.population import FLAWS
from gubs.simulator.render import Scene, frames, render
from gubs.simulator.settings import RenderSettings

SMALL = RenderSettings(size=56, fps=4)


def decoded(data):
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_a_video_is_real_h264_of_the_right_size_and_length():
    pixels = decoded(render(Scene("v", 3, "none", 5.0, 0), SMALL))
    assert pixels.shape == (20, 56, 56, 3)


def test_same_scene_same_bytes():
    scene = Scene("v", 3, "vulgar", 3.0, 7)
    assert render(scene, SMALL) == render(scene, SMALL)


def test_topics_differ_in_the_pixels_and_flaws_do_too():
    def middle(topic, flaw):
        return decoded(render(Scene("v", topic, flaw, 2.0, 1), SMALL))[4].astype(int)

    pictures = [middle(t, "none") for t in range(24)]
    distance = [[np.abs(a - b).mean() for b in pictures] for a in pictures]
    assert min(distance[i][j] for i in range(24) for j in range(i)) > 3, "every two topics look different"
    for flaw in FLAWS[1:]:
        assert np.abs(middle(0, flaw) - pictures[0]).mean() > 8, f"{flaw} can be seen"


def test_something_moves():
    images = [np.asarray(f, int) for f in frames(Scene("v", 0, "none", 3.0, 2), SMALL)]
    assert np.abs(images[0] - images[-1]).mean() > 2


def test_stage_renders_all_and_reports_its_progress(tmp_path, ray_local, monkeypatch):
    run, settings = Run(tmp_path / "r"), load_settings("tiny", ["users=20", "videos=12", "max_seconds=2"])
    seen = []

    @contextlib.contextmanager
    def progress(title):
        yield lambda done, total: seen.append((done, total))

    monkeypatch.setattr(simulator_stage, "progress", progress)
    stages.make(["videos"], run, settings)
    artifact = run.artifact("videos")
    assert artifact.manifest.info == {"videos": 12, "rendered_now": 12, "kept_from_earlier_attempt": 0}
    assert seen == [(i, 12) for i in range(1, 13)]
    files = artifact.table("files").to_pylist()
    assert len({f["video_id"] for f in files}) == 12
    for f in files:
        assert (tmp_path / "r" / "videos" / f["file"]).stat().st_size == f["bytes"] > 500
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "videos").iterdir()}
    stages.make(["videos"], run, settings)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "r" / "videos").iterdir()} == before
    assert len(seen) == 12, "nothing was rendered again"


def _wait_until_nothing_is_written(folder):
    """Ray's workers notice that their driver has ended, on a busy machine after seconds."""
    files, still = -1, time.monotonic()
    while time.monotonic() - still < 3.0:
        if (now := len(list(folder.iterdir()))) != files:
            files, still = now, time.monotonic()
        time.sleep(0.1)


@pytest.mark.slow
def test_killed_rendering_resumes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "gubs.cli",
        "synth",
        "--run",
        str(tmp_path / "r"),
        "users=20",
        "videos=64",
        "max_seconds=3",
        "render.size=112",
    ]
    partial, final = tmp_path / "r" / "videos.partial", tmp_path / "r" / "videos"
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(partial.glob("*.mp4"))) < 8:
        assert first.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    _wait_until_nothing_is_written(partial)
    done = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.mp4")}
    assert 8 <= len(done) < 64
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    info = Run(tmp_path / "r").artifact("videos").manifest.info
    assert info["kept_from_earlier_attempt"] == len(done)
    assert info["rendered_now"] == 64 - len(done)
    assert {name: (final / name).stat().st_mtime_ns for name in done} == done, "finished files were not made again"
    assert not list(final.glob("*.tmp*")), "the artifact has no half-written files of the killed attempt"
    for path in final.glob("*.mp4"):
        assert len(decoded(path.read_bytes())) >= 2
