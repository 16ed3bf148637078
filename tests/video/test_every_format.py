"""Every container and codec that PyAV can write: each stored frame is the one shown at its time.

The videos are of numbered frames, and PyAV's plain decoding from front to back tells which of the pairs of container
and codec hold all of them; only those are checked. So the check depends on neither seeks nor times nor decord.
"""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from video_files import picture

from gubs.video.decoded import DecodeOptions

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
    *("uncodedframecrc", "mkvtimestamp_v2", "ffmetadata", "rawvideo", "asf_stream", "a64", "vidc"),
}
"""Outputs that are no file, no container of ours to read (playlists, bare pixels), or cannot be opened again."""

SIZES = {"h263": (128, 96), "h261": (176, 144), "dvvideo": (720, 576), "dnxhd": (1280, 720)}
CODEC_OPTIONS = {
    "libx264": {"preset": "ultrafast", "x264-params": "bframes=3:b-pyramid=normal:keyint=12:scenecut=0"},
    "libx264rgb": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:bframes=3"},
    "libsvtav1": {"preset": "13"},
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


def write(path: Path, container: str, name: str) -> bool:
    """Whether the pair can be written at all."""
    formats = [f.name for f in av.codec.Codec(name, "w").video_formats or ()]
    pixels = next((p for p in PIXELS if p in formats), formats[0] if formats else "yuv420p")
    width, height = SIZES.get(name, (96, 64))
    try:
        with av.open(str(path), "w", format=container) as out:
            stream = out.add_stream(name, rate=FPS, options=dict(CODEC_OPTIONS.get(name, {})))
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, pixels, 12
            stream.bit_rate = 60_000_000 if name == "dnxhd" else 4_000_000
            if name in B_FRAMES:
                stream.codec_context.max_b_frames = 2
            for i in range(FRAMES):
                frame = av.VideoFrame.from_ndarray(picture(i, width, height), format="rgb24").reformat(format=pixels)
                frame.pts, frame.time_base = i, Fraction(1, FPS)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    except (av.FFmpegError, ValueError, OverflowError):
        return False
    return path.stat().st_size > 0
