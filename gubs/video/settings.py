"""Settings of the frames taken from each video."""

from pydantic import Field, model_validator

from gubs.section import Section


class FrameSettings(Section):
    """Frames taken from each video."""

    count: int = Field(8, ge=2, multiple_of=2)
    """Frames per video, at fixed times; even, since Qwen2.5-VL merges pairs."""
    max_pixels: int = Field(128 * 28 * 28, ge=28 * 28)
    """Pixel budget of one frame; width and height become multiples of 28."""
    min_pixels: int = Field(4 * 28 * 28, ge=28 * 28)
    """Smaller frames are scaled up to this."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality of stored frames."""
    timeout_s: float = Field(60.0, gt=0)
    """Time limit per file; the decoder process is killed when it is exceeded."""
    max_memory_mb: int = Field(2048, ge=256)
    """Address space that a decoder process may use beyond that of an idle one, MiB."""
    max_file_mb: float = Field(2048.0, gt=0)
    """Larger files are not opened, MiB."""
    max_source_pixels: int = Field(8192 * 8192, ge=28 * 28)
    """Pictures with more pixels are not decoded."""
    workers: int = Field(0, ge=0)
    """Decoder processes; 0 = one per CPU of the cluster."""
    store: str = ""
    """Folder or URI of the frame store, which runs share; empty = `frame-store` beside the run folder."""

    @model_validator(mode="after")
    def _consistent(self) -> "FrameSettings":
        if self.min_pixels > self.max_pixels:
            raise ValueError("frames.min_pixels is larger than frames.max_pixels")
        return self
