"""The Predictor: how queries are dealt to engines and answers come back, in bounded memory; and that it gives what the
engine itself gives."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import ray
from ufm_helpers import image_prompt, text_prompt, tiny_inputs, video_prompt

from gubs.errors import PlatformError
from gubs.evaluate import answers, judge
from gubs.evaluate.answers import AnswerLog
from gubs.ufm import predict
from gubs.ufm.inputs import Prompt
from gubs.ufm.predict import Prediction, Predictor, Query
from gubs.ufm.rollout import Request, Response
from gubs.ufm.settings import UFMSettings

LONGEST = 10
"""Characters of the longest prompt that the stub of `Inputs` lets through."""
WINDOW = 64
CHUNK, READY = WINDOW // 4, predict._READY_CHUNKS


class Texts:
    """`Inputs` without a model: a prompt is its text, an answer one number."""

    def __init__(self, *_: object):
        pass

    def encode(self, prompt: Prompt) -> str:
        return prompt.text

    def fits(self, encoded: str) -> bool:
        return len(encoded) <= LONGEST

    def for_engine(self, encoded: str) -> dict[str, str]:
        return {"prompt": encoded}

    def text(self, ids: tuple[int, ...]) -> tuple[str, bool]:
        return f"answer {ids[0]}", True


@ray.remote(num_cpus=0)
class Echo:
    """Answers with the request's seed; lives as long as the test."""

    def __init__(self, log: str = "", pause_s: float = 0.0, mishap: str = ""):
        self.log, self.pause_s, self.mishap = log, pause_s, mishap
        self.asked: list[tuple[int, Request]] = []

    def ready(self) -> int:
        return os.getpid()

    def enqueue(self, requests: list[Request], first: int) -> None:
        if self.mishap == "refuses":
            raise ValueError("this prompt cannot be read")
        self.asked += [] if self.mishap == "loses" else enumerate(requests, first)

    def collect(self, least: int) -> list[tuple[int, Response]]:
        if self.mishap == "dies":
            os._exit(1)
        time.sleep(60 if self.mishap == "hangs" else self.pause_s)
        done, self.asked = self.asked[:least], self.asked[least:]
        if self.log:
            with Path(self.log).open("a") as f:
                f.write("." * len(done))
        return [(number, Response((r.seed,), (-r.temperature,), 0)) for number, r in done]


NEVER = Echo.options(resources={"a GPU that is busy": 1})
Start = Callable[[], Any]


@pytest.fixture
def opened(monkeypatch, ray_local) -> Iterator[Callable[..., Predictor]]:
    """Predictors with these engines, a function each, that are closed in the end."""
    made: list[Predictor] = []

    def open_(*engines: Start, deadline: float = 100.0) -> Predictor:
        left = iter(engines)
        monkeypatch.setattr(predict, "Inputs", Texts)
        monkeypatch.setattr(predict, "_start", lambda *_: next(left)())
        ufm = UFMSettings(rollout={"max_num_seqs": WINDOW // 2}, workers={"stuck_after_s": deadline})
        made.append(Predictor("folder", ufm, engines=len(engines)))
        return made[-1]

    yield open_
    for predictor in made:
        predictor.close()


def queries(count: int, too_long: Iterable[int] = ()) -> list[Query]:
    long = set(too_long)
    return [Query(("key", i), Prompt("x" * (LONGEST + 1) if i in long else "x"), i, i % 2) for i in range(count)]


def encoders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "gubs-encode"]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """Whatever ends a stream, its thread ends with it."""
    yield
    until = time.monotonic() + 10
    while encoders() and time.monotonic() < until:
        time.sleep(0.05)
    assert not encoders()


def check(predictions: list[Prediction], count: int, too_long: Iterable[int] = ()) -> None:
    """Every query has one prediction, with its own key and the answer to its own request."""
    long = set(too_long)
    assert Counter(p.key for p in predictions) == Counter(("key", i) for i in range(count))
    for p in predictions:
        _, i = p.key
        if i in long:
            assert p == Prediction(p.key, None)
        else:
            assert p == Prediction(p.key, f"answer {i}", True, Response((i,), (-(i % 2),), 0))


@pytest.mark.parametrize("count", [0, 1, CHUNK, WINDOW + 1, 10 * WINDOW + 5])
@pytest.mark.parametrize("engines", [1, 2])
def test_every_query_is_answered_once(opened, count, engines):
    predictor = opened(*[Echo.remote] * engines)
    check(list(predictor.stream(queries(count))), count)


@pytest.mark.parametrize(
    "too_long",
    [range(300), [0, 299], range(0, 300, 2), range(100, 300), range(200)],
    ids=["all", "first and last", "every second", "all at the end", "all at the start"],
)
def test_a_prompt_that_is_too_long_is_not_asked_and_told(opened, too_long):
    """Left out without a word, it would make every measure look better than it is."""
    check(list(opened(Echo.remote).stream(queries(300, too_long))), 300, too_long)


def test_a_predictor_takes_one_stream_after_the_other(opened):
    predictor = opened(Echo.remote)
    for count in (100, 7):
        check(list(predictor.stream(queries(count))), count)


def test_an_engine_that_waits_for_a_busy_gpu_keeps_nothing_from_the_others(opened):
    """Nor does anybody wait for it in the end, when everything is answered."""
    predictor, began = opened(NEVER.remote, Echo.remote, deadline=60.0), time.monotonic()
    check(list(predictor.stream(queries(200))), 200)
    assert time.monotonic() - began < 50


def test_where_no_engine_comes_up_it_is_said(opened):
    with pytest.raises(PlatformError, match="no engine was up or answered within 1 s"):
        list(opened(NEVER.remote, deadline=1.0).stream(queries(3)))


def test_an_engine_that_dies_is_an_error(opened):
    with pytest.raises(PlatformError, match="an engine died"):
        list(opened(lambda: Echo.remote(mishap="dies")).stream(queries(200)))


def test_an_engine_that_does_not_answer_in_time_is_an_error(opened):
    predictor, began = opened(lambda: Echo.remote(mishap="hangs"), deadline=2.0), time.monotonic()
    with pytest.raises(PlatformError, match="no engine was up or answered within 2 s"):
        list(predictor.stream(queries(200)))
    assert time.monotonic() - began < 30


def test_an_engine_that_refuses_a_request_is_an_error(opened):
    """Else one would wait for its answer for ever."""
    with pytest.raises(ValueError, match="this prompt cannot be read"):
        list(opened(lambda: Echo.remote(mishap="refuses")).stream(queries(200)))


class NoMoreError(Exception):
    pass


@pytest.mark.parametrize("after", [0, 5, 200])
def test_an_error_while_queries_are_drawn_is_the_callers(opened, after):
    """It is raised in a thread, where nobody would hear of it."""

    def drawn() -> Iterator[Query]:
        yield from queries(after)
        raise NoMoreError("the data set is damaged")

    with pytest.raises(NoMoreError, match="the data set is damaged"):
        list(opened(Echo.remote).stream(drawn()))


def test_a_stream_that_is_left_early_draws_no_more(opened):
    drawn = []

    def endless() -> Iterator[Query]:
        for i in range(10**9):
            drawn.append(i)
            yield Query(i, Prompt("x"))

    with closing(opened(Echo.remote).stream(endless())) as stream:
        next(stream)
    until = time.monotonic() + 10
    while encoders() and time.monotonic() < until:
        time.sleep(0.05)
    count = len(drawn)
    time.sleep(0.5)
    assert len(drawn) == count < 10 * WINDOW


def test_a_stream_that_was_left_early_gives_the_next_one_no_answers(opened):
    """The engine still has its requests; an answer under the wrong key would be believed."""
    predictor = opened(lambda: Echo.remote(pause_s=0.1))
    with closing(predictor.stream(Query(None, Prompt("x"), seed=7 + i) for i in range(500))) as stream:
        next(stream)
    check(list(predictor.stream(queries(300))), 300)


def test_an_engine_that_loses_requests_is_an_error(opened):
    with pytest.raises(PlatformError, match="an engine lost 3 requests"):
        list(opened(lambda: Echo.remote(mishap="loses")).stream(queries(3)))


@pytest.mark.parametrize("engines", [1, 2])
def test_queries_are_drawn_only_so_far_ahead_of_the_answers(opened, tmp_path, engines):
    """Prompts hold pictures: drawn without a bound, a large data set would fill the memory before it is answered."""
    logs = [tmp_path / str(i) for i in range(engines)]
    for log in logs:
        log.touch()
    ahead: list[int] = []

    def drawn() -> Iterator[Query]:
        for i, query in enumerate(queries(1000)):
            ahead.append(i + 1 - sum(log.stat().st_size for log in logs))
            yield query

    slow = [lambda log=log: Echo.remote(log=str(log), pause_s=0.1) for log in logs]
    check(list(opened(*slow).stream(drawn())), 1000)
    limit = engines * WINDOW + READY * CHUNK + CHUNK
    assert max(ahead) <= limit
    assert max(ahead) > limit - CHUNK, "the bound was never met: nothing was tested"


def test_no_more_engines_judge_than_there_is_work_for(monkeypatch, tmp_path):
    """An engine takes a minute to start, which a few answers do not pay for; on CPUs one takes all cores."""
    asked: list[int] = []

    class Noted:
        def __init__(self, *_: object, engines: int, **__: object):
            asked.append(engines)

        def __enter__(self) -> "Noted":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def stream(self, _: object) -> list[Prediction]:
            return []

    monkeypatch.setattr(answers, "Predictor", Noted)
    monkeypatch.setattr(judge, "Inputs", lambda *_: None)
    ufm, questions = UFMSettings(workers={"count": 4}), SimpleNamespace(pictures=True, largest=None)
    log = AnswerLog(fsspec.filesystem("file"), str(tmp_path))
    for gpu in (True, False):
        monkeypatch.setattr(answers, "use_gpu", lambda _, gpu=gpu: gpu)
        for items in (
            1,
            answers._ANSWERS_PER_ENGINE // 2,
            answers._ANSWERS_PER_ENGINE // 2 + 1,
            50 * answers._ANSWERS_PER_ENGINE,
        ):
            judge.ask([()] * items, [], questions, Path(), ufm, 1, 0, log)
    assert asked == [1, 1, 2, 4, 1, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_answers_are_those_that_the_engine_gives_by_itself(tiny, ray_local):
    """Same prompts, same seeds, greedy, in other batches: texts and pictures of both kinds, more than one window."""
    settings = {"max_prompt_tokens": 256, "max_new_tokens": 12}
    ufm = UFMSettings(
        model={"dtype": "float32"},
        inputs=settings,
        rollout={"kv_cache_gb": 0.1, "max_num_seqs": 8},
        workers={"stuck_after_s": 400},
    )
    kinds = (text_prompt, image_prompt, video_prompt)
    prompts = [kinds[i % 3](f"Playing.\nUser: {i} likes pets") for i in range(2 * WINDOW + 10)]
    prompts[5] = text_prompt("word " * 400)
    inputs = tiny_inputs(tiny, **settings)
    with Predictor(tiny, ufm) as predictor:
        predictions = {p.key: p for p in predictor.stream(Query(i, p, seed=i) for i, p in enumerate(prompts))}
        fitting = [i for i in range(len(prompts)) if i != 5]
        asked = [Request(inputs.for_engine(inputs.encode(prompts[i])), i, 0.0) for i in fitting]
        wanted: list[Response] = ray.get(predictor._engines[0].generate.remote(asked), timeout=300)
    assert sorted(predictions) == list(range(len(prompts)))
    assert predictions[5] == Prediction(5, None)
    assert [predictions[i].response.ids for i in fitting] == [r.ids for r in wanted]
    assert [(predictions[i].text, predictions[i].finished) for i in fitting] == [inputs.text(r.ids) for r in wanted]
    assert len({r.ids for r in wanted}) > 1, "all answers are alike: one could not tell them apart"
    ours = [p for i in fitting for p in predictions[i].response.logprobs]
    assert ours == pytest.approx([p for r in wanted for p in r.logprobs], abs=1e-4)
