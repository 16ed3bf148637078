"""`Predictor`: asks a policy about people and videos, any number of questions in bounded memory.

    with Predictor(folder, ufm, engines=1) as predictor:
        for prediction in predictor.stream(queries): ...

Queries are drawn and encoded in a thread while the engines answer. Each engine holds at most twice as many requests as
it answers at the same time, and is topped up by chunks of half as many, so it never runs dry. Pictures stay uint8
frames on the way; only vLLM turns them into pixel values.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from gubs.errors import PlatformError
from gubs.ray_runtime import Actor
from gubs.ufm.inputs import Inputs, Prompt
from gubs.ufm.labels import Labels, OptionProbabilities
from gubs.ufm.model import cpu_threads
from gubs.ufm.rollout import Engine, Request, Response, Shape, alone, start_rollout
from gubs.ufm.settings import UFMSettings
from gubs.video.decoded import DecodeOptions

if TYPE_CHECKING:
    from ray import ObjectRef

Key = Any
"""Whatever the caller wants to find a prediction by."""

_READY_CHUNKS = 2
"""Encoded chunks that wait for an engine."""


@dataclass(frozen=True)
class Query:
    """One question to the policy."""

    key: Key
    """Carried through to the prediction."""
    prompt: Prompt
    seed: int = 0
    temperature: float = 0.0
    """0 = greedy, 1 = by the model's own probabilities."""
    labels: Labels | None = None
    """Read the options' probabilities at the place of the letter."""
    score: bool = False
    """Force an empty thought: only the letter is asked for. Needs `labels`."""


@dataclass(frozen=True)
class Prediction:
    """What the policy answered."""

    key: Key
    text: str | None
    """None: the prompt is too long and was not asked."""
    finished: bool = False
    """The answer ended by itself; False = the token limit cut it off."""
    response: Response | None = None
    options: OptionProbabilities | None = None
    """Of a query with labels; None if the answer names no option."""


def request_of(inputs: Inputs, query: Query) -> Request | None:
    """A query as an engine takes it; None if its prompt is too long."""
    encoded = inputs.encode(query.prompt)
    if not inputs.fits(encoded):
        return None
    tokens = query.labels.tokens if query.labels else ()
    if not (query.labels and query.score):
        return Request(inputs.for_engine(encoded), query.seed, query.temperature, tokens)
    prompt = inputs.for_engine(encoded) | {"prompt_token_ids": [*encoded.engine_ids, *query.labels.forced]}
    return Request(prompt, query.seed, query.temperature, tokens, max_tokens=1)


def read_options(inputs: Inputs, labels: Labels, response: Response, *, score: bool) -> OptionProbabilities | None:
    """The options' probabilities where a response names its option; None if it names none.

    Args:
        inputs: of the policy.
        labels: those that the request asked for.
        response: to the request.
        score: the thought was forced to be empty, so that the response is the letter.
    """
    place = 0 if score else labels.place(response.ids, inputs.tokenizer.decode)
    return None if place is None else labels.probabilities(response.label_logprobs[place])


@dataclass
class _Lane:
    """One engine and the requests it is busy with."""

    engine: Actor
    waiting: "ObjectRef[list[tuple[int, Response]]]"
    asked: "dict[int, _Asked]" = field(default_factory=dict)
    """What the requests without an answer so far are about, by number."""
    sent: "list[ObjectRef[None]]" = field(default_factory=list)
    """Calls that sent requests since `waiting` was submitted."""
    before: "list[ObjectRef[None]]" = field(default_factory=list)
    """Those before `waiting`, so they are done when it is; they fail if the engine refused a request."""

    def collect(self, least: int) -> None:
        """Asks for the next answers."""
        self.waiting = self.engine.collect.remote(least)
        self.before, self.sent = self.sent, []


class Predictor:
    """Engines with one policy; a context manager. Ray has to be running."""

    def __init__(
        self,
        folder: str | Path,
        ufm: UFMSettings,
        *,
        pictures: bool = True,
        largest: DecodeOptions | None = None,
        engines: int = 1,
        gpu: bool = False,
    ):
        """Starts the engines; they load while the first prompts are encoded.

        Args:
            folder: checkpoint of the policy.
            ufm: `model`, `inputs` and `rollout` describe an engine, `workers` says how long one may take.
            pictures: some prompts have pictures; otherwise no memory is set aside for them.
            largest: see `Shape`.
            engines: how many; on CPUs one engine uses all cores.
            gpu: give each engine a GPU.
        """
        self._inputs = Inputs(folder, ufm.inputs)
        self._window = 2 * ufm.rollout.max_num_seqs
        self._chunk = max(1, ufm.rollout.max_num_seqs // 2)
        self._deadline = ufm.workers.stuck_after_s
        threads = cpu_threads(engines) if gpu else 0  # engines of several GPUs share the cores
        rollout = alone(ufm.rollout)
        shape = Shape(str(folder), ufm.model, ufm.inputs, rollout, threads, pictures=pictures, largest=largest)
        self._engines = [_start(shape, gpu) for _ in range(engines)]
        self._asked = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engines."""
        import ray

        for engine in self._engines:
            ray.kill(engine)
        self._engines = []

    def stream(self, queries: Iterable[Query]) -> Iterator[Prediction]:
        """Yields predictions as they come, in no particular order; every query gets one.

        Raises:
            PlatformError: an engine died, lost a request, or did not answer in time. Also whatever `queries` raises, or
                an engine that refuses a request.
        """
        import ray
        from ray.exceptions import RayActorError

        chunks = _Encoder(queries, self._inputs, self._chunk)
        lanes = {lane.waiting: lane for lane in (_Lane(e, e.ready.remote()) for e in self._engines)}
        try:
            while not chunks.ended or any(lane.asked for lane in lanes.values()):
                ready, _ = ray.wait(list(lanes), timeout=self._deadline)
                if not ready:
                    raise PlatformError(f"no engine was up or answered within {self._deadline:g} s")
                lane = lanes.pop(ready[0])
                *_, answers = ray.get([*lane.before, ready[0]])
                lane.before = []
                answered = sum(number in lane.asked for number, _ in answers) if lane.asked else 0
                going_on = len(lane.asked) > answered > 0
                if going_on:  # at once: the engine answers while these answers are read and others are sent
                    lane.collect(self._chunk)
                done = self._take(lane, answers) if lane.asked else []
                done += self._top_up(lane, chunks)
                if lane.asked and not going_on:
                    lane.collect(self._chunk)
                if lane.asked:
                    lanes[lane.waiting] = lane
                yield from done
        except RayActorError as e:
            raise PlatformError(f"an engine died: {e}") from None
        finally:
            chunks.stop()

    def _take(self, lane: _Lane, answers: list[tuple[int, Response]]) -> list[Prediction]:
        if not answers:
            raise PlatformError(f"an engine lost {len(lane.asked)} requests")
        predictions = []
        for number, response in answers:
            if number in lane.asked:  # otherwise it belongs to a stream that was left early
                asked = lane.asked.pop(number)
                text, finished = self._inputs.text(response.ids)
                options = (
                    read_options(self._inputs, asked.labels, response, score=asked.score) if asked.labels else None
                )
                predictions.append(Prediction(asked.key, text, finished, response, options))
        return predictions

    def _top_up(self, lane: _Lane, chunks: "_Encoder") -> list[Prediction]:
        """Fills the lane's window; waits for the encoder only if the engine would be idle."""
        too_long: list[Prediction] = []
        while len(lane.asked) + self._chunk <= self._window:
            chunk = chunks.next(self._deadline, wait=not lane.asked)
            if chunk is None:
                break
            too_long += [Prediction(asked.key, None) for asked, request in chunk if request is None]
            fitting = [(asked, request) for asked, request in chunk if request is not None]
            if fitting:
                first, self._asked = self._asked, self._asked + len(fitting)
                lane.asked |= dict(enumerate((asked for asked, _ in fitting), first))
                lane.sent.append(lane.engine.enqueue.remote([request for _, request in fitting], first))
        return too_long


@dataclass(frozen=True, slots=True)
class _Asked:
    """What has to be known of a query to read its answer."""

    key: Key
    labels: Labels | None
    score: bool


_Chunk = list[tuple[_Asked, Request | None]]
"""Encoded queries; None = too long."""


class _Encoder:
    """Draws and encodes queries in a thread, a few chunks ahead."""

    def __init__(self, queries: Iterable[Query], inputs: Inputs, size: int):
        self._inputs, self._size = inputs, size
        self.ended = False
        """All chunks were taken."""
        self._stopped = threading.Event()
        self._chunks: queue.Queue[_Chunk | BaseException | None] = queue.Queue(_READY_CHUNKS)
        threading.Thread(target=self._run, args=(queries,), name="gubs-encode", daemon=True).start()

    def next(self, timeout_s: float, *, wait: bool) -> _Chunk | None:
        """The next chunk; None at the end of the queries, or if none is ready and `wait` is false.

        Raises:
            PlatformError: none came in time. Also whatever the queries raised.
        """
        if self.ended:
            return None
        try:
            chunk = self._chunks.get(wait, timeout_s)
        except queue.Empty:
            if wait:
                raise PlatformError(f"no prompt was encoded within {timeout_s:g} s") from None
            return None
        if isinstance(chunk, BaseException):
            raise chunk
        self.ended = chunk is None
        return chunk

    def stop(self) -> None:
        """Ends the thread at its next chunk."""
        self._stopped.set()

    def _run(self, queries: Iterable[Query]) -> None:
        encoded = ((_Asked(q.key, q.labels, q.score), self._request(q)) for q in queries)
        try:
            while chunk := list(islice(encoded, self._size)):
                if not self._put(chunk):
                    return
            self._put(None)
        except BaseException as e:  # noqa: BLE001 - raised where the answers are read
            self._put(e)

    def _request(self, query: Query) -> Request | None:
        return request_of(self._inputs, query)

    def _put(self, chunk: _Chunk | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._chunks.put(chunk, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


def _start(shape: Shape, gpu: bool) -> Actor:
    """An engine in an actor, on a GPU that Ray assigns to it or on the CPUs."""
    import ray

    if not gpu:
        return start_rollout(shape)
    engine: Actor = ray.remote(Engine)
    return engine.options(num_gpus=1, num_cpus=0).remote(shape)
