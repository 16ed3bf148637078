"""What an engine does on a GPU, as far as that can be seen without one: the order of sleep, wake and new weights, the
arguments, and which device it gets."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gubs.config import load_settings
from gubs.errors import PlatformError
from gubs.ufm import grpo, train_worker
from gubs.ufm.rollout import ENVIRONMENT, Engine, Request, Shape, alone, engine_arguments, environment
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.video.decoded import DecodeOptions


class Vllm:
    """Notes what is asked of it."""

    def __init__(self):
        self.asked = []
        self.llm_engine = self

    def __getattr__(self, name):
        def note(*_, tags=None, level=None, **__):
            self.asked.append(f"{name} {' '.join(tags)}" if tags else f"{name} {level}" if level else name)
            return [[]]

        return note

    def generate(self, prompts, *_, **__):
        self.asked.append("generate")
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7], logprobs=[{7: _At(-0.5)}])]) for _ in prompts]


class _At:
    def __init__(self, logprob):
        self.logprob = logprob


def shape(largest=None, pictures=True, **rollout) -> Shape:
    return Shape(
        "folder", ModelSettings(), InputSettings(), RolloutSettings(**rollout), pictures=pictures, largest=largest
    )


def engine(cpu=False, **rollout) -> Engine:
    made = object.__new__(Engine)
    made.shape = shape(**rollout)
    made._llm, made._cpu, made._asleep, made._discarded, made.version = Vllm(), cpu, (), False, 0
    return made


ONE = [Request({"prompt_token_ids": [1]}, 0)]


def test_a_step_on_a_gpu_wakes_and_sleeps_in_the_order_that_memory_allows():
    """New weights need the engine's weights awake, and no cache beside the trainer; answers need both."""
    woken = engine()
    assert woken.generate(ONE)[0].ids == (7,)
    woken.sleep()
    woken.sleep()
    woken.load([("w", 0)], 1)
    woken.generate(ONE)
    woken.sleep()
    assert woken._llm.asked == [
        "generate",
        "sleep 2",
        "wake_up weights",
        "collective_rpc",
        "reset_mm_cache",
        "reset_encoder_cache",
        "wake_up kv_cache",
        "generate",
        "sleep 2",
    ]
    assert woken.version == 1


def test_awake_it_forgets_its_prefixes_too():
    awake = engine()
    awake.load([("w", 0)], 1)
    assert awake._llm.asked == ["collective_rpc", "reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache"]


def test_without_answers_to_write_it_is_woken_all_the_same():
    """Half awake it could not be put to sleep again."""
    idle = engine()
    idle.sleep()
    idle.load([], 1)
    assert idle.generate([]) == []
    idle.sleep()
    assert idle._llm.asked[-2:] == ["wake_up kv_cache", "sleep 2"]


def test_an_engine_that_has_slept_answers_only_with_new_weights():
    """Its own were dropped: what is at their place after waking is not zero, only wrong."""
    woken = engine()
    woken.sleep()
    for requests in (ONE, []):
        with pytest.raises(PlatformError, match="was sent no new ones"):
            woken.generate(requests)
    assert woken._llm.asked == ["sleep 2"]
    woken.load([("w", 0)], 1)
    assert woken.generate(ONE)[0].version == 1


@pytest.mark.parametrize(("runner", "value"), [("auto", None), ("v1", "0"), ("v2", "1")])
def test_the_code_that_runs_the_model_can_be_chosen(runner, value):
    """GPUs have v2 by default, and all that runs on CPUs has v1."""
    variables = environment(RolloutSettings(model_runner=runner))
    assert variables.get("VLLM_USE_V2_MODEL_RUNNER") == value
    assert set(variables) >= set(ENVIRONMENT)


def test_memory_is_set_aside_for_clips_of_the_stored_size_only():
    """vLLM would compute the largest video that fits a prompt when it starts, and keep the memory for that."""
    paper = DecodeOptions(count=8, max_pixels=100352)
    limits = engine_arguments(shape(paper), cpu=False)["limit_mm_per_prompt"]
    assert limits["video"] == {"count": 1, "num_frames": 8, "width": 336, "height": 308}
    assert limits["image"] == {"count": 1, "width": 336, "height": 308}
    assert limits["video"]["width"] * limits["video"]["height"] >= paper.max_pixels
    from vllm.config.multimodal import MultiModalConfig

    read = MultiModalConfig(limit_per_prompt=limits).limit_per_prompt
    assert (read["video"].num_frames, read["image"].width) == (8, 336)


@pytest.mark.parametrize("pictures", [True, False])
def test_without_a_size_and_on_a_cpu_only_their_number_is_limited(pictures):
    counts = {"video": int(pictures), "image": int(pictures)}
    assert engine_arguments(shape(None, pictures), cpu=False)["limit_mm_per_prompt"] == counts
    assert engine_arguments(shape(DecodeOptions(), pictures), cpu=True)["limit_mm_per_prompt"] == counts
    assert engine_arguments(shape(DecodeOptions(), False), cpu=False)["limit_mm_per_prompt"]["video"] == 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_engine_has_the_threads_of_its_worker(monkeypatch, device):
    """Also on a GPU, where it draws pictures: one thread is slow, and all cores for each of eight engines is worse."""
    started = []
    monkeypatch.setattr(grpo, "start_rollout", lambda shape, **where: started.append((shape, where)))
    ufm = load_settings("tiny").ufm
    worker = SimpleNamespace(
        device=torch.device(device),
        threads=12,
        vision=True,
        ufm=ufm,
        questions=SimpleNamespace(largest=DecodeOptions(count=4)),
        place=lambda: ("node", ["3"]),
    )
    grpo.RolloutEngine(worker, "start")
    ((shape, where),) = started
    assert (shape.threads, shape.largest.count, where["gpu_ids"]) == (12, 4, ["3"])


def test_an_engine_without_a_trainer_beside_it_takes_most_of_the_gpu():
    arguments = engine_arguments(replace(shape(), rollout=alone(RolloutSettings(gpu_memory=0.35))), cpu=False)
    assert arguments["gpu_memory_utilization"] == 0.9
    assert arguments["enable_sleep_mode"] is False


@pytest.mark.parametrize("made", [engine(cpu=True), engine(sleep=False)])
def test_where_nothing_sleeps_nothing_is_woken(made):
    made.generate(ONE)
    made.sleep()
    made.load([], 1)
    made.generate(ONE)
    assert not [a for a in made._llm.asked if a.startswith(("sleep", "wake"))]


def test_the_model_is_loaded_when_it_is_asked_for_and_once(monkeypatch):
    """The process starts beside the trainer; on a GPU the memory is the trainer's until it has loaded."""
    loaded = []
    fake = SimpleNamespace(LLM=lambda **given: loaded.append(given["model"]) or Vllm())
    here = SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: True))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setitem(sys.modules, "vllm.platforms", here)
    monkeypatch.setattr(os, "environ", {**os.environ})
    made = Engine(engine().shape)
    assert loaded == []
    assert made.ready() == made.ready() == os.getpid()
    assert loaded == ["folder"]


def test_the_engines_process_is_the_first_thing_and_its_model_the_last(monkeypatch, tmp_path):
    """What the worker loads takes as long as what the engine imports; and vLLM takes its share of what is left."""
    order = []

    def noted(name, **has):
        return lambda *_, **__: order.append(name) or SimpleNamespace(**has)

    for name in ("Checkpoints", "Monitor", "Watchdog", "Run"):
        monkeypatch.setattr(train_worker, name, noted(name))
    monkeypatch.setattr(train_worker, "Questions", noted("Questions", pictures=True))
    monkeypatch.setattr(train_worker, "Inputs", noted("Inputs"))
    monkeypatch.setattr(grpo, "Planner", noted("Planner"))
    monkeypatch.setattr(grpo.models, "load", noted("model"))
    monkeypatch.setattr(grpo, "Trainer", noted("Trainer", model=None))
    monkeypatch.setattr(grpo, "Reference", noted("Reference"))
    monkeypatch.setattr(grpo, "RolloutEngine", noted("process", open=lambda _: order.append("engine")))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    ufm = load_settings("tiny").ufm
    grpo.GRPOWorker(train_worker.Job("run", ufm, 0, {}, "grpo", str(tmp_path), "start", {}))
    assert order.index("process") < order.index("Inputs") < order.index("model")
    assert order[-1] == "engine"
    assert order.count("model") == 2


@pytest.mark.parametrize("cpu", [True, False])
def test_every_argument_is_one_that_vllm_knows(cpu):
    """A name that vLLM dropped would be found on a GPU only."""
    given = engine_arguments(engine().shape, cpu)
    (package,) = importlib.util.find_spec("vllm").submodule_search_locations
    tree = ast.parse((Path(package) / "engine" / "arg_utils.py").read_text())
    (fields,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "EngineArgs")
    arguments = {n.target.id for n in fields.body if isinstance(n, ast.AnnAssign)}
    assert len(arguments) > 50
    assert set(given) <= arguments
    assert given["enforce_eager"] is cpu
    assert ("enable_sleep_mode" in given) is not cpu


TWO_GPUS = """
import json, os, sys
import ray, torch
from types import SimpleNamespace
from gubs.ufm import rollout
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.ufm.train_worker import TrainWorker

class Seen:
    def __init__(self, shape): pass
    def told(self): return os.environ["CUDA_VISIBLE_DEVICES"], ray.get_runtime_context().get_node_id()

@ray.remote(num_cpus=0, num_gpus=1)
class Trains:
    def ask(self):
        rollout.Engine = Seen
        node, ids = TrainWorker.place(SimpleNamespace(device=torch.device("cuda")))
        shape = rollout.Shape("x", ModelSettings(), InputSettings(), RolloutSettings())
        child = rollout.start_rollout(shape, gpu_ids=ids, node_id=node)
        return list(ids), node, ray.get(child.told.remote(), timeout=200), os.environ["CUDA_VISIBLE_DEVICES"]

ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
workers = [Trains.remote() for _ in range(2)]
print(json.dumps(ray.get([w.ask.remote() for w in workers], timeout=300)))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_each_workers_engine_gets_the_workers_own_gpu():
    """Ray would give an actor without a GPU none, and one with a GPU another than its trainer's."""
    command = [sys.executable, "-c", TWO_GPUS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    engines = json.loads(done.stdout.strip().splitlines()[-1])
    assert sorted(ids for ids, *_ in engines) == [["0"], ["1"]]
    for (own,), node, (visible, at), trainers in engines:
        assert visible == own == trainers
        assert at == node
