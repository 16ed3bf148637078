"""How much memory a training takes, estimated from a checkpoint's config.json before anything is loaded.

A GPU holds, of one worker: the weights; its ZeRO-2 shard (float32 masters, Adam's two moments, gradients); what a phase
needs on top. The rollout engine takes its share while it is awake. The reference waits on the host and moves to the GPU
for its phase. Activations are those of the largest micro-batch, recomputed layer by layer.

The host holds the reference, in pinned memory, and the copy of a checkpoint that is written in the background; the disk
holds the checkpoints that are kept, one that is being written, and the policy.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gubs.artifacts import JsonObject
from gubs.errors import PlatformError
from gubs.ufm.settings import CheckpointSettings, SFTSettings, UFMSettings
from gubs.ufm.trainer import BUCKET
from gubs.video.settings import FrameSettings

GIB = 2**30
QWEN2_5_VL_7B: Mapping[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}
"""Those values of Qwen2.5-VL-7B's config.json that decide its memory."""

_CONTEXT = 1 * GIB
"""CUDA context, kernels, NCCL buffers and fragments of one process."""
_LOGPROB_CHUNKS = 64 * 2**20
"""See `loss.token_logprobs`."""
_ENGINE_ROOM = 1 * GIB
"""What vLLM needs of its share besides weights and cache: activations of a prefill."""
_ENGINE_OUTSIDE = 2 * GIB
"""What vLLM takes beyond its share, awake or asleep: CUDA context, kernels, CUDA graphs."""
_PROCESS = 4 * GIB
"""Host memory of a process with torch, CUDA and the pictures that it caches. An estimate."""
_ADAM = 12
"""Bytes per parameter of the optimiser: float32 masters and two moments."""


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Qwen2.5-VL model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    """The head is the embedding."""
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    patch: int
    """Side of a patch, in pixels."""
    merge: int
    """Side of a token, in patches."""
    temporal: int
    """Frames per patch."""
    channels: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Architecture":
        """Reads a config.json, old form (text sizes at the top) or new (`text_config`)."""
        text, vision = config.get("text_config") or config, config["vision_config"]
        return cls(
            vocabulary=text["vocab_size"],
            hidden=text["hidden_size"],
            intermediate=text["intermediate_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision_hidden=vision["hidden_size"],
            vision_intermediate=vision["intermediate_size"],
            vision_layers=vision["depth"],
            patch=vision.get("patch_size", 14),
            merge=vision.get("spatial_merge_size", 2),
            temporal=vision.get("temporal_patch_size", 2),
            channels=vision.get("in_channels", vision.get("in_chans", 3)),
        )

    @property
    def kv_width(self) -> int:
        """Width of a layer's keys (or values), all heads together."""
        return self.kv_heads * (self.hidden // self.heads)

    @property
    def text_parameters(self) -> int:
        """Embedding, layers, head."""
        h, kv = self.hidden, self.kv_width
        attention = (h + 1) * (h + 2 * kv) + h * h
        layer = attention + 3 * h * self.intermediate + 2 * h
        return (1 if self.tied else 2) * self.vocabulary * h + self.layers * layer + h

    @property
    def vision_parameters(self) -> int:
        """Patch embedding, blocks, merger."""
        h, i = self.vision_hidden, self.vision_intermediate
        embedding = self.channels * self.temporal * self.patch**2 * h
        block = 4 * h * (h + 1) + 2 * i * (h + 1) + h * (i + 1) + 2 * h
        merged = h * self.merge**2
        return embedding + self.vision_layers * block + h + merged * (merged + 1) + self.hidden * (merged + 1)

    @property
    def parameters(self) -> int:
        """Text and vision."""
        return self.text_parameters + self.vision_parameters

    def kv_bytes(self, width: int) -> int:
        """Bytes of key-value cache per token, for values of `width` bytes."""
        return 2 * self.layers * self.kv_width * width


@dataclass(frozen=True)
class Load:
    """What one worker computes at a time, at most."""

    sequences: int
    """Answers (SFT: examples) per step."""
    clips: int
    """Different videos among them."""
    row: int
    """Tokens of the longest row: a prompt with its longest answers, if those share it, else with one."""
    answer: int
    """Tokens of the longest answer."""
    together: int
    """Answers that share a row."""
    micro_tokens: int
    """Tokens of a micro-batch."""
    patches: int
    """Patches per video; 0 = no pictures."""

    @property
    def tokens(self) -> int:
        """Per micro-batch: the setting, but at least the longest row and at most that for each sequence."""
        return min(max(self.micro_tokens, self.row), self.sequences * self.row)

    @property
    def answer_tokens(self) -> int:
        """Per micro-batch."""
        return min(self.sequences * self.answer, self.tokens)

    def micro_patches(self, merge: int) -> int:
        """Patches per micro-batch; each clip is encoded once, and its tokens have to fit."""
        if not self.patches:
            return 0
        return self.patches * min(self.clips, max(1, self.tokens // (self.patches // merge**2)))


@dataclass(frozen=True)
class Phase:
    """A phase of the training and everything on the GPU during it, in bytes by name."""

    name: str
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one worker."""

    title: str
    architecture: Architecture
    workers: int
    gpu: float
    """Memory of the GPU, in bytes."""
    phases: tuple[Phase, ...]
    host: Mapping[str, float]
    """Bytes by name that the worker keeps in host memory."""
    checkpoint: float
    """Bytes of a checkpoint, all workers together."""
    disk: float
    """Bytes of everything that may be on the disk at a time."""
    problems: tuple[str, ...]
    """Why it cannot run; empty = it fits."""
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda p: p.total)

    def lines(self) -> list[str]:
        """The plan as text."""
        a = self.architecture
        lines = [
            f"{self.title}: {a.parameters / 1e9:.3g} B parameters ({a.text_parameters / 1e9:.3g} B text, "
            f"{a.vision_parameters / 1e9:.3g} B vision), {self.workers} worker(s), {self.gpu / GIB:.1f} GiB per GPU"
        ]
        for phase in self.phases:
            parts = " + ".join(f"{name} {_size(size)}" for name, size in phase.parts.items())
            lines.append(f"  {phase.name:<10} {_size(phase.total):>9} = {parts}")
        host = " + ".join(f"{name} {_size(size)}" for name, size in self.host.items())
        lines.append(f"  {'host':<10} {_size(sum(self.host.values())):>9} = {host}; per worker")
        lines.append(
            f"  {'disk':<10} {_size(self.disk):>9} at most: checkpoints of {_size(self.checkpoint)} each, one of them "
            "being written, and the policy"
        )
        return [*lines, *(f"  note: {n}" for n in self.notes), *(f"  DOES NOT FIT: {p}" for p in self.problems)]

    def to_json(self) -> JsonObject:
        """For scripts: bytes by phase and part."""
        return {
            "title": self.title,
            "parameters": self.architecture.parameters,
            "workers": self.workers,
            "gpu": self.gpu,
            "phases": {p.name: {**p.parts, "total": p.total} for p in self.phases},
            "host": dict(self.host),
            "checkpoint": self.checkpoint,
            "disk": self.disk,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def plans(ufm: UFMSettings, frames: FrameSettings, gpu_gib: float) -> list[MemoryPlan]:
    """The plans of both trainings, from the settings alone."""
    return [make(ufm, config_of(ufm), frames, gpu_gib * GIB) for make in (plan_sft, plan_grpo)]


def plan_sft(ufm: UFMSettings, config: Mapping[str, Any], frames: FrameSettings, gpu: float) -> MemoryPlan:
    """The plan of SFT; arguments as in `plan_grpo`."""
    return _plan_examples("SFT", ufm, ufm.sft, 1, config, frames, gpu)


def plan_distil(ufm: UFMSettings, config: Mapping[str, Any], frames: FrameSettings, gpu: float) -> MemoryPlan:
    """The plan of distillation; arguments as in `plan_grpo`."""
    return _plan_examples("distillation", ufm, ufm.distil, ufm.distil.samples, config, frames, gpu)


def _plan_examples(
    title: str,
    ufm: UFMSettings,
    sft: SFTSettings,
    samples: int,
    config: Mapping[str, Any],
    frames: FrameSettings,
    gpu: float,
) -> MemoryPlan:
    """Of a training on examples with so many answers each."""
    a, per = Architecture.of(config), sft.batch // ufm.workers.count or 1
    load = _load(ufm, a, frames, per * samples, per, sft.micro_tokens, samples)
    phases = (_backward(ufm, a, load, {}), _optimizer(ufm, a, {}))
    host = {"worker": float(_PROCESS), **_written(ufm, a, sft.checkpoint)}
    size, disk = _on_disk(ufm, a, sft.checkpoint.keep + 1)
    return MemoryPlan(title, a, ufm.workers.count, gpu, phases, host, size, disk, _problems(phases, gpu, ufm))


def plan_grpo(ufm: UFMSettings, config: Mapping[str, Any], frames: FrameSettings, gpu: float) -> MemoryPlan:
    """The plan of GA-GRPO.

    Args:
        ufm: settings.
        config: the checkpoint's config.json.
        frames: how many frames a video has, and how large they are at most.
        gpu: memory of a GPU, in bytes.
    """
    a, width = Architecture.of(config), _width(ufm)
    records = ufm.grpo.prompts // ufm.workers.count
    samples = ufm.grpo.user_samples
    load = _load(ufm, a, frames, records * (samples + 2), records, ufm.grpo.micro_tokens, samples)
    weights, share = float(a.parameters * width), ufm.rollout.gpu_memory * gpu
    outside = {"engine's context": float(_ENGINE_OUTSIDE)}
    asleep = outside if ufm.rollout.sleep else {"engine": share, **outside}
    phases = [
        Phase("rollout", {**_resident(ufm, a), "engine": share, **outside}),
        _reference(ufm, a, load, asleep),
        _backward(ufm, a, load, asleep),
        _optimizer(ufm, a, asleep),
        Phase("sync", {**_resident(ufm, a), **asleep, **({"engine's weights": weights} if ufm.rollout.sleep else {})}),
    ]
    kept = tuple(p for p in phases if p.name != "reference" or ufm.grpo.beta)
    host = {"worker and engine": 2.0 * _PROCESS, **_written(ufm, a, ufm.grpo.checkpoint)}
    host |= {"reference": float(pinned(a.parameters * width))} if ufm.grpo.beta else {}
    size, disk = _on_disk(ufm, a, ufm.grpo.checkpoint.keep + 2)  # the best one too
    too_small, notes = _engine(ufm, a, load.sequences, share)
    problems = (*_problems(kept, gpu, ufm), *too_small)
    return MemoryPlan("GA-GRPO", a, ufm.workers.count, gpu, kept, host, size, disk, problems, notes)


def pinned(size: int) -> int:
    """Bytes that torch takes for one pinned allocation: the next power of two."""
    return 1 << max(0, size - 1).bit_length()


def check_disk(plan: MemoryPlan, folder: Path) -> None:
    """Refuses a training whose checkpoints do not fit the disk, before its first step.

    Args:
        plan: of the training.
        folder: of the training run; what an earlier attempt left there is counted as the training's own.

    Raises:
        PlatformError: they do not fit.
    """
    own = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    free = shutil.disk_usage(folder).free
    if own + free < plan.disk:
        raise PlatformError(
            f"the disk of {folder} has {_size(free)} free, and this training's checkpoints take up to "
            f"{_size(plan.disk)}: {_size(plan.checkpoint)} each, one of them being written. Keep fewer "
            "(checkpoint.keep), or use another --run"
        )


@dataclass(frozen=True)
class Machine:
    """A machine with GPUs."""

    gpu: float
    """Memory of one GPU, in bytes."""
    gpus: int
    host: float
    """Host memory, in bytes."""


def check(plan: MemoryPlan, machine: Machine) -> None:
    """Refuses what does not fit the GPUs or the memory of their host.

    Raises:
        PlatformError: it does not fit; the message holds the whole plan.
    """
    workers = min(plan.workers, machine.gpus)
    host = workers * sum(plan.host.values())
    problems = [*plan.lines()] if plan.problems else []
    if host > machine.host:
        over = f"  DOES NOT FIT: {workers} worker(s) keep {_size(host)} in the memory of their machine, which has "
        problems = [*plan.lines(), over + _size(machine.host)]
    if problems:
        raise PlatformError("\n".join(["this training cannot fit its GPUs", *problems]))


def config_of(ufm: UFMSettings, folder: str | Path = "") -> Mapping[str, Any]:
    """The config.json of a checkpoint folder; without one, that of the settings' model (made here, but not taught, if
    it is ours: lessons change no size).
    """
    import json

    from gubs.ufm.model import checkpoint

    if not folder and not ufm.model.path and ufm.model.size == "7b":
        return QWEN2_5_VL_7B
    untaught = ufm.model.model_copy(update={"lessons": 0})
    config: dict[str, Any] = json.loads((Path(folder or checkpoint(untaught)) / "config.json").read_text())
    return config


def gpu_machine() -> Machine:
    """A machine of the cluster that has GPUs, as it reports itself.

    Raises:
        PlatformError: no GPU answers within a minute.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    def ask() -> Machine:
        import psutil
        import torch

        node_id = ray.get_runtime_context().get_node_id()
        (node,) = (n for n in ray.nodes() if n["NodeID"] == node_id)
        gpu = float(torch.cuda.get_device_properties(0).total_memory)
        return Machine(gpu, int(node["Resources"].get("GPU", 1)), float(psutil.virtual_memory().total))

    remote: Any = ray.remote(ask)
    try:
        machine: Machine = ray.get(remote.options(num_gpus=1, num_cpus=0).remote(), timeout=60)
    except (GetTimeoutError, RayError) as e:
        raise PlatformError(f"no GPU of the cluster reports its memory: {str(e).strip()[-300:]}") from None
    return machine


def _load(
    ufm: UFMSettings,
    a: Architecture,
    frames: FrameSettings,
    sequences: int,
    clips: int,
    micro_tokens: int,
    samples: int,
) -> Load:
    """`samples`: answers to one prompt; with SDPA they share its row."""
    patches = frames.count // a.temporal * (frames.max_pixels // a.patch**2) if ufm.inputs.vision else 0
    together = samples if ufm.model.attention in ("auto", "sdpa") else 1
    row = ufm.inputs.max_prompt_tokens + together * ufm.inputs.max_new_tokens
    return Load(sequences, clips, row, ufm.inputs.max_new_tokens, together, micro_tokens, patches)


def _written(ufm: UFMSettings, a: Architecture, checkpoint: CheckpointSettings) -> dict[str, float]:
    """A worker's part of the copy that is written in the background. (All of the weights' is the first worker's.)"""
    size, _ = _on_disk(ufm, a, 0)
    return {"checkpoint": size / ufm.workers.count} if checkpoint.background else {}


def _on_disk(ufm: UFMSettings, a: Architecture, checkpoints: int) -> tuple[float, float]:
    """Bytes of a checkpoint, and of so many with the policy."""
    weights = float(a.parameters * _width(ufm))
    size = weights + _ADAM * a.parameters
    return size, checkpoints * size + weights


def _resident(ufm: UFMSettings, a: Architecture) -> dict[str, float]:
    """What the trainer keeps on the GPU in every phase."""
    return {
        "weights": float(a.parameters * _width(ufm)),
        "masters, Adam": float(_ADAM) * a.parameters / ufm.workers.count,
        "CUDA": float(_CONTEXT),
    }


def _backward(ufm: UFMSettings, a: Architecture, load: Load, engine: Mapping[str, float]) -> Phase:
    width = _width(ufm)
    parts = {
        **_resident(ufm, a),
        "gradients": 4.0 * a.parameters / ufm.workers.count,
        "buckets": float(2 * min(BUCKET, a.parameters) * width),
        "activations": activations(ufm, a, load),
        "logits": 2.0 * load.answer_tokens * a.vocabulary * width + _LOGPROB_CHUNKS,
        "shared rows": 2 * _shared_rows(load, a, width),  # and their gradients
    }
    return Phase("train", {**parts, **engine})


def _shared_rows(load: Load, a: Architecture, width: int) -> float:
    """A layer's keys and values once for each answer that shares a row, for all heads: see `attention.py`."""
    return 2.0 * load.together * load.tokens * a.hidden * width if load.together > 1 else 0.0


def _optimizer(ufm: UFMSettings, a: Architecture, engine: Mapping[str, float]) -> Phase:
    """The optimizer's step. Gradients were added up in float32; a fused AdamW reads them where they are, and makes no
    temporary tensors. Weights in float32 have theirs put together first.
    """
    shard = a.parameters / ufm.workers.count
    parts = {"gradients": 4.0 * shard, **({"gradients, flat": 4.0 * shard} if _width(ufm) == 4 else {})}
    return Phase("optimizer", {**_resident(ufm, a), **parts, **engine})


def _reference(ufm: UFMSettings, a: Architecture, load: Load, engine: Mapping[str, float]) -> Phase:
    width = _width(ufm)
    parts = {
        "reference": float(a.parameters * width),
        "activations": max(
            _layer(load.tokens, a.hidden, a.kv_width, a.intermediate, width),
            _layer(load.micro_patches(a.merge), a.vision_hidden, a.vision_hidden, a.vision_intermediate, width),
        ),
        "logits": float(load.answer_tokens * a.vocabulary * width + _LOGPROB_CHUNKS),
        "shared rows": _shared_rows(load, a, width),
    }
    return Phase("reference", {**_resident(ufm, a), **parts, **engine})


def activations(ufm: UFMSettings, a: Architecture, load: Load) -> float:
    """Bytes kept for the backward pass of one micro-batch.

    With checkpointing each layer keeps its input, and one layer at a time is computed again; half as much again for
    the gradients of that layer's values. Without, every layer keeps everything.
    """
    width, patches = _width(ufm), load.micro_patches(a.merge)
    text = _layer(load.tokens, a.hidden, a.kv_width, a.intermediate, width)
    vision = _layer(patches, a.vision_hidden, a.vision_hidden, a.vision_intermediate, width)
    if not ufm.model.gradient_checkpointing:
        return text * (a.layers + 0.5) + vision * (a.vision_layers + 0.5)
    inputs = load.tokens * a.hidden * a.layers + patches * a.vision_hidden * a.vision_layers
    return width * inputs + 1.5 * max(text, vision)


def _layer(tokens: int, hidden: int, kv: int, intermediate: int, width: int) -> float:
    """Values of one layer that its backward pass needs: norms (float32 inside), queries, keys, values, the MLP's
    gate, its activation, up and product. Flash attention and SDPA keep no scores.
    """
    return float(tokens * ((7 * width + 8) * hidden + 2 * width * kv + 4 * width * intermediate))


def _engine(ufm: UFMSettings, a: Architecture, sequences: int, share: float) -> tuple[list[str], tuple[str, ...]]:
    """Whether the engine's share holds its weights and the cache of what is in flight: problems, notes."""
    width = _width(ufm)
    weights, token = a.parameters * width, a.kv_bytes(width)
    longest = ufm.inputs.max_prompt_tokens + ufm.inputs.max_new_tokens
    flight = min(sequences, ufm.rollout.max_num_seqs) * longest
    room = share - weights - _ENGINE_ROOM
    left = f"the engine's share {_size(share)} - weights {_size(weights)} - {_size(_ENGINE_ROOM)} of its own"
    if room < longest * token:
        need = f"one answer needs {_size(longest * token)} ({longest:,} tokens x {token / 1000:.3g} KB)"
        return [f"{left} leaves {_size(max(0.0, room))} of cache, {need}: raise ufm.rollout.gpu_memory"], ()
    note = f"{left} leaves {_size(room)} = {room / token:,.0f} tokens of cache at {token / 1000:.3g} KB"
    return [], (f"{note}; at most {flight:,} are in flight" + ("" if flight * token <= room else ": written in turns"),)


def _problems(phases: tuple[Phase, ...], gpu: float, ufm: UFMSettings) -> tuple[str, ...]:
    over = [p for p in phases if p.total > gpu]
    hint = "more workers, smaller micro_tokens"
    hint += "" if ufm.model.gradient_checkpointing else ", ufm.model.gradient_checkpointing=true"
    hint += "" if ufm.rollout.sleep else ", ufm.rollout.sleep=true"
    return tuple(f"{p.name} needs {_size(p.total)}, the GPU has {_size(gpu)} ({hint})" for p in over)


def _width(ufm: UFMSettings) -> int:
    return 2 if ufm.model.dtype == "bfloat16" else 4


def _size(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 20 else f"{size / 2**20:.1f} MiB"
