"""A training that is killed, part by part, ends with the very weights of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from drive_grpo import STEPS, resume_settings
from ufm_helpers import disk

from gubs.artifacts import Artifact, Run
from gubs.config import Settings
from gubs.errors import ArtifactError, PlatformError
from gubs.stages import GRPO, make_stage, named
from gubs.ufm.checkpoint import SharedError
from gubs.ufm.monitor import STUCK, STUCK_EXIT, read_metrics
from gubs.ufm.stage import _unwrapped
from gubs.ufm.train_worker import DivergedError

DRIVER = Path(__file__).with_name("drive_grpo.py")
PATIENCE = 500
"""Seconds for what takes a tenth of them on a quiet machine: engines and Ray start beside other tests, and a shared
machine was seen to take four times as long for minutes."""
pytestmark = pytest.mark.timeout(2400)


def start(run: Run, name: str, log: Path, *overrides: str) -> subprocess.Popen:
    with log.open("a") as out:
        return subprocess.Popen([sys.executable, str(DRIVER), run.root, name, *overrides], stdout=out, stderr=out)


@pytest.fixture(scope="module")
def whole(ready) -> Path:
    """The training that nobody disturbs."""
    train(ready, resume_settings(), "whole")
    return Path(ready.path("whole"))


def weights(folder: Path) -> dict[str, bytes]:
    """The policy's bytes at every checkpoint."""
    return {p.parent.parent.name: p.read_bytes() for p in sorted(folder.glob("checkpoints/*/policy/model.safetensors"))}


def wait_for(what: Callable[[], bool], seconds: float, says: str, process: subprocess.Popen | None = None) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, f"waited {seconds:g} s for {says}"
        assert process is None or process.poll() is None, f"the job ended while waiting for {says}"
        time.sleep(0.02)


def below(process: subprocess.Popen | psutil.Process, title: str = "") -> list[psutil.Process]:
    """The job's processes, of Ray and ours, whose title holds a text."""
    return [p for p in psutil.Process(process.pid).children(recursive=True) if title in title_of(p)]


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_worker(process: psutil.Process, began: float) -> bool:
    """Whether a process with a worker's title is one that started after that time, not what a worker has just forked,
    whose title is the worker's until it runs another program."""
    try:
        parent = process.parent()
        return process.create_time() > began and (parent is None or WORKER not in title_of(parent))
    except psutil.NoSuchProcess:
        return False


class Job:
    """A running job, its progress, and its parts."""

    def __init__(self, run: Run, name: str, *overrides: str):
        self.log = Path(run.root).parent / f"{name}.log"
        self.folder = Path(run.path(f"{name}.partial"))
        self.process = start(run, name, self.log, *overrides)

    def after(self, step: int) -> None:
        """Waits until a step is done."""
        done = lambda: any(line["step"] >= step for line in read_metrics(self.folder))  # noqa: E731
        wait_for(done, PATIENCE, f"step {step}; log: {self.log}", self.process)

    def kill(self, title: str) -> int:
        """Ends the one process with this title, at once."""
        (process,) = below(self.process, title)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        return process.pid

    def end(self) -> list[str]:
        """Ends the driver, at once. Gives the titles of workers that outlive it for long; ends all that is left."""
        if self.process.poll() is not None:
            return []
        parts = {p: title_of(p) for p in below(self.process)}
        workers = [p for p, title in parts.items() if not title.startswith(AGENTS)]
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        until = time.monotonic() + 30
        while any(map(alive, workers)) and time.monotonic() < until:
            time.sleep(0.1)
        left = [parts[p] for p in workers if alive(p)]
        for p in filter(alive, parts):
            p.kill()
        return left


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's helpers look for a parent, and one that nobody reaps (as in some containers) seems to live: they may stay."""

ENGINE, WORKER = "ray::Engine", "ray::RayTrainWorker"


@pytest.mark.slow
def test_killed_part_by_part_the_weights_are_those_of_the_undisturbed_run(ready, whole):
    """First the engine dies, then the train worker, then the driver with all it started; the same command is given
    again. Each kill falls between two checkpoints, so the checkpoint that differs tells which was not survived."""
    job = Job(ready, "broken")
    try:
        job.after(0)
        worker = below(job.process, WORKER)[0].pid
        first = job.kill(ENGINE)
        job.after(2)
        assert below(job.process, ENGINE)[0].pid != first
        assert below(job.process, WORKER)[0].pid == worker, "the engine's death must not cost the worker"
        job.kill(WORKER)
        job.after(4)
        assert below(job.process, WORKER)[0].pid != worker
        assert job.end() == [], "what outlives a dead driver holds its GPU"
        _others_are_refused(ready, job.folder)
        job = Job(ready, "broken")
        assert job.process.wait(timeout=PATIENCE) == 0, job.log.read_text()[-3000:]
    finally:
        job.end()
    broken = Path(ready.path("broken"))
    wanted, after_kills = weights(whole), weights(broken)
    assert list(wanted) == [f"step-{s:06d}" for s in range(2, STEPS + 1, 2)] == list(after_kills)
    assert [n for n in wanted if after_kills[n] != wanted[n]] == []
    model = "policy/model.safetensors"
    assert (broken / model).read_bytes() == (whole / model).read_bytes() == wanted[f"step-{STEPS:06d}"]
    _same_figures(ready)


def train(run: Run, settings: Settings, name: str) -> Artifact:
    """A training of GA-GRPO under a name of its own."""
    return make_stage(named(GRPO, name, settings), run, settings)


def _others_are_refused(run: Run, partial: Path) -> None:
    """An unfinished training is in the way of one with other settings, and stays as it is."""
    before = sorted(partial.rglob("*"))
    with pytest.raises(
        ArtifactError, match=r"unfinished training with other settings.*\(ufm.grpo.beta=0.04, now 0.5\).*--force"
    ):
        train(run, resume_settings("ufm.grpo.beta=0.5"), "broken")
    newest = max(partial.glob("checkpoints/step-*/policy/model.safetensors"))
    data = newest.read_bytes()
    newest.write_bytes(data[:-1])
    try:
        with pytest.raises(ArtifactError, match=r"is damaged: policy/model.safetensors .*remove that folder"):
            train(run, resume_settings(), "broken")
    finally:
        newest.write_bytes(data)
    assert sorted(partial.rglob("*")) == before


def _same_figures(run: Run) -> None:
    """Every step stands in the log once, with what the undisturbed run says of it."""
    tables = [run.artifact(n).table("steps").to_pylist() for n in ("whole", "broken")]
    timed = ("seconds/", "tokens_per_second/")
    kept = [[{k: v for k, v in row.items() if not k.startswith(timed)} for row in t] for t in tables]
    assert [row["step"] for row in kept[1]] == list(range(STEPS))
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_the_undisturbed_run_learned_something_to_lose(ready, whole):
    """With rewards all alike, or weights that never moved, equal weights would prove nothing."""
    rows = ready.artifact("whole").table("steps").to_pylist()
    assert any(0 < row["frac_zero_variance"] < 1 or row["frac_zero_variance"] == 0 for row in rows)
    assert len({row["reward"] for row in rows}) > 2
    files = weights(whole)
    start_of = Path(ready.path("sft_model", "policy", "model.safetensors")).read_bytes()
    assert len({*files.values(), start_of}) == len(files) + 1
    first = rows[0]
    assert first["health/ratio"] == 1.0
    assert first["health/kl"] == first["health/kl_old"] == 0.0
    assert first["health/mismatch"] < 1.02
    assert rows[-1]["health/kl"] > 0
    assert rows[-1]["health/mismatch"] < 1.02, "the engine has the weights of every step"
    assert {row["skipped"] for row in rows} == {0.0}
    ended = ready.artifact("whole").manifest.info["seconds_after_last_step"]
    assert ended["checkpoint"] > 0 < ended["policy"]
    samples = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert {s["role"] for s in samples} == {"T", "S", "G"}
    for row in rows:
        assert row["tokens_per_second/rollout"] == pytest.approx(
            row["tokens/rollout"] / row["seconds/rollout"], rel=1e-3
        )
        assert row["tokens/train"] > row["tokens/rollout"] > 0
    assert {"seconds/waiting_for_data", "seconds/sync", "seconds/reference", "seconds/reward"} <= set(rows[0])


@pytest.mark.slow
def test_two_workers_do_the_same_step_and_outlive_one_of_them(ready, whole):
    """Each has an engine of its own and half of the records; rewards, loss and gradient are those of one worker. When
    one dies, both begin again from their checkpoint. When head, raylet, workers and engines die at one blow, the driver
    ends too."""
    job = Job(ready, "pair", "ufm.workers.count=2")
    try:
        job.after(2)
        before = below(job.process, WORKER)
        assert len(before) == 2
        before[1].kill()
        job.after(4)
        for process in below(job.process):
            process.kill()
        assert job.process.wait(timeout=PATIENCE) != 0, "the driver must wait for none of them for ever"
    finally:
        job.end()
    one, two = ready.artifact("whole").table("steps").to_pylist(), read_metrics(job.folder)
    assert [row["step"] for row in two][:5] == list(range(5)), "begun again at the checkpoint, no step is told twice"
    for name in (
        "reward",
        "reward_raw/T",
        "reward_raw/G",
        "frac_zero_variance",
        "response_tokens",
        "loss",
        "grad_norm",
    ):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-3, abs=1e-5), name
    assert one[0]["grad_norm"] > 0.01
    assert two[0]["health/ratio"] == 1.0
    assert max(row["health/mismatch"] for row in two) < 1.02, "both engines have the weights of every step"


@pytest.mark.slow
def test_a_run_whose_gradients_are_no_numbers_stops_with_the_batch_saved(ready):
    """A weight of the KL term beyond what float32 holds makes every loss NaN: three steps skipped, then a clear end."""
    with pytest.raises(DivergedError, match="not a number in 3 steps in a row"):
        train(ready, resume_settings("ufm.grpo.beta=1e300"), "nan")
    partial = Path(ready.path("nan.partial"))
    rows = read_metrics(partial)
    assert [row["skipped"] for row in rows] == [1.0, 1.0], "the third ended the run"
    (saved,) = partial.glob("bad-step-2-rank-0.json")
    batch = json.loads(saved.read_text())
    assert {"user", "video", "gold", "answer", "ids"} <= set(batch[0])
    kept = [partial / "checkpoints" / "step-000002" / "policy", Path(ready.path("sft_model", "policy"))]
    assert len({(p / "model.safetensors").read_bytes() for p in kept}) == 1, "skipped steps leave the weights alone"


@pytest.mark.slow
def test_a_full_disk_ends_the_run_at_once(ready):
    """Trying again would fill it again: one worker, no second one, and an error that names what was not written."""
    partial, here = Path(ready.path("disk.partial")), psutil.Process()
    began, workers = time.time(), set()
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(train, ready, resume_settings(), "disk")
        wait_for(lambda: (partial / "recipe.json").exists() or training.done(), PATIENCE, "the training's folder")
        with disk(partial / "checkpoints", "6m") as checkpoints:
            until = time.monotonic() + PATIENCE
            while not training.done() and time.monotonic() < until:
                workers |= {p.pid for p in below(here, WORKER) if is_worker(p, began)}
                time.sleep(0.2)
            with pytest.raises(SharedError, match=r"cannot write the checkpoint .*step-000002"):
                training.result(timeout=0)
            assert not list(checkpoints.iterdir()), "what was written in vain keeps the disk full"
    assert [row["step"] for row in read_metrics(partial)] == [0, 1]
    assert len(workers) == 1


PLAIN_VLLM = """
import json, os, sys
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
import numpy as np
from vllm import LLM, SamplingParams
folder, text, frames = sys.argv[1:]
llm = LLM(folder, dtype="float32", max_model_len=512, enforce_eager=True, limit_mm_per_prompt={"video": 1, "image": 1})
metadata = {"fps": 2.0, "total_num_frames": 2, "frames_indices": [0, 1], "video_backend": "none"}
asked = {"prompt": text, "multi_modal_data": {"video": [(np.load(frames), metadata)]}}
asked["mm_processor_kwargs"] = {"do_sample_frames": False}
found = llm.generate([asked], SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)[0]
print(json.dumps([list(found.prompt_token_ids), list(found.outputs[0].token_ids)]))
"""


@pytest.mark.slow
def test_a_trained_policy_answers_in_plain_transformers_and_in_plain_vllm(ready, whole, tmp_path):
    """Nothing of ours takes part: the folder alone, its chat template, and a clip as users of those libraries give it.
    Both write the same answer and end it."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    policy = whole / "policy"
    processor = AutoProcessor.from_pretrained(policy)
    content = [{"type": "video"}, {"type": "text", "text": "Playing.\nSkip? A B C D"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    frames = np.random.default_rng(0).integers(0, 256, (2, 56, 56, 3), np.uint8)
    asked = processor(text=[text], videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(policy, dtype=torch.float32).eval()
    written = model.generate(**asked, max_new_tokens=16, do_sample=False)[0].tolist()
    prompt, answer = asked["input_ids"][0].tolist(), written[asked["input_ids"].shape[1] :]
    assert len(answer) > 1
    assert processor.tokenizer.convert_ids_to_tokens(answer[-1]) == "<|im_end|>"
    np.save(tmp_path / "frames.npy", frames)
    command = [sys.executable, "-c", PLAIN_VLLM, str(policy), text, str(tmp_path / "frames.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1]) == [prompt, answer]


STUCK_SCRIPT = """
import sys, time, pathlib
from gubs.ufm.monitor import Phases, Watchdog
phases = Phases()
Watchdog(phases, 0.5, pathlib.Path(sys.argv[1]), 3, {"checkpoint": 20.0})
for _ in range(4):
    with phases("train"):
        time.sleep(0.3)
with phases("checkpoint"):
    time.sleep(1.0)
time.sleep(1.0)
print("fine so far", flush=True)
with phases("sync"):
    time.sleep(60)
"""


def test_a_stuck_phase_is_named_and_ended(tmp_path):
    """Phases that end in time are left alone, and so is the time between them; the one that hangs ends the process. A
    checkpoint, which takes as long as the disk, has a limit of its own."""
    began = time.monotonic()
    command = [sys.executable, "-c", STUCK_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert time.monotonic() - began < 40
    assert done.returncode == STUCK_EXIT
    assert "fine so far" in done.stdout
    assert "worker 3 was stuck in the phase 'sync' for more than 0.5 s" in done.stderr
    assert "<string>" in done.stderr, "the stack that hangs is shown"
    assert json.loads((tmp_path / STUCK).read_text())["phase"] == "sync"


def test_a_worker_that_hangs_anywhere_ends_and_says_where(ufm_run, tiny, tmp_path):
    """Trackers, shared disks and other ranks may never answer; Ray's own look at a worker sees nothing of it."""
    where = ("resume", "train", "report")
    command = [sys.executable, str(Path(__file__).with_name("drive_worker.py"))]
    command += [ufm_run.root, str(tiny), str(tmp_path), *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(where, STUCK_EXIT), done.stderr[-3000:]
    for phase in where:
        assert json.loads((tmp_path / phase / STUCK).read_text())["phase"] == phase


def test_the_driver_tells_which_phase_was_stuck(tmp_path):
    (tmp_path / STUCK).write_text(json.dumps({"message": "worker 3 was stuck in the phase 'sync' for more than 5 s"}))
    error = _unwrapped(RuntimeError("actor died"), tmp_path)
    assert isinstance(error, PlatformError)
    assert "worker 3 was stuck in the phase 'sync'" in str(error)
    assert "'sync'" not in str(_unwrapped(RuntimeError("actor died"), tmp_path)), "an old name must not be told again"


def test_our_own_errors_come_back_as_they_are(tmp_path):
    """Not as a Ray traceback of forty lines."""
    ours = ArtifactError("the disk is full")

    class Wrapped(Exception):
        def __init__(self) -> None:
            self.worker_failures = {0: ours}

    assert _unwrapped(Wrapped(), tmp_path) is ours
    assert os.environ.get("RAY_ADDRESS") is None
