"""What the engines of the service and of the batch job are asked: their seeds follow from the question's content."""

import asyncio
import io
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from serving_helpers import make_filter

from gubs.errors import InputError
from gubs.records import Task
from gubs.serving import batch, engine
from gubs.serving.bundle import Bundle
from gubs.serving.filter import Mode, thoughts_seed
from gubs.serving.schemas import Candidate, FilterRequest, UserRef
from gubs.serving.service import FilterService
from gubs.serving.settings import ServingSettings
from gubs.ufm.inputs import Prompt
from gubs.ufm.prompting import PromptBuilder
from gubs.ufm.rollout import Response
from gubs.ufm.settings import RolloutSettings
from gubs.video.clips import Clip
from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.frame_store import FrameStore

THOUGHTS = 3


class Spelled:
    """Inputs of a model that reads letters."""

    tokenizer = SimpleNamespace(decode=None)

    def encode(self, prompt):
        return prompt

    def fits(self, _):
        return True

    def for_engine(self, prompt):
        return {"prompt_token_ids": [ord(c) for c in prompt.text]}

    def text(self, _):
        return "", True


LABELS = SimpleNamespace(tokens=(), forced=(), place=lambda *_: None)


class Llm:
    """vLLM's asynchronous engine, which answers nothing that can be read and remembers what it was asked."""

    model_config = None
    renderer = SimpleNamespace(render_cmpl=lambda prompts: [prompts[0], *prompts[1:]])  # vLLM's refuses none at all

    def __init__(self):
        self.asked, self.lacks = [], 0
        """How many more questions it ends with an error, for lack of their pictures."""

    async def generate(self, prompt, parameters, _):
        self.asked.append((prompt, parameters))
        why, self.lacks = "error" if self.lacks > 0 else "stop", self.lacks - 1
        outputs = [SimpleNamespace(token_ids=(), logprobs=(), finish_reason=why)] * parameters.n
        yield SimpleNamespace(outputs=outputs, prompt_token_ids=prompt["prompt_token_ids"], num_cached_tokens=0)


@pytest.fixture
def no_vllm(monkeypatch):
    """The few names of vLLM that an answer needs, without the 9 s of its import."""
    for name, attribute in {
        "vllm": None,
        "vllm.sampling_params": "RequestOutputKind",
        "vllm.renderers": None,
        "vllm.renderers.inputs": None,
        "vllm.renderers.inputs.preprocess": "parse_model_prompt",
        "vllm.v1": None,
        "vllm.v1.engine": None,
        "vllm.v1.engine.exceptions": "EngineDeadError",
    }.items():
        module = ModuleType(name)
        if attribute:
            setattr(module, attribute, type(attribute, (Exception,), {"FINAL_ONLY": "final"}))
        if attribute == "parse_model_prompt":
            module.parse_model_prompt = lambda _, prompt: prompt
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(engine, "sampling", lambda request, _: SimpleNamespace(seed=request.seed))


def asking(version="v", thoughts=THOUGHTS):
    """The service's engine around a stand-in of vLLM's."""
    it = engine.FilterEngine.__new__(engine.FilterEngine)
    it.__dict__ |= {"inputs": Spelled(), "labels": dict.fromkeys(Task, LABELS), "_llm": Llm(), "_shape": None}
    it.__dict__ |= {"_rendering": ThreadPoolExecutor(1), "_answered": 0.0}
    it.__dict__ |= {"_thoughts": thoughts, "_version": version, "_name": "x", "_numbers": iter(range(10**6))}
    return it


def seeds(it):
    return [parameters.seed for _, parameters in it._llm.asked]


def test_the_same_question_gets_the_same_seed_and_others_get_others(no_vllm):
    """With one seed for all, two candidates' thoughts would be drawn by the same random numbers."""
    first, again = asking(), asking()
    questions = [Prompt("one"), Prompt("two"), Prompt("one", FILM), Prompt("one")]
    asyncio.run(first.ask(Task.SEQUENTIAL, Mode.REASON, questions))
    asyncio.run(again.ask(Task.SEQUENTIAL, Mode.REASON, questions[::-1]))
    one, two, seen, repeated = seeds(first)
    assert one == repeated
    assert seeds(again) == [repeated, seen, two, one]
    asyncio.run(first.ask(Task.CLICK, Mode.REASON, [Prompt("one")]))
    other = asking("another version")
    asyncio.run(other.ask(Task.SEQUENTIAL, Mode.REASON, [Prompt("one")]))
    different = sorted({one, two, seen, seeds(first)[-1], *seeds(other)})
    assert len(different) == 5
    assert min(np.diff(different)) > THOUGHTS, "vLLM counts up from the seed, an answer each"
    assert different[0] >= 0
    assert different[-1] < 2**62


def test_a_request_without_questions_asks_nothing(no_vllm):
    """No candidate has pictures, or all prompts are too long."""
    it = asking()
    assert asyncio.run(it.ask(Task.SEQUENTIAL, Mode.SCORE, [])) == []
    it.inputs.fits = lambda _: False
    assert [a.too_long for a in asyncio.run(it.ask(Task.SEQUENTIAL, Mode.SCORE, [Prompt("long")]))] == [True]
    assert it._llm.asked == []


def test_an_engine_that_answers_is_not_quiet(no_vllm):
    it = asking()
    assert it.quiet_s > 60
    asyncio.run(it.ask(Task.SEQUENTIAL, Mode.REASON, [Prompt("one")]))
    assert it.quiet_s < 60


def test_an_engine_runs_nothing_that_messages_contain(monkeypatch):
    """Whatever the cluster's environment says."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(engine, "engine_shape", lambda *_: SimpleNamespace(rollout=RolloutSettings()))

    def importing():
        raise InterruptedError

    monkeypatch.setattr(engine, "quick_imports", importing)
    for name in engine.environment(RolloutSettings()):
        monkeypatch.setenv(name, "restored later")
    with pytest.raises(InterruptedError):
        engine.FilterEngine(None, None)
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in os.environ


FILM = Clip("film", np.zeros((2, 28, 28, 3), np.uint8))


@pytest.mark.parametrize(("clip", "sent"), [(FILM, 1 + engine._RESENDS), (None, 1)])
def test_a_question_whose_pictures_got_lost_is_rendered_and_sent_again(no_vllm, clip, sent):
    """One without pictures fails for another reason, each time."""
    it = asking()
    it._llm.lacks = sent - 1
    (answer,) = asyncio.run(it.ask(Task.SEQUENTIAL, Mode.REASON, [Prompt("one", clip)]))
    assert (answer.failed, answer.prompt_tokens) == (False, 3)
    assert len(it._llm.asked) == sent
    assert len({id(parameters) for _, parameters in it._llm.asked}) == sent, "rendered anew each time"
    it._llm.asked, it._llm.lacks = [], 10**6
    (answer,) = asyncio.run(it.ask(Task.SEQUENTIAL, Mode.REASON, [Prompt("one", clip)]))
    assert (answer.options, answer.failed, len(it._llm.asked)) == (None, True, sent)


def test_pictures_are_forgotten_between_two_renderings(no_vllm):
    """Not while another thread uses them."""
    it, threads = asking(), []
    cache = SimpleNamespace(invalidate=lambda key: threads.append((key, threading.current_thread().name)))
    it._llm.renderer = SimpleNamespace(mm_processor_cache=cache)
    it._rendering = ThreadPoolExecutor(1, "render")
    it._forget_in_order()
    cache.invalidate("film")
    it._rendering.shutdown()
    assert threads == [("film", "render_0")]


def test_a_seed_is_the_same_on_every_machine():
    """Python's own hash of a text would differ from process to process."""
    assert thoughts_seed("v", Task.SEQUENTIAL, Prompt("ü")) == 1848244228239026417
    assert thoughts_seed("v", Task.SEQUENTIAL, Prompt("\udcff")) >= 0, "a title may hold what is no text"


def test_prompts_of_two_keys_share_no_cache(no_vllm):
    """`cached_tokens`, and the time, would tell one client about whom another one asks."""
    it = asking()
    for salt in ("a", "b", ""):
        asyncio.run(it.ask(Task.SEQUENTIAL, Mode.REASON, [Prompt("one")], salt))
    assert [prompt.get("cache_salt") for prompt, _ in it._llm.asked] == ["a", "b", None], "vLLM refuses an empty one"


def tabled(bundle, offline):
    """The batch job's actor around a stand-in of vLLM's; `offline` gets what that is asked."""
    table = batch.BatchFilter.__new__(batch.BatchFilter)

    def generate(requests):
        offline.extend(requests)
        return [Response((), (), 0)] * len(requests)

    table.__dict__ |= {"_bundle": bundle, "_task": Task.SEQUENTIAL, "_mode": Mode.REASON, "_labels": LABELS}
    table.__dict__ |= {"_inputs": Spelled(), "_prompts": PromptBuilder(bundle.config.inputs, bundle.config.pictures)}
    table.__dict__ |= {"_engine": SimpleNamespace(generate=generate)}
    return table


def test_batch_and_service_draw_the_same_thoughts(no_vllm, tmp_path):
    bundle, offline = Bundle(make_filter(tmp_path)), []
    bundle.config = bundle.config.model_copy(update={"thoughts": THOUGHTS})
    online = asking(bundle.version)
    request = FilterRequest(user=UserRef(id="u0"), candidates=[Candidate(id="v1"), Candidate(id="v2")])
    asyncio.run(FilterService(bundle, online, ServingSettings()).decide(request, Mode.REASON))
    tabled(bundle, offline)(pa.table({"user_id": ["u0", "u0"], "video_id": ["v1", "v2"]}))
    assert [r.seed for r in offline] == [seed + k for seed in seeds(online) for k in range(THOUGHTS)]


@pytest.fixture
def filmed(tmp_path):
    """A filter with the frames of v1; those of v2 are lost, those of v3 are too long for the model."""
    store = FrameStore(str(tmp_path / "store"), DecodeOptions(max_pixels=300 * 28 * 28))

    def jpeg(width):
        buffer = io.BytesIO()
        Image.fromarray(np.zeros((28, width, 3), np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    for name, width in (("v1", 56), ("v3", 28 * 256)):
        frames = [jpeg(width)] * 2
        decoded = Decoded(Verdict.OK, frames=frames, cover=frames[0], times_s=[0.0, 1.0], duration_s=2.0)
        store.write_part(name, [(f"hash-of-{name}", decoded)])
    hashes = {name: f"hash-of-{name}" for name in ("v1", "v2", "v3")}
    return Bundle(make_filter(tmp_path / "run", frames=hashes, store=store))


@pytest.mark.parametrize("vision", [True, False])
def test_batch_and_service_show_the_same_pictures_and_keep_what_has_none(no_vllm, filmed, vision):
    """A lost frame ended the whole job; with `vision` off the service shows none, and the job did."""
    inputs = filmed.config.inputs.model_copy(update={"vision": vision})
    filmed.config = filmed.config.model_copy(update={"inputs": inputs})
    offline, online, videos = [], asking(filmed.version), ["v1", "v2", "v3", "v4"]
    table = tabled(filmed, offline)(pa.table({"user_id": ["u0"] * 4, "video_id": videos}))
    request = FilterRequest(user=UserRef(id="u0"), candidates=[Candidate(id=v) for v in videos])
    served = asyncio.run(FilterService(filmed, online, ServingSettings()).decide(request, Mode.REASON)).results
    assert table["error"].to_pylist() == [r.error and r.error.code for r in served]
    lost = ["pictures" if vision else "unreadable"] * 2
    assert table["error"].to_pylist() == ["unreadable", *lost, "unreadable"]
    assert [r.seed for r in offline] == seeds(online), "a prompt with other pictures has another seed"


@pytest.mark.parametrize(
    ("tables", "out", "folders"),
    [
        (["s3://bucket/c.parquet"], "", ["s3://bucket/c.filtered"]),
        (["/data/c.parquet", "d/e.csv"], "", ["/data/c.filtered", "d/e.filtered"]),
        (["c.csv"], "", ["c.filtered"]),
        (["/data/folder/"], "", ["/data/folder.filtered"]),
        (["/data/c.parquet"], "/out", ["/out"]),
        (["a/c.parquet", "b/d.parquet"], "s3://b/out/", ["s3://b/out/c.filtered", "s3://b/out/d.filtered"]),
    ],
)
def test_where_decisions_go(tables, out, folders):
    assert batch.outs(tables, out) == folders


@pytest.mark.parametrize("tables", [["a/c.parquet", "b/c.csv"], ["c.csv", "c.parquet"]])
def test_two_tables_do_not_overwrite_each_others_decisions(tables):
    with pytest.raises(InputError, match=r"c.filtered"):
        batch.outs(tables, "out" if "/" in tables[0] else "")


@pytest.mark.parametrize(
    ("table", "out", "apart"),
    [
        ("/data", "/data", False),
        ("/data/c.parquet", "/data/", False),
        ("/data", "/data/out", False),
        ("/data/c.parquet", "/data/c.filtered", True),
        ("/data", "/data.filtered", True),
        ("memory://data", "/data", True),
    ],
)
def test_a_table_is_not_overwritten_while_it_is_read(table, out, apart):
    check = batch._check_apart
    if apart:
        check(table, out)
    else:
        with pytest.raises(InputError, match="give another --out"):
            check(table, out)
