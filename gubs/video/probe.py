"""Verdicts on single video files, without Ray, for `gubs probe`."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gubs.video.decoded import DecodeOptions
from gubs.video.decoder_process import DecoderProcess
from gubs.video.settings import FrameSettings

_FACTS = [
    *("duration_s", "width", "height", "source_width", "source_height"),
    *("declared_frames", "decodable_frames", "decoder"),
]
"""width and height are the size of the frames, source_width and source_height that of the video as shown."""


def probe_files(files: Sequence[str], settings: FrameSettings) -> list[dict[str, Any]]:
    """Decodes each file as the frame stage would.

    Returns:
        One entry per file, in order: file, verdict, detail, frames (their number), and `_FACTS`.
    """
    results = []
    with closing(DecoderProcess(DecodeOptions.of(settings), settings.timeout_s, settings.max_memory_mb)) as decoder:
        for file in files:
            d = decoder.decode(str(Path(file).absolute()))  # the decoder has another working folder
            outcome = {"file": file, "verdict": str(d.verdict), "detail": d.detail, "frames": len(d.frames)}
            results.append(outcome | {name: getattr(d, name) for name in _FACTS})
    return results
