import io
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from gubs.artifacts import Run
from gubs.config import RenderSettings, load_settings
from gubs.data.ingest import ingest_stage
from gubs.data.render import Scene, frames, render, render_stage
from gubs.data.sources.world import FLAWS

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
    shown = [np.asarray(f, int) for f in frames(Scene("v", 0, "none", 3.0, 2), SMALL)]
    assert np.abs(shown[0] - shown[-1]).mean() > 2


def test_stage_renders_all_and_finds_itself_done(tmp_path, ray_local):
    run, settings = Run(tmp_path / "r"), load_settings("tiny", ["users=20", "videos=12", "max_seconds=2"])
    ingest_stage(run, settings)
    seen = []
    artifact, fresh = render_stage(run, settings, on_progress=lambda done, total: seen.append((done, total)))
    assert fresh
    assert seen == [(i, 12) for i in range(1, 13)]
    files = artifact.table("files").to_pylist()
    assert len({f["video_id"] for f in files}) == 12
    for f in files:
        assert (tmp_path / "r" / "videos" / f["file"]).stat().st_size == f["bytes"] > 500
    assert render_stage(run, settings)[1] is False


@pytest.mark.slow
def test_killed_rendering_continues_where_it_was(tmp_path):
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
        assert first.poll() is None, "it must still be at work"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1.0)  # Ray's workers notice that their driver is gone
    done = {p.name: p.stat().st_mtime_ns for p in partial.glob("*.mp4")}
    assert 8 <= len(done) < 64
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    info = Run(tmp_path / "r").artifact("videos").manifest.info
    assert info["found_from_earlier_attempt"] == len(done)
    assert info["rendered_now"] == 64 - len(done)
    assert {name: (final / name).stat().st_mtime_ns for name in done} == done, "finished files were not made again"
    assert not list(final.glob("*.tmp*")), "half-written files of the killed attempt do not get into the artifact"
    for path in final.glob("*.mp4"):
        assert len(decoded(path.read_bytes())) >= 2
