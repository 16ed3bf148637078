"""Engine and trainer compute the same: ids, positions, log-probabilities, for text, image and video, after a sync too.

One real vLLM engine in a Ray actor serves all tests of this file. It starts from a checkpoint with loud random
weights, whose answers depend on every token and every picture, so that a difference shows.
"""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ufm_helpers import image_prompt, make_clip, text_prompt, tiny_inputs, video_prompt

from gubs.errors import PlatformError
from gubs.ufm.checkpoint import save_policy
from gubs.ufm.grpo import RolloutEngine
from gubs.ufm.health import bounds
from gubs.ufm.inputs import Encoded, Inputs, mrope_positions
from gubs.ufm.loss import Denominators, k3, policy_loss
from gubs.ufm.model import load
from gubs.ufm.rollout import ENVIRONMENT, Request, Response, Shape, sampling, start_rollout
from gubs.ufm.settings import ModelSettings, RolloutSettings
from gubs.ufm.sync import HEAD, WeightSync, packed, weights_of
from gubs.ufm.trainer import logprobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]

MODEL = ModelSettings(dtype="float32", gradient_checkpointing=False)
GPUS = ("0",) if torch.cuda.is_available() else ()
"""Ids of the GPUs that the engines of these tests get; without one they run on the CPU."""
DEVICE = torch.device("cuda" if GPUS else "cpu")
CLOSE = 2e-2 if GPUS else 1e-4
"""How far log-probabilities in float32 may be apart. On a GPU vLLM's attention multiplies in TF32, with ten bits."""
APART = 1e-1 if GPUS else 1e-2
"""How far they are at least apart where something is wrong."""
LONG = 'Playing.\nUser: {"age": 30}\n- {"title": "Rare health sleep"}\n' * 3


@pytest.fixture(scope="module")
def loud(tiny, tmp_path_factory) -> Path:
    """The tiny model with random weights three times as large as usual."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("loud") / "policy"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(tiny)).float()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3.0)
    save_policy(model, tiny_inputs(tiny), folder)
    shutil.copy(tiny / "generation_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def inputs(loud) -> Inputs:
    return tiny_inputs(loud)


@pytest.fixture(scope="module")
def engine(loud, inputs, ray_local) -> Iterator[Any]:
    from gubs.ufm.rollout import Engine

    class Probe(Engine):
        """The engine, with a look inside."""

        def prompt_ids(self, prompt: Any) -> list[int]:
            greedy = sampling(Request(prompt, 0, 0.0), self.shape)
            return list(self._llm.generate([prompt], greedy, use_tqdm=False)[0].prompt_token_ids)

        def positions(self, ids: list[int], clips: list[tuple[str, Any, float, int, int]]) -> Any:
            from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

            class Held:
                def __init__(self, value):
                    self.data = torch.tensor(value)

            features = [
                MultiModalFeatureSpec(
                    {f"{kind}_grid_thw": Held(grid), "second_per_grid_ts": Held(seconds)},
                    kind,
                    "x",
                    PlaceholderRange(offset=at, length=count),
                )
                for kind, grid, seconds, at, count in clips
            ]
            ask = lambda worker: worker.model_runner.get_model().get_mrope_input_positions(ids, features)[0]  # noqa: E731
            return self._llm.collective_rpc(ask)[0].numpy()

    shape = Shape(str(loud), MODEL, inputs.settings, RolloutSettings(kv_cache_gb=0.1, max_num_seqs=16), threads=2)
    variables = {**ENVIRONMENT, "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ",".join(GPUS)}
    actor = ray.remote(Probe).options(num_cpus=0, runtime_env={"env_vars": variables})
    handle = actor.remote(shape)
    ray.get(handle.ready.remote(), timeout=400)
    yield handle
    ray.kill(handle)


@pytest.fixture
def model(loud) -> Any:
    return load(loud, MODEL).to(DEVICE)


PROMPTS = {
    "text": text_prompt(LONG),
    "image": image_prompt(LONG),
    "video": video_prompt(LONG),
    "long wide video": video_prompt("x", 5, frames=6, height=56, width=112, seconds=33.0),
    "short tall video": video_prompt("y", 6, frames=2, height=84, width=28, seconds=0.5),
}


def ask(
    engine: Any, inputs: Inputs, encoded: list[Encoded], seed: int = 0, temperature: float = 1.0, **how: Any
) -> list[Response]:
    asked = [Request(inputs.for_engine(e), seed + i, temperature) for i, e in enumerate(encoded)]
    return ray.get(engine.generate.remote(asked, **how), timeout=100)


def gaps(model: Any, inputs: Inputs, encoded: list[Encoded], responses: list[Response]) -> list[float]:
    """Largest difference of a token's log-probability between engine and trainer, by sequence."""
    with torch.no_grad():
        batch = inputs.collate([(e, r.ids) for e, r in zip(encoded, responses, strict=True)])
        ours = logprobs(model, batch.to(DEVICE), vision=True).cpu().split([len(r.ids) for r in responses])
    return [float((o - torch.tensor(r.logprobs)).abs().max()) for o, r in zip(ours, responses, strict=True)]


@pytest.mark.parametrize("name", PROMPTS)
def test_the_engine_computes_with_our_ids(engine, inputs, name):
    encoded = inputs.encode(PROMPTS[name])
    assert ray.get(engine.prompt_ids.remote(inputs.for_engine(encoded)), timeout=60) == encoded.ids


@pytest.mark.parametrize("name", PROMPTS)
def test_the_engine_computes_with_our_positions(engine, inputs, name):
    encoded = inputs.encode(PROMPTS[name])
    ids, clips, types = [*encoded.ids, 5, 6], [], np.zeros(len(encoded.ids) + 2, np.int64)
    seconds = inputs._seconds_per_step(encoded.clip)
    if clip := encoded.clip:
        pad = inputs.tokenizer.convert_tokens_to_ids(f"<|{clip.kind}_pad|>")
        clips = [(clip.kind, encoded.grid, seconds, ids.index(pad), ids.count(pad))]
        types[np.array(ids) == pad] = 1
    theirs = ray.get(engine.positions.remote(ids, clips), timeout=60)
    assert np.array_equal(mrope_positions(types, encoded.grid, 2, 2.0 * seconds), theirs)


def test_log_probabilities_agree(engine, inputs, model):
    """All kinds in one batch of the trainer: else the ratio of policy and rollout is noise from the first step on."""
    encoded = [inputs.encode(p) for p in PROMPTS.values()]
    responses = ask(engine, inputs, encoded)
    assert all(len(r.ids) == 24 or r.ids[-1] == inputs.end for r in responses)
    largest = dict(zip(PROMPTS, gaps(model, inputs, encoded, responses), strict=True))
    assert max(largest.values()) < CLOSE, largest


@pytest.mark.parametrize("name", ["image", "video"])
def test_other_pictures_would_show(engine, inputs, model, name):
    """If they did not, the test above would say nothing about pictures."""
    seen = inputs.encode(PROMPTS[name])
    other = inputs.encode(type(PROMPTS[name])(PROMPTS[name].text, make_clip(99, len(PROMPTS[name].clip.frames))))
    responses = ask(engine, inputs, [seen])
    assert gaps(model, inputs, [seen], responses)[0] < CLOSE
    assert gaps(model, inputs, [other], responses)[0] > APART


def test_transformers_own_positions_would_show(engine, inputs, model):
    """Positions matter to this model, so the test above tells that they are the engine's."""
    encoded = inputs.encode(PROMPTS["long wide video"])
    responses = ask(engine, inputs, [encoded])
    batch = inputs.collate([(encoded, responses[0].ids)])
    batch.positions = torch.arange(batch.ids.shape[1]).expand(3, 1, -1).clone()
    with torch.no_grad():
        ours = logprobs(model, batch.to(DEVICE), vision=True).cpu()
    assert float((ours - torch.tensor(responses[0].logprobs)).abs().max()) > APART


def test_health_at_step_0(engine, inputs, model):
    """Before any update the policy is the reference, the ratio is 1 and the engine samples from the policy."""
    encoded = [inputs.encode(p) for p in PROMPTS.values()]
    responses = ask(engine, inputs, encoded, seed=50)
    batch = inputs.collate([(e, r.ids) for e, r in zip(encoded, responses, strict=True)])
    dense = lambda flat: torch.zeros(batch.response.shape).masked_scatter(batch.response, flat)  # noqa: E731
    with torch.no_grad():
        ours = dense(logprobs(model, batch.to(DEVICE), vision=True).cpu())
        reference = dense(logprobs(model, batch.to(DEVICE), vision=True).cpu())
    _, sums = policy_loss(
        ours,
        None,
        reference,
        torch.ones(len(responses)),
        batch.response,
        denominators=Denominators.of(batch.response),
        beta=0.04,
        rollout_logp=dense(torch.tensor([p for r in responses for p in r.logprobs])),
    )
    tokens = float(sums["tokens"])
    assert float(sums["ratio"]) / tokens == 1.0
    assert float(sums["kl"]) == float(sums["kl_old"]) == 0.0
    assert 1.0 <= float(sums["mismatch"]) / tokens < 1.0 + CLOSE
    assert float(sums["capped"]) == 0.0


def test_a_seed_is_an_answer(engine, inputs):
    """A resumed run must sample the same; replicas must not sample the same as each other."""
    encoded = [inputs.encode(PROMPTS["video"])] * 3
    first, again = ask(engine, inputs, encoded, seed=7), ask(engine, inputs, encoded, seed=7)
    assert [r.ids for r in first] == [r.ids for r in again]
    assert len({r.ids for r in first}) == 3
    alone = ask(engine, inputs, encoded[:1], seed=8)
    assert alone[0].ids == first[1].ids, "whatever else is in the batch"


def test_more_seeded_samples_than_are_read_at_once(engine, inputs):
    """A prompt read in parts would rewind its generator, which a CPU's cannot: prompts wait until they fit."""
    encoded = [inputs.encode(text_prompt(f"{LONG * 4}{i}")) for i in range(24)]
    assert sum(len(e.ids) for e in encoded) > 4096
    responses = ask(engine, inputs, encoded, seed=5)
    assert [r.ids for r in responses] == [r.ids for r in ask(engine, inputs, encoded, seed=5)]


def test_greedy_takes_the_likeliest_token(engine, inputs, model):
    encoded = inputs.encode(PROMPTS["video"])
    responses = ask(engine, inputs, [encoded, encoded], temperature=0.0)
    assert responses[0].ids == responses[1].ids
    from gubs.ufm.policy import response_logits

    with torch.no_grad():
        likeliest = response_logits(model, inputs.collate([(encoded, responses[0].ids)]).to(DEVICE)).argmax(-1)
    assert likeliest.tolist() == list(responses[0].ids)


def test_equal_prompts_are_read_once(engine, inputs):
    """Four T samples of a group: prefix and pictures come from the caches."""
    encoded = [inputs.encode(video_prompt(LONG + LONG, seed=31))] * 4
    before = ray.get(engine.figures.remote(), timeout=30)
    ask(engine, inputs, encoded)
    after = ray.get(engine.figures.remote(), timeout=30)
    grown = {k: after[k] - before[k] for k in after}
    assert grown["prefix_queries"] == 4 * len(encoded[0].ids)
    assert grown["prefix_hits"] >= 2 * (len(encoded[0].ids) // 32) * 32
    assert grown["picture_hits"] >= 3


def test_a_guided_answer_is_one_of_the_choices(engine, inputs):
    choices = ["It fits.", "It is long.", "B"]  # short enough if written letter by letter
    responses = ask(engine, inputs, [inputs.encode(PROMPTS["video"])] * 4, choices=choices)
    assert {inputs.text(r.ids)[0] for r in responses} <= set(choices)
    assert all(inputs.text(r.ids)[1] for r in responses)


def test_a_sync_brings_the_engine_the_trainers_weights(engine, inputs, model):
    """Before it they are apart, after it they agree, and what was cached with the old weights is not used any more."""
    encoded = [inputs.encode(p) for p in PROMPTS.values()]
    old = ask(engine, inputs, encoded, seed=3)
    sync = WeightSync(model, engine, 60.0, version=old[0].version)
    _moved(model, seed=0)
    assert max(gaps(model, inputs, encoded, old)) > APART
    assert sync.push(model) == old[0].version + 1
    new = ask(engine, inputs, encoded, seed=3)
    largest = dict(zip(PROMPTS, gaps(model, inputs, encoded, new), strict=True))
    assert max(largest.values()) < CLOSE, largest
    assert {r.version for r in new} == {old[0].version + 1}


def test_a_second_sync_is_as_good_as_the_first(engine, inputs, model, loud):
    """Loading prepacked layers again: other weights, and back to the first ones, whose answers are as before."""
    encoded = [inputs.encode(p) for p in PROMPTS.values()]
    sync = WeightSync(model, engine, 60.0, version=10)
    sync.push(model)
    first = ask(engine, inputs, encoded, seed=3)
    assert max(gaps(model, inputs, encoded, first)) < CLOSE
    other = _moved(load(loud, MODEL).to(DEVICE), seed=1)
    ray.get(engine.sleep.remote(), timeout=60)  # as after every rollout; on a GPU the old weights are gone now
    sync.push(other)
    second = ask(engine, inputs, encoded, seed=3)
    assert max(gaps(other, inputs, encoded, second)) < CLOSE
    assert max(gaps(model, inputs, encoded, second)) > APART
    sync.push(model)
    third = ask(engine, inputs, encoded, seed=3)
    assert [(r.ids, r.logprobs) for r in third] == [(r.ids, r.logprobs) for r in first]


def _moved(model: Any, seed: int) -> Any:
    """The model with all weights changed a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator).to(weight))
    return model


def test_in_bfloat16_engine_and_trainer_agree_as_the_health_figures_want(tiny, inputs, ray_local):
    """The precision of presets `small` and `paper`: after each sync within the bounds that end a run, and outside of
    them with positions that are not the engine's or with weights of the step before."""
    half = ModelSettings(dtype="bfloat16", gradient_checkpointing=False)
    model = load(tiny, half).to(DEVICE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.ndim > 1 else 1.0)  # louder: positions show
    shape = Shape(str(tiny), half, inputs.settings, RolloutSettings(kv_cache_gb=0.1, max_num_seqs=16), threads=2)
    encoded = [inputs.encode(p) for p in PROMPTS.values()] * 2
    handle = start_rollout(shape, gpu_ids=GPUS)
    try:
        ray.get(handle.ready.remote(), timeout=400)
        sync = WeightSync(model, handle, 60.0)
        for seed in (1, 2):
            sync.push(model)
            responses = ask(handle, inputs, encoded, seed)
            assert _illnesses(model, inputs, encoded, responses) == []
            assert _illnesses(model, inputs, encoded, responses, positions=False) == ["mismatch", "drift"]
            assert _illnesses(_moved(model, seed), inputs, encoded, responses) == ["mismatch", "drift"]
    finally:
        ray.kill(handle)


def _illnesses(
    model: Any, inputs: Inputs, encoded: list[Encoded], responses: list[Response], positions: bool = True
) -> list[str]:
    """The health figures of the engine that are out of bounds; without positions, the trainer counts tokens."""
    batch = inputs.collate([(e, r.ids) for e, r in zip(encoded, responses, strict=True)])
    if not positions:
        batch.positions = torch.arange(batch.ids.shape[1]).expand(3, len(batch.ids), -1).clone()
    with torch.no_grad():
        ours = logprobs(model, batch.to(DEVICE), vision=True).float().cpu()
    theirs = torch.tensor([p for r in responses for p in r.logprobs])
    figures = {"mismatch": float((ours - theirs).abs().exp().mean()), "drift": float(k3(theirs, ours).mean())}
    limits = {name: (low, high) for name, low, high in bounds(0, "bfloat16")}
    return [n for n, v in figures.items() if not limits[n][0] <= v <= limits[n][1]]


def test_a_forgotten_head_is_told(engine, model):
    """vLLM itself says nothing and keeps the old head."""
    weights = {n: w for n, w in weights_of(model).items() if n != HEAD}
    assert ray.get(engine.receive.remote(packed(weights), 20), timeout=60) == [HEAD]
    assert ray.get(engine.receive.remote(packed(weights_of(model)), 21), timeout=60) == []


def test_an_engine_that_does_not_take_the_weights_is_named(model, ray_local):
    class Hung:
        def receive(self, pack: Any, version: int) -> list[str]:
            time.sleep(60)
            return []

    stuck = object.__new__(RolloutEngine)
    stuck.handle, stuck._limit = ray.remote(Hung).options(num_cpus=0).remote(), 2.0
    stuck._device = torch.device("cpu")
    stuck.sync = WeightSync(model, stuck.handle, stuck._limit)
    with pytest.raises(PlatformError, match=r"did not take the weights within 2 s"):
        stuck.push(model)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(stuck.handle.receive.remote(None, 1), timeout=30)


def test_z_a_hung_engine_is_named_within_the_deadline(engine, inputs):
    """The last test of this file: it ends the engine. A job that waits for ever is worse than one that stops."""
    stuck = object.__new__(RolloutEngine)
    stuck.handle, stuck._limit = engine, 2.0
    engine.hang.remote(120)
    began = time.monotonic()
    with pytest.raises(PlatformError, match=r"did not generate within 2 s \(ufm.workers.stuck_after_s\) and was ended"):
        stuck.generate([Request(inputs.for_engine(inputs.encode(PROMPTS["text"])), 1)], None)
    assert time.monotonic() - began < 10
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(engine.ready.remote(), timeout=30)
