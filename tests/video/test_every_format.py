"""Every container and codec that PyAV can write: each stored frame is the one shown at its time.

The videos are of numbered frames, and PyAV's plain decoding from front to back tells which of the pairs of container
and codec hold all of them; only those are checked. So the check depends on neither seeks nor times nor decord.
"""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.codec.context import Flags
from video_files import frame_number, picture

from gubs.video.decoded import DecodeOptions
from gubs.video.decoder_process import DecoderProcess

FRAMES, FPS = 24, 25
OPTIONS = DecodeOptions(count=8, max_pixels=16 * 28 * 28)

NOT_VIDEO = {
    *("alsa", "oss", "fbdev", "video4linux2,v4l2", "rtp", "rtp_mpegts", "rtsp", "sap", "whip", "tee", "fifo"),
    *(
        "hls",
        "dash",
        "hds",
        "segment",
        "stream_segment,ssegment",
        "smoothstreaming",
        "webm_chunk",
        "image2",
        "image2pipe",
    ),
    *("webm_dash_manifest", "null", "framecrc", "framehash", "framemd5", "streamhash", "hash", "md5", "crc", "data"),
    *(
        "uncodedframecrc",
        "mkvtimestamp_v2",
        "ffmetadata",
        "rawvideo",
        "asf_stream",
        "a64",
        "vidc",
        "fits",
        "oga",
        "opus",
        "spx",
    ),
}
"""Outputs that are no file, no container of ours to read (playlists, bare pixels), or cannot be opened again."""

NOT_CARRIED = {(container, "h263p") for container in ("mpeg", "vob", "dvd", "svcd", "vcd")}
"""Pairs that PyAV writes although the container cannot carry the codec: frames are damaged now and then."""

SIZES = {"h263": (128, 96), "h261": (176, 144), "dvvideo": (720, 576), "dnxhd": (256, 128)}
CODEC_OPTIONS = {
    "libx264": {"preset": "ultrafast", "x264-params": "bframes=3:b-pyramid=normal:keyint=12:scenecut=0"},
    "libx264rgb": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3"},
    "libsvtav1": {"preset": "13"},
    "dnxhd": {"profile": "dnxhr_lb"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}
B_FRAMES = {"mpeg4", "mpeg2video", "mpeg1video"}
PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "rgb24", "bgr24", "bgr0", "rgba", "bgra", "rgb8", "gray")


def encoders() -> Iterator[str]:
    for name in sorted(av.codecs_available):
        with suppress(ValueError):
            codec = av.codec.Codec(name, "w")
            hardware = name.endswith(("_amf", "_nvenc", "_qsv", "_v4l2m2m", "_vaapi", "_videotoolbox"))
            if codec.type == "video" and not hardware and codec.name == name:
                yield name


def containers() -> Iterator[str]:
    for name in sorted(av.formats_available - NOT_VIDEO):
        with suppress(ValueError):
            if av.format.ContainerFormat(name, "w").is_output:
                yield name


def encode(path: Path, name: str) -> bool:
    """Encodes the numbered frames once, into a container that holds nearly everything; false if that fails."""
    formats = [f.name for f in av.codec.Codec(name, "w").video_formats or ()]
    pixels = next((p for p in PIXELS if p in formats), formats[0] if formats else "yuv420p")
    width, height = SIZES.get(name, (96, 64))
    try:
        with av.open(str(path), "w", format="matroska" if name == "libsvtav1" else "nut") as out:
            stream = out.add_stream(name, rate=FPS, options=dict(CODEC_OPTIONS.get(name, {})))
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pixels, 12
            stream.bit_rate, stream.codec_context.flags = 4_000_000, Flags.global_header
            if name in B_FRAMES:
                stream.codec_context.max_b_frames = 2
            for i in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(picture(i, width, height), format="rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = i, Fraction(1, FPS)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    except (av.FFmpegError, ValueError, OverflowError):
        return False
    return shown(path) == list(range(FRAMES))


def put(encoded: Path, path: Path, container: str) -> bool:
    """Puts encoded frames into a container; false if it does not take them."""
    try:
        with av.open(str(encoded)) as source, av.open(str(path), "w", format=container) as out:
            stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
            stream.time_base = Fraction(1, FPS)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    except (av.FFmpegError, ValueError, OverflowError):
        return False
    return path.is_file() and path.stat().st_size > 0


def shown(path: Path) -> list[int] | None:
    """The numbers of all frames in the order in which they are shown; None if PyAV cannot read the file."""
    numbers = []
    try:
        with av.open(str(path)) as file:
            for frame in file.decode(video=0):
                rows = frame.to_ndarray(format="gray")[3 * frame.height // 4]
                middles = rows[frame.width // 16 :: frame.width // 8][:8]
                numbers.append(sum(1 << bit for bit, light in enumerate(middles) if light > 128))
    except (av.FFmpegError, ValueError, IndexError):
        return None
    return numbers


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of numbered frames for each codec."""
    folder = tmp_path_factory.mktemp("encoded")
    return {name: folder / name for name in encoders() if encode(folder / name, name)}


@pytest.fixture(scope="module")
def process() -> Iterator[DecoderProcess]:
    process = DecoderProcess(OPTIONS, timeout_s=20)
    yield process
    process.close()


CHECKED: set[tuple[str, str]] = set()


@pytest.mark.parametrize("container", containers())
def test_each_frame_is_the_one_shown_at_its_time(
    container: str, encoded: dict[str, Path], tmp_path: Path, process: DecoderProcess
) -> None:
    wrong = {}
    for codec, source in encoded.items():
        path = tmp_path / f"video-{codec}"
        if (container, codec) in NOT_CARRIED or not put(source, path, container) or shown(path) != list(range(FRAMES)):
            continue
        CHECKED.add((container, codec))
        done = process.decode(str(path))
        numbers = [frame_number(jpeg) for jpeg in done.frames]
        off = np.abs(np.subtract(numbers, [round(t * FPS) for t in done.times_s])) if numbers else np.array([FRAMES])
        if done.verdict != "ok" or off.any() or len(set(numbers)) < 8:
            wrong[codec] = (str(done.verdict), done.detail, done.decoder, numbers, done.times_s)
    assert wrong == {}


def test_the_check_covers_what_matters() -> None:
    common = {(c, "libx264") for c in ("mp4", "mov", "matroska", "avi", "flv", "mpegts", "asf", "3gp", "nut")}
    common |= {("webm", "libvpx-vp9"), ("mp4", "libx265"), ("mp4", "libsvtav1"), ("ogg", "libvpx"), ("gif", "gif")}
    assert common <= CHECKED
    assert len({codec for _, codec in CHECKED}) > 50
    assert len({container for container, _ in CHECKED}) > 35
