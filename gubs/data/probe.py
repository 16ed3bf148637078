"""The verdict on single video files, without Ray: what `gubs probe` shows."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from gubs.config import FrameSettings
from gubs.data.decoded import DecodeOptions
from gubs.data.decoder_process import DecoderProcess

_FACTS = (
    "duration_s",
    "width",
    "height",
    "source_width",
    "source_height",
    "declared_frames",
    "decodable_frames",
    "decoder",
)
"""width and height are those of the kept frames, source_width and source_height those of the video as shown."""


def probe_files(files: Sequence[str], settings: FrameSettings) -> list[dict[str, Any]]:
    """Decodes each file as the frame stage would, and tells what became of it.

    Returns:
        One entry a file, in order: file, verdict, detail, frames (how many were kept), and `_FACTS`.
    """
    found = []
    with closing(DecoderProcess(DecodeOptions.of(settings), settings.timeout_s, settings.max_memory_mb)) as decoder:
        for file in files:
            d = decoder.decode(str(Path(file).absolute()))  # the decoder has a working folder of its own
            facts = {name: getattr(d, name) for name in _FACTS}
            outcome = {"file": file, "verdict": str(d.verdict), "detail": d.detail, "frames": len(d.frames)}
            found.append(outcome | facts)
    return found
