"""Rollout: each trainer has a vLLM engine on the same GPU, which takes token ids and returns token ids.

`Engine` is vLLM in this process; `start_rollout` puts one into a Ray actor that lives and dies with its train worker.
Ray's placement groups cannot share a train worker's GPU with another actor, so the actor requests none and gets the
worker's own device by its id.
"""

import functools
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from gubs.errors import PlatformError
from gubs.quick_imports import quick_imports
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.video.decoded import DecodeOptions

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from torch import Tensor, nn
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
    from vllm.logprobs import Logprob
    from vllm.v1.worker.gpu_worker import Worker

    from gubs.ufm.sync import Pack

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: weights reach it without another copy
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_READ_AT_ONCE = 4096
"""Prompt tokens per step of the engine on a CPU."""
_PARTS = ("weights", "kv_cache")
"""What sleeps and wakes, in vLLM's names."""
_DISCARD = 2
"""VLLM's level of sleep that drops the weights. Level 1 would copy them to pinned host memory and back, although new
ones are loaded before the next answer anyway."""
_RUNNERS = {"v1": "0", "v2": "1"}
"""Values of VLLM_USE_V2_MODEL_RUNNER."""
_TILE = 28
"""Sides of stored frames are multiples of this."""
_BLOCK = 32
"""Tokens per cache block on a CPU, the fewest its kernels take: answers to one prompt then share more of it."""


FIGURES = {
    "prefix_queries": "vllm:prefix_cache_queries",
    "prefix_hits": "vllm:prefix_cache_hits",
    "picture_queries": "vllm:mm_cache_queries",
    "picture_hits": "vllm:mm_cache_hits",
}
"""The engine's counters, and vLLM's names for them."""


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    prompt: Mapping[str, Any]
    """See `Inputs.for_engine`."""
    seed: int
    temperature: float = 1.0
    """1 = the model's own probabilities, which training needs; 0 = greedy."""
    labels: tuple[int, ...] = ()
    """Tokens whose log-probability is wanted at every place of the answer."""
    max_tokens: int = 0
    """Longest answer; 0 = that of the settings."""


@dataclass(frozen=True)
class Response:
    """One answer."""

    ids: tuple[int, ...]
    """Its tokens; the last one ends the turn, unless the length limit cut it off."""
    logprobs: tuple[float, ...]
    """The engine's own log-probability of each token, at temperature 1."""
    version: int
    """Number of weight updates the engine had seen."""
    label_logprobs: tuple[tuple[float, ...], ...] = ()
    """At each place of the answer, the log-probabilities of the request's labels."""


@dataclass(frozen=True)
class Shape:
    """What an engine is started with."""

    folder: str
    model: ModelSettings
    inputs: InputSettings
    rollout: RolloutSettings
    threads: int = 0
    """Threads on a CPU; 0 = all cores."""
    pictures: bool = True
    """False = no prompt has pictures, so no memory is reserved for them."""
    largest: DecodeOptions | None = None
    """What bounds a clip; on a GPU memory is set aside for one of that size. None = for the largest the model takes."""


class Engine:
    """vLLM in this process, with everything a step needs: generate, sleep and wake, new weights."""

    def __init__(self, shape: Shape):
        """Imports vLLM, which takes 9 s on a slow core; `ready` or the first use loads the model.

        Raises:
            PlatformError: vLLM is not installed, or built for other machines.
        """
        os.environ.update(environment(shape.rollout))
        # also on a GPU, where it draws the pictures; Ray sets 1 for actors without CPUs
        os.environ["OMP_NUM_THREADS"] = str(shape.threads or os.cpu_count())
        try:
            with quick_imports():
                from vllm import LLM  # noqa: F401
        except ImportError as e:
            raise PlatformError(f"rollouts need vLLM: {e}; pip install 'gubs[gpu]' or 'gubs[cpu]'") from None
        import torch
        from vllm.platforms import current_platform

        self.shape, self.version = shape, 0
        self._cpu = not torch.cuda.is_available()
        if self._cpu and not current_platform.is_cpu():
            raise PlatformError(
                "an engine without a GPU needs vLLM's build for CPUs, not the one for GPUs that is installed: give the "
                "workers GPUs (ufm.workers.gpu=yes), or pip install 'gubs[cpu]'"
            )
        self._asleep: tuple[str, ...] = ()
        self._discarded = False
        self._queued: dict[str, tuple[int, tuple[int, ...]]] = {}
        """Number and labels of the requests that `collect` will answer, by vLLM's id."""

    @functools.cached_property
    def _llm(self) -> "LLM":
        from vllm import LLM

        with quick_imports():
            return LLM(**engine_arguments(self.shape, self._cpu))

    def ready(self) -> int:
        """Loads the model unless it is loaded; returns the process id."""
        assert self._llm
        return os.getpid()

    def generate(self, requests: Sequence[Request], choices: Sequence[str] | None = None) -> list[Response]:
        """Generates the answers, all at once.

        Args:
            requests: prompts with their seeds and temperatures.
            choices: if given, the whole answer must be one of these texts.

        Raises:
            PlatformError: it has slept and was sent no weights since.
        """
        self.wake()  # even without requests: only an engine that is fully awake can be put to sleep
        if not requests:
            return []
        prompts, parameters = self._prepared(requests, choices)
        outputs = self._llm.generate(prompts, parameters, use_tqdm=False)
        return [read_output(o.outputs[0], r.labels, self.version) for o, r in zip(outputs, requests, strict=True)]

    def enqueue(self, requests: Sequence[Request], first: int) -> None:
        """Queues requests for `collect`, numbered from `first`."""
        self.wake()
        prompts, parameters = self._prepared(requests, None)
        ids = self._llm.enqueue(prompts, parameters, use_tqdm=False)
        public = (i.rsplit("-", 1)[0] for i in ids)  # vLLM adds random characters, which answers come without
        self._queued |= {i: (first + k, requests[k].labels) for k, i in enumerate(public)}

    def collect(self, least: int) -> list[tuple[int, Response]]:
        """Computes until at least `least` queued requests are answered, or all are; (number, answer) each."""
        answers: list[tuple[int, Response]] = []
        engine = self._llm.llm_engine
        while len(answers) < least and engine.has_unfinished_requests():
            done = [o for o in cast("list[RequestOutput]", engine.step()) if o.finished]
            for output in done:
                number, labels = self._queued.pop(output.request_id)
                answers.append((number, read_output(output.outputs[0], labels, self.version)))
        return answers

    def sleep(self) -> None:
        """Releases the GPU's memory: weights and cache are dropped, and `load` must come before the next answer. No
        effect on a CPU.
        """
        if self.shape.rollout.sleep and not self._cpu and not self._asleep:
            self._llm.sleep(level=_DISCARD)
            self._asleep, self._discarded = _PARTS, True

    def wake(self, weights_only: bool = False) -> None:
        """Takes the GPU's memory back; without `weights_only` it has to hold weights again."""
        if self._discarded and not weights_only:
            raise PlatformError("the rollout engine dropped its weights when it went to sleep and was sent no new ones")
        parts = [p for p in self._asleep if p == "weights" or not weights_only]
        if parts:
            self._llm.wake_up(tags=parts)
            self._asleep = tuple(p for p in self._asleep if p not in parts)

    def load(self, weights: "Iterable[tuple[str, Tensor]]", version: int) -> list[str]:
        """Loads new weights by the checkpoint's names, and empties the caches of the old ones.

        Returns:
            Names of the engine's parameters that were not given: they keep their old values.
        """
        self.wake(weights_only=True)
        missing = self._llm.collective_rpc(_reload, args=(list(weights),))[0]
        self._discarded = False
        self.forget()
        self.version = version
        return list(missing)

    def receive(self, pack: "Pack", version: int) -> list[str]:
        """`load` for weights from another process."""
        return self.load(pack.tensors(), version)

    def forget(self) -> None:
        """Empties the caches of prefixes, of processed pictures and of their embeddings."""
        if not self._asleep:
            self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        engine = self._llm.llm_engine
        if hasattr(engine, "reset_encoder_cache"):
            engine.reset_encoder_cache()

    def figures(self) -> dict[str, float]:
        """Totals since the start: prompt tokens looked up in the prefix cache and hits; the same for pictures."""
        metrics: Any = self._llm.get_metrics()
        values = {m.name: float(m.value) for m in metrics if m.name in FIGURES.values()}  # histograms have no value
        return {name: values.get(counter, 0.0) for name, counter in FIGURES.items()}

    def hang(self, seconds: float) -> None:
        """Blocks for that long, like an engine that hangs: for tests of the deadline."""
        time.sleep(seconds)

    def _prepared(
        self, requests: Sequence[Request], choices: Sequence[str] | None
    ) -> tuple[list[Any], "list[SamplingParams]"]:
        """Prompts and sampling parameters as vLLM takes them."""
        return [dict(r.prompt) for r in requests], [sampling(r, self.shape, choices) for r in requests]


def sampling(request: Request, shape: Shape, choices: Sequence[str] | None = None) -> "SamplingParams":
    """A request's parameters for vLLM. Within one engine either all requests have labels or none: in a batch with both,
    vLLM gives no log-probabilities to the others.
    """
    from vllm import SamplingParams

    more: Any = {"logprob_token_ids": list(request.labels)} if request.labels else {"logprobs": 0}
    if choices:
        from vllm.sampling_params import StructuredOutputsParams

        more["structured_outputs"] = StructuredOutputsParams(choice=list(choices))
    return SamplingParams(
        temperature=request.temperature,
        top_p=1.0,
        top_k=0,
        max_tokens=request.max_tokens or shape.inputs.max_new_tokens,
        min_tokens=min(shape.rollout.min_new_tokens, request.max_tokens or shape.inputs.max_new_tokens),
        seed=request.seed,
        detokenize=False,
        skip_special_tokens=False,
        **more,
    )


def read_output(output: "CompletionOutput", labels: Sequence[int], version: int = 0) -> Response:
    """A response from vLLM's output."""
    ids = tuple(output.token_ids)
    steps = cast("Sequence[Mapping[int, Logprob]]", output.logprobs)  # every request asks for them: see `sampling`
    logprobs = tuple(step[token].logprob for token, step in zip(ids, steps, strict=True))
    of_labels = tuple(tuple(step[label].logprob for label in labels) for step in steps) if labels else ()
    return Response(ids, logprobs, version, of_labels)


def start_rollout(shape: Shape, *, gpu_ids: Sequence[str] = (), node_id: str = "") -> "ActorHandle[Engine]":
    """Starts an `Engine` in a Ray actor on the caller's node and GPU; returns the handle at once.

    Args:
        shape: the engine.
        gpu_ids: the caller's own device ids; empty = a CPU engine.
        node_id: the caller's node; empty = anywhere.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    variables = {**environment(shape.rollout), "CUDA_VISIBLE_DEVICES": ",".join(gpu_ids)}
    if shape.threads:
        variables["OMP_NUM_THREADS"] = str(shape.threads)
    remote: Any = ray.remote(Engine)
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "runtime_env": {"env_vars": variables}}
    if node_id:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return remote.options(**options).remote(shape)


def alone(rollout: RolloutSettings, gpu_memory: float = 0.9) -> RolloutSettings:
    """Settings of an engine that has its GPU to itself: a larger share of it, and no sleep."""
    return rollout.model_copy(update={"gpu_memory": gpu_memory, "sleep": False})


def environment(rollout: RolloutSettings) -> dict[str, str]:
    """Environment variables of an engine's process."""
    runner = _RUNNERS.get(rollout.model_runner)
    return ENVIRONMENT | ({"VLLM_USE_V2_MODEL_RUNNER": runner} if runner else {})


def engine_arguments(shape: Shape, cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's engine, offline or asynchronous."""
    rollout = shape.rollout
    longest = shape.inputs.max_prompt_tokens + shape.inputs.max_new_tokens
    common = {
        "model": shape.folder,
        "dtype": shape.model.dtype,
        "max_num_seqs": rollout.max_num_seqs,
        "max_model_len": longest,
        "distributed_executor_backend": "uni",
        "limit_mm_per_prompt": dict.fromkeys(("video", "image"), int(shape.pictures)),
        "logprobs_mode": "raw_logprobs",
        "disable_log_stats": False,
        "seed": 0,
    }
    if cpu:
        bytes_ = int(rollout.kv_cache_gb * 2**30)
        return {
            **common,
            "enforce_eager": True,
            "kv_cache_memory_bytes": bytes_,
            "block_size": _BLOCK,
            # a seeded sample whose prompt is read in parts would rewind its generator, which CPU generators cannot do
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(_READ_AT_ONCE, longest),
        }
    return {
        **common,
        "limit_mm_per_prompt": _clip_limits(shape),
        "enforce_eager": rollout.enforce_eager,
        "gpu_memory_utilization": rollout.gpu_memory,
        "enable_sleep_mode": rollout.sleep,
    }


def _clip_limits(shape: Shape) -> dict[str, Any]:
    """Number and size of the pictures in a prompt. At its start vLLM computes a clip of that size and keeps the memory
    for it; without sizes it would be the largest that fits a prompt, whatever the videos are like.
    """
    if not shape.pictures or shape.largest is None:
        return dict.fromkeys(("video", "image"), int(shape.pictures))
    tiles = math.ceil(shape.largest.max_pixels / _TILE**2)
    across = math.ceil(math.sqrt(tiles))
    sides = {"width": _TILE * across, "height": _TILE * math.ceil(tiles / across)}
    return {"video": {"count": 1, "num_frames": shape.largest.count, **sides}, "image": {"count": 1, **sides}}


def _reload(worker: "Worker", weights: "list[tuple[str, Tensor]]") -> list[str]:
    """Runs in vLLM's worker. vLLM keeps a tied head apart: without a new one it would keep a stale one."""
    names = {name for name, _ in weights}
    missing = _not_given(worker.model_runner.get_model(), names)
    worker.reload_weights(weights_iterator=iter(weights))
    return missing


def _not_given(model: "nn.Module", names: set[str]) -> list[str]:
    """Checkpoint names that the engine's model needs and that are not among `names`."""
    needed = {"lm_head.weight"} if hasattr(model, "language_model") else set()
    return sorted(needed - names)
