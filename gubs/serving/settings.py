"""Settings of the filter and of the service around it."""

from typing import Literal

from pydantic import Field

from gubs.section import Section


class LimitSettings(Section):
    """What a request may hold; anything larger is refused before it is read."""

    body_mb: float = Field(8.0, gt=0)
    """Largest body, MiB."""
    candidates: int = Field(100, ge=1, le=100)
    """Most candidates per request."""
    history: int = Field(200, ge=0, le=200)
    """Most views in a history sent with a request."""
    frames: int = Field(16, ge=2, le=16)
    """Most frames sent with a candidate."""
    frame_pixels: int = Field(2**20, ge=28 * 28)
    """Largest frame sent with a candidate, pixels."""
    fetch_mb: float = Field(64.0, gt=0)
    """Largest video file fetched for an unknown candidate, MiB."""
    fetch_s: float = Field(20.0, gt=0)
    """Time limit for fetching and decoding an unknown video."""


class ServingSettings(Section):
    """The filter service."""

    policy: str = "grpo"
    """The policy that the filter is made from: grpo, sft_model, ...; base = the model before any training."""
    score_gap: float = Field(0.02, ge=0)
    """Largest AUC that mode `score` may lose against `reason`; beyond it the service refuses `score`."""
    gpu_memory: float = Field(0.9, gt=0, lt=1)
    """Share of its GPU that an engine replica takes; nothing else runs there. No effect on a CPU."""
    engine_cpus: int = Field(1, ge=1)
    """CPUs of an engine replica; without a GPU also its threads, unless OMP_NUM_THREADS is set. One for preset tiny."""
    chunk: int = Field(25, ge=1)
    """Candidates per call of an engine; a larger request is split."""
    mode: Literal["reason", "score"] = "reason"
    """Mode of requests that name none."""
    timeout_s: float = Field(30.0, gt=0)
    """Deadline of requests that name none, and the longest one they may name."""
    min_replicas: int = Field(1, ge=1)
    """Engine replicas that are always up."""
    max_replicas: int = Field(1, ge=1)
    """Engine replicas under load."""
    ongoing: int = Field(4, ge=1)
    """Chunks per replica that autoscaling aims at."""
    max_ongoing: int = Field(16, ge=1)
    """Most chunks that a replica works on at a time."""
    max_queued: int = Field(32, ge=0)
    """Most chunks that wait at an ingress; more are refused with 429."""
    host: str = "127.0.0.1"
    """Address that the service listens on; 0.0.0.0 = all."""
    port: int = Field(8000, ge=1, le=65535)
    """Port of the service."""
    ingress_replicas: int = Field(1, ge=1)
    """Ingress replicas; the rates of keys are divided among them."""
    keys_file: str = ""
    """File with the hashes of API keys; `gubs serve key` adds one."""
    insecure: bool = False
    """Ask for no key. For development: such a service listens on this machine only."""
    log_dir: str = ""
    """Folder of the Parquet log of decisions; empty = none is kept."""
    log_every_s: float = Field(30.0, gt=0)
    """Seconds between two files of the log."""
    fetch_roots: tuple[str, ...] = ()
    """Folders and URL prefixes (https://cdn.example.com/videos/) that unknown videos may come from; empty = none."""
    limits: LimitSettings = LimitSettings()
