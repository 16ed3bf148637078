"""One policy behind vLLM's asynchronous engine: questions in, option probabilities out, continuously batched."""

import asyncio
import itertools
import os
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gubs.errors import GubsError
from gubs.quick_imports import quick_imports
from gubs.records import Task
from gubs.serving.bundle import Bundle
from gubs.serving.filter import Mode, thoughts_seed
from gubs.serving.settings import ServingSettings
from gubs.ufm.inputs import Inputs, Prompt
from gubs.ufm.labels import Labels, OptionProbabilities, mean_options
from gubs.ufm.predict import Query, read_options, request_of
from gubs.ufm.rollout import Shape, alone, engine_arguments, environment, read_output, sampling

if TYPE_CHECKING:
    from vllm.inputs import EngineInput
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

    _Rendered = tuple[EngineInput, SamplingParams]


_INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"
"""With it vLLM runs what its messages contain."""
_RESENDS = 3
"""How often a question is sent again whose pictures the engine does not have."""


class EngineDiedError(GubsError):
    """The engine's process ended; nothing more comes from it."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """What the policy answered to one question."""

    options: OptionProbabilities | None
    """Their mean over the answers; None: no answer names an option, or the prompt is too long."""
    texts: tuple[tuple[str, bool], ...] = ()
    """In mode `reason`, each answer, and whether it ended by itself."""
    too_long: bool = False
    failed: bool = False
    """The engine ended the question with an error."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0


def engine_shape(bundle: Bundle, settings: ServingSettings) -> Shape:
    """What the engine of a filter is started with. Requests may bring clips of more frames than the stored ones."""
    config = bundle.config
    largest = config.frames and replace(config.frames, count=max(config.frames.count, settings.limits.frames))
    return Shape(
        str(bundle.local_policy()),
        config.model,
        config.inputs,
        alone(config.rollout, settings.gpu_memory),
        pictures=config.inputs.vision and config.pictures,
        largest=largest,
    )


class FilterEngine:
    """vLLM's engine in a process of its own, for one filter. Needs a running event loop."""

    def __init__(self, bundle: Bundle, settings: ServingSettings):
        """Loads the policy; returns when the engine is up."""
        self._shape = engine_shape(bundle, settings)
        # The asynchronous engine has a process of its own in any case. Without the variable that says otherwise, vLLM
        # would start one more for it on a CPU, for the model.
        os.environ.update(environment(self._shape.rollout))
        os.environ.pop(_INSECURE, None)
        with quick_imports():
            import torch
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
            from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        self.inputs = Inputs(self._shape.folder, self._shape.inputs)
        self.labels = {task: Labels.of(self.inputs, task) for task in Task}
        arguments = engine_arguments(self._shape, cpu=not torch.cuda.is_available())
        self._llm: AsyncLLM = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments), stat_loggers=[RayPrometheusStatLogger]
        )
        self._thoughts, self._version = bundle.config.thoughts, bundle.version
        self._name, self._numbers = uuid.uuid4().hex[:8], itertools.count()
        self._answered = time.monotonic()
        self._rendering = ThreadPoolExecutor(1, "render")
        """One thread: vLLM's renderer has a cache that is for one alone."""
        self._forget_in_order()

    def _forget_in_order(self) -> None:
        """Lets vLLM drop pictures from the renderer's cache in the renderer's thread only. It would do so in the event
        loop, between the renderer's look whether they are there and its use of them.
        """
        cache: Any = self._llm.renderer.mm_processor_cache
        if cache is not None:
            drop = cache.invalidate
            cache.invalidate = lambda key: self._rendering.submit(drop, key)

    async def ask(self, task: Task, mode: Mode, prompts: Sequence[Prompt], salt: str = "") -> list[Answer]:
        """Answers questions at the same time. If it is cancelled, the engine drops what is left.

        Mode `reason` samples as many answers as the filter was measured with; the same question gets the same ones.

        Args:
            task: of the questions.
            mode: how they are asked.
            prompts: the questions.
            salt: prompts share what is cached of their beginnings only with those of the same salt. Otherwise a client
                could tell by time, or by `cached_tokens`, which users another one asks about.

        Raises:
            EngineDiedError: the engine's process ended.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            rendered = await self._rendered(task, mode, prompts, salt)
            answers = (self._answer(task, mode, p, asked, salt) for p, asked in zip(prompts, rendered, strict=True))
            return list(await asyncio.gather(*answers))
        except EngineDeadError as e:
            raise EngineDiedError(str(e)) from None

    async def _rendered(self, task: Task, mode: Mode, prompts: Sequence[Prompt], salt: str) -> "list[_Rendered | None]":
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._rendering, self._render, task, mode, prompts, salt)

    def _render(self, task: Task, mode: Mode, prompts: Sequence[Prompt], salt: str) -> "list[_Rendered | None]":
        """The questions as the engine takes them; None where a prompt is too long.

        All of a request at once, so that the engine gets them together and computes them together. One by one, it would
        begin with the first long before the last is there.
        """
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        requests = [request_of(self.inputs, self._query(task, mode, prompt)) for prompt in prompts]
        salted = {"cache_salt": salt} if salt else {}
        config, renderer = self._llm.model_config, self._llm.renderer
        parsed = [parse_model_prompt(config, {**r.prompt, **salted}) for r in requests if r]
        inputs = iter(renderer.render_cmpl(parsed) if parsed else ())
        return [(next(inputs), sampling(r, self._shape)) if r else None for r in requests]

    def _query(self, task: Task, mode: Mode, prompt: Prompt) -> Query:
        seed, score = thoughts_seed(self._version, task, prompt), mode is Mode.SCORE
        samples = self._samples(mode)
        return Query(None, prompt, seed, 1.0 if samples > 1 else 0.0, self.labels[task], score)

    def _samples(self, mode: Mode) -> int:
        return 1 if mode is Mode.SCORE else self._thoughts

    async def _answer(self, task: Task, mode: Mode, prompt: Prompt, asked: "_Rendered | None", salt: str) -> Answer:
        if asked is None:
            return Answer(None, too_long=True)
        output = await self._output(mode, asked)
        for _ in range(_RESENDS if prompt.clip else 0):
            if not _failed(output):
                break
            (again,) = await self._rendered(task, mode, [prompt], salt)
            assert again is not None
            output = await self._output(mode, again)
        if _failed(output):
            return Answer(None, failed=True)
        score, labels = mode is Mode.SCORE, self.labels[task]
        responses = [read_output(one, labels.tokens) for one in output.outputs]
        return Answer(
            mean_options(read_options(self.inputs, labels, r, score=score) for r in responses),
            () if score else tuple(self.inputs.text(r.ids) for r in responses),
            prompt_tokens=len(output.prompt_token_ids or ()),
            cached_tokens=output.num_cached_tokens or 0,
            answer_tokens=sum(len(r.ids) for r in responses),
        )

    async def _output(self, mode: Mode, asked: "_Rendered") -> "RequestOutput":
        from vllm.sampling_params import RequestOutputKind

        prompt, parameters = asked
        parameters.n = self._samples(mode)
        parameters.output_kind = RequestOutputKind.FINAL_ONLY
        parameters.skip_clone = True  # nobody else has them; a deep copy takes longer than sending the question
        last = None
        async for output in self._llm.generate(prompt, parameters, f"{self._name}-{next(self._numbers)}"):
            last = output
        assert last is not None
        self._answered = time.monotonic()
        return last

    @property
    def running(self) -> int:
        """Questions that the engine has and has not answered yet."""
        return self._llm.get_num_unfinished_requests()

    @property
    def quiet_s(self) -> float:
        """Seconds since it answered a question, or since its start."""
        return time.monotonic() - self._answered

    async def check(self) -> None:
        """Looks whether the engine lives.

        Raises:
            EngineDiedError: it does not.
        """
        if self._llm.errored:
            raise EngineDiedError("the engine's process ended")

    def close(self) -> None:
        """Ends the engine's process."""
        self._rendering.shutdown(wait=False, cancel_futures=True)
        self._llm.shutdown()


def _failed(output: "RequestOutput") -> bool:
    """Whether the engine ended a question with an error: most likely because it lacks the pictures.

    Pictures are sent once and then kept on both sides. If a question is dropped between being rendered and being sent,
    because its client left, this side believes that the engine has them. The engine then ends the next question about
    them with an error, this side forgets them, and the question is to be sent again.
    """
    return any(one.finish_reason == "error" for one in output.outputs)
