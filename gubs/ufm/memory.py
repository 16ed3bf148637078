"""How much memory a training takes, estimated from a checkpoint's config.json before anything is loaded.

A GPU holds, of one worker: the weights; its ZeRO-2 shard (float32 masters, Adam's two moments, gradients); what a phase
needs on top. The rollout engine takes its share while it is awake. The reference waits on the host and moves to the GPU
for its phase. Activations are those of the largest micro-batch, recomputed layer by layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gubs.errors import PlatformError
from gubs.ufm.settings import UFMSettings
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
"""What vLLM needs besides weights and cache: activations of a prefill, CUDA graphs."""


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
    longest: int
    """Tokens of the longest prompt with the longest answer."""
    answer: int
    """Tokens of the longest answer."""
    micro_tokens: int
    """Tokens of a micro-batch."""
    patches: int
    """Patches per video; 0 = no pictures."""

    @property
    def tokens(self) -> int:
        """Per micro-batch: the setting, but at least the longest sequence and at most all sequences."""
        return min(max(self.micro_tokens, self.longest), self.sequences * self.longest)

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
        lines += [f"  {'host':<10} {_size(sum(self.host.values())):>9} = {host}"] if host else []
        return [*lines, *(f"  note: {n}" for n in self.notes), *(f"  DOES NOT FIT: {p}" for p in self.problems)]

    def to_json(self) -> dict[str, Any]:
        """For scripts: bytes by phase and part."""
        return {
            "title": self.title,
            "parameters": self.architecture.parameters,
            "workers": self.workers,
            "gpu": self.gpu,
            "phases": {p.name: {**p.parts, "total": p.total} for p in self.phases},
            "host": dict(self.host),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }


def plans(ufm: UFMSettings, frames: FrameSettings, gpu_gib: float) -> list[MemoryPlan]:
    """The plans of both trainings, from the settings alone."""
    return [make(ufm, config_of(ufm), frames, gpu_gib * GIB) for make in (plan_sft, plan_grpo)]


def plan_sft(ufm: UFMSettings, config: Mapping[str, Any], frames: FrameSettings, gpu: float) -> MemoryPlan:
    """The plan of SFT; arguments as in `plan_grpo`."""
    a, per = Architecture.of(config), ufm.sft.batch // ufm.workers.count or 1
    load = _load(ufm, a, frames, per, per, ufm.sft.micro_tokens)
    phases = (_backward(ufm, a, load, {}), _optimizer(ufm, a, {}))
    return MemoryPlan("SFT", a, ufm.workers.count, gpu, phases, {}, _problems(phases, gpu, ufm))


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
    load = _load(ufm, a, frames, records * (ufm.grpo.user_samples + 2), records, ufm.grpo.micro_tokens)
    weights, share = float(a.parameters * width), ufm.rollout.gpu_memory * gpu
    asleep = {"engine asleep": float(_CONTEXT)} if ufm.rollout.sleep else {"engine": share}
    phases = [
        Phase("rollout", {**_resident(ufm, a), "engine": share}),
        _reference(ufm, a, load, asleep),
        _backward(ufm, a, load, asleep),
        _optimizer(ufm, a, asleep),
        Phase("sync", {**_resident(ufm, a), **asleep, **({"engine's weights": weights} if ufm.rollout.sleep else {})}),
    ]
    kept = tuple(p for p in phases if p.name != "reference" or ufm.grpo.beta)
    host = {"reference": weights} if ufm.grpo.beta else {}
    host |= {"engine asleep": weights} if ufm.rollout.sleep else {}
    too_small, notes = _engine(ufm, a, load, share)
    problems = (*_problems(kept, gpu, ufm), *too_small)
    return MemoryPlan("GA-GRPO", a, ufm.workers.count, gpu, kept, host, problems, notes)


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
    ufm: UFMSettings, a: Architecture, frames: FrameSettings, sequences: int, clips: int, micro_tokens: int
) -> Load:
    patches = frames.count // a.temporal * (frames.max_pixels // a.patch**2) if ufm.inputs.vision else 0
    longest = ufm.inputs.max_prompt_tokens + ufm.inputs.max_new_tokens
    return Load(sequences, clips, longest, ufm.inputs.max_new_tokens, micro_tokens, patches)


def _resident(ufm: UFMSettings, a: Architecture) -> dict[str, float]:
    """What the trainer keeps on the GPU in every phase."""
    return {
        "weights": float(a.parameters * _width(ufm)),
        "masters, Adam": 12.0 * a.parameters / ufm.workers.count,
        "CUDA": float(_CONTEXT),
    }


def _backward(ufm: UFMSettings, a: Architecture, load: Load, engine: Mapping[str, float]) -> Phase:
    width = _width(ufm)
    parts = {
        **_resident(ufm, a),
        "gradients": float(a.parameters * width / ufm.workers.count),
        "buckets": float(2 * min(BUCKET, a.parameters) * width),
        "activations": activations(ufm, a, load),
        "logits": 2.0 * load.answer_tokens * a.vocabulary * width + _LOGPROB_CHUNKS,
    }
    return Phase("train", {**parts, **engine})


def _optimizer(ufm: UFMSettings, a: Architecture, engine: Mapping[str, float]) -> Phase:
    """The optimizer's step: gradients once more in float32, and one temporary of Adam of that size."""
    shard = a.parameters / ufm.workers.count
    parts = {"gradients": shard * _width(ufm), "gradients, float32": 4.0 * shard, "Adam's temporary": 4.0 * shard}
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


def _engine(ufm: UFMSettings, a: Architecture, load: Load, share: float) -> tuple[list[str], tuple[str, ...]]:
    """Whether the engine's share holds its weights and the cache of what is in flight: problems, notes."""
    width = _width(ufm)
    weights, token = a.parameters * width, a.kv_bytes(width)
    flight = min(load.sequences, ufm.rollout.max_num_seqs) * load.longest
    room = share - weights - _ENGINE_ROOM
    left = f"the engine's share {_size(share)} - weights {_size(weights)} - {_size(_ENGINE_ROOM)} of its own"
    if room < load.longest * token:
        need = f"one answer needs {_size(load.longest * token)} ({load.longest:,} tokens x {token / 1000:.3g} KB)"
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
