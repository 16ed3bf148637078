"""Each stored frame is the one that a player shows at its time, upright, and all frames of a clip have one size."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from video_files import frame_number, make_changing_video, make_video, picture, set_edits

from gubs.video.decoded import Decoded, DecodeOptions
from gubs.video.decoder_process import DecoderProcess

OPTIONS = DecodeOptions(count=8, max_pixels=64 * 28 * 28)
MIDDLES = [(2 * k + 1) * 3 for k in range(8)]
"""The frames in the middle of the eighths of 48."""

B_FRAMES = {"options": {"preset": "ultrafast", "x264-params": "bframes=3:b-pyramid=normal:keyint=24:scenecut=0"}}
VP9 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    process = DecoderProcess(OPTIONS, timeout_s=20)
    yield process
    process.close()


def numbers(done: Decoded) -> list[int]:
    return [frame_number(jpeg) for jpeg in done.frames]


def sizes(done: Decoded) -> set[tuple[int, int]]:
    return {Image.open(io.BytesIO(jpeg)).size for jpeg in (*done.frames, done.cover)}


# One size


@pytest.mark.parametrize("second", [(96, 160), (320, 192), (80, 48)], ids=["turned", "larger", "smaller"])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "libx264", {"preset": "ultrafast"}),
        ("a.mp4", "libx264", {"preset": "ultrafast", "x264-params": "bframes=0:repeat-headers=1"}),
        ("a.ts", "libx264", {"preset": "ultrafast"}),
        ("a.webm", "libvpx-vp9", VP9["options"]),
        ("b.webm", "libvpx", {"deadline": "realtime", "cpu-used": "8"}),
        ("a.avi", "mpeg4", {}),
    ],
)
def test_frames_of_one_clip_have_one_size(name, codec, options, second, tmp_path, process) -> None:
    path = make_changing_video(tmp_path / name, codec, [(160, 96), second], options=options)
    done = process.decode(str(path))
    assert done.verdict == "ok", done.detail
    assert sizes(done) == {(done.width, done.height)}
    assert (done.source_width, done.source_height) == (160, 96), "the size of the first frame counts"
    assert numbers(done) == MIDDLES


# Display order


@pytest.mark.parametrize("name", ["h264.avi", "h264.mp4", "h264.mkv", "h264.flv", "h264.asf"])
def test_b_frames_of_h264_come_in_the_order_in_which_they_are_shown(name, tmp_path, process) -> None:
    done = process.decode(str(make_video(tmp_path / name, **B_FRAMES)))
    assert (done.verdict, done.decodable_frames) == ("ok", 48), done.detail
    assert abs(np.subtract(numbers(done), MIDDLES)).max() <= (name == "h264.asf"), "ASF's times are in milliseconds"


@pytest.mark.parametrize("name", ["a.avi", "a.asf", "a.mkv", "a.mp4"])
@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video"])
def test_b_frames_of_mpeg_come_in_the_order_in_which_they_are_shown(name, codec, tmp_path, process) -> None:
    done = process.decode(str(make_video(tmp_path / name, codec, b_frames=2)))
    assert (done.verdict, done.decodable_frames) == ("ok", 48), done.detail
    assert abs(np.subtract(numbers(done), MIDDLES)).max() <= (name == "a.asf")


# Upright

TURNS = {
    "hflip": (-1, 0, 0, 1),
    "vflip": (1, 0, 0, -1),
    "half turn": (-1, 0, 0, -1),
    "clockwise": (0, 1, -1, 0),
    "anticlockwise": (0, -1, 1, 0),
    "transpose": (0, 1, 1, 0),
    "transverse": (0, -1, -1, 0),
}
"""a, b, c, d of a display matrix: the point (x, y) is shown at (a x + c y, b x + d y)."""


def shown(i: int, turn: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """Frame i where the matrix puts each of its points."""
    a, b, c, d = turn
    image = picture(i)
    y, x = np.mgrid[0 : image.shape[0], 0 : image.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    moved = np.zeros((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    moved[to_y, to_x] = image
    return np.asarray(Image.fromarray(moved).resize(size), float)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("codec", [{}, VP9, {"codec": "mpeg4"}], ids=["h264", "vp9", "mpeg4"])
def test_turned_and_mirrored_videos_are_shown_as_players_show_them(codec, turn, tmp_path, process) -> None:
    a, b, c, d = (n << 16 for n in TURNS[turn])
    done = process.decode(str(make_video(tmp_path / "a.mp4", **codec, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))))
    assert done.verdict == "ok", done.detail
    assert (done.source_width, done.source_height) == ((160, 96) if a else (96, 160))
    for jpeg, i in zip((done.cover, *done.frames), (0, *MIDDLES), strict=True):
        seen = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), float)
        assert abs(seen - shown(i, TURNS[turn], (done.width, done.height))).mean() < 25


def test_a_skewed_matrix_is_ignored_as_in_players(tmp_path, process) -> None:
    half = 46341
    done = process.decode(str(make_video(tmp_path / "a.mp4", matrix=(half, half, 0, -half, half, 0, 0, 0, 1 << 30))))
    assert numbers(done) == MIDDLES


# The end


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("a.mp4", {"options": {"x264-params": "bframes=0"}}),
        ("a.mov", {"codec": "mpeg4"}),
        ("b.mp4", {"codec": "libsvtav1", "options": {"preset": "13"}}),
        ("a.mkv", {"options": {"x264-params": "bframes=0"}}),
        ("a.webm", VP9),
        ("a.flv", {"options": {"x264-params": "bframes=0"}}),
        ("a.avi", {"codec": "mpeg4"}),
        ("a.asf", {"codec": "wmv2"}),
        ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_last_frame_that_stays_counts_as_long_as_it_is_shown(name, more, tmp_path, process) -> None:
    done = process.decode(str(make_video(tmp_path / name, frames=20, fps=25, last=80, **more)))
    assert (done.verdict, done.decodable_frames) == ("ok", 20), done.detail
    assert done.duration_s == pytest.approx(19 * 0.04 + 80 * 0.04, abs=0.05)
    assert numbers(done) == [6, 18, *[19] * 6]


def test_durations_of_packets_that_cannot_be_right_are_not_believed(tmp_path, process) -> None:
    """Some writers give every packet of a Matroska file the duration of the whole video."""
    path = tmp_path / "a.mkv"
    with av.open(str(make_video(tmp_path / "a.mp4"))) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream, packet.duration = stream, packet.duration * 48
                out.mux(packet)
    done = process.decode(str(path))
    assert done.verdict == "ok", done.detail
    assert done.duration_s == pytest.approx(2, abs=0.06)
    assert abs(np.subtract(numbers(done), MIDDLES)).max() <= 1, "its times are in milliseconds"


# Edit lists

EDITS = {
    "starts in the middle": [(1000, 10_240)],
    "ends early": [(1000, 0)],
    "a part is cut out": [(480, 0), (480, 12_288)],
    "starts later": [(500, -1), (1920, 0)],
    "twice": [(480, 0), (480, 0)],
}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize(
    "codec",
    [B_FRAMES, VP9, {"codec": "mpeg4"}, {"codec": "libsvtav1", "options": {"preset": "13"}}],
    ids=["h264", "vp9", "mpeg4", "av1"],
)
def test_edit_lists_are_heeded(codec, edits, tmp_path, process) -> None:
    path = set_edits(make_video(tmp_path / "a.mp4", **codec), EDITS[edits])
    with av.open(str(path)) as container:
        frames = [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
    at = {round(time - frames[0][0], 4): _number(image) for time, image in frames}
    done = process.decode(str(path))
    assert (done.verdict, done.decodable_frames) == ("ok", len(frames)), done.detail
    assert numbers(done) == [at[round(t, 4)] for t in done.times_s]


def _number(image: np.ndarray) -> int:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return frame_number(out.getvalue())


# Pictures


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "ICO", "AVIF", "MPO"])
def test_a_picture_is_no_video_whatever_its_name(kind, tmp_path, process) -> None:
    path = tmp_path / "a.mp4"
    try:
        Image.fromarray(picture(5)).save(path, kind)
    except KeyError:
        pytest.skip(f"this Pillow does not write {kind}")
    done = process.decode(str(path))
    assert done.verdict == "undecodable"
    assert "a picture" in done.detail


def test_a_photo_of_several_pictures_is_no_video(tmp_path, process) -> None:
    """Stereo and HDR photos: FFmpeg takes them for a stream of JPEGs."""
    first, *others = (Image.fromarray(picture(n)) for n in range(3))
    first.save(tmp_path / "a.mp4", "MPO", save_all=True, append_images=others)
    done = process.decode(str(tmp_path / "a.mp4"))
    assert done.verdict == "undecodable"
    assert "several pictures" in done.detail


def test_a_video_of_one_frame_is_a_video(tmp_path, process) -> None:
    assert process.decode(str(make_video(tmp_path / "a.mp4", frames=1))).verdict == "ok"


# The known files, where they are


def bars(jpeg: bytes) -> int:
    """The number that a frame of these files shows in 12 bars."""
    image = np.asarray(Image.open(io.BytesIO(jpeg)).convert("L"))
    height, width = image.shape
    return sum(1 << i for i in range(12) if image[3 * height // 4, int((i + 0.5) * width / 12)] > 128)


@pytest.mark.parametrize(
    ("name", "seconds", "seen"),
    [
        ("h264_b_in_avi/x264_b16_pyr.avi", 5, [7, 22, 37, 52, 67, 82, 97, 112]),
        ("video_resolution_changes/videos/v0.mkv", 5, [7, 22, 37, 52, 67, 82, 97, 112]),
        ("video_resolution_changes/videos/v2.mp4", 5, [7, 22, 37, 52, 67, 82, 97, 112]),
        ("last_frame_long/last_long.mp4", 21.9, [13, *[19] * 7]),
        ("last_frame_long/var.gif", 5.76, [9, *[19] * 7]),
        ("mirrored/hflip.mp4", 5, [3584, 1664, 2624, 704, 3104, 1184, 2144, 224]),
    ],
)
def test_known_files_give_the_frames_that_are_shown(name, seconds, seen, real_data: Path, process) -> None:
    done = process.decode(str(real_data / "faults" / name))
    assert (done.verdict, [bars(jpeg) for jpeg in done.frames]) == ("ok", seen)
    assert done.duration_s == pytest.approx(seconds, abs=0.01)
    assert len(sizes(done)) == 1
