"""An optimiser step gives the same whatever it is cut into: micro-batches, ranks, pictures on one rank only."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trainer_ranks import CLIP, MODEL, OPTIMIZER, six_samples
from ufm_helpers import text_prompt, tiny_inputs, video_prompt

from gubs.errors import PlatformError
from gubs.records import Task
from gubs.ufm.checkpoint import SharedError
from gubs.ufm.grpo import GRPOWorker, RolloutEngine
from gubs.ufm.loss import Denominators, policy_loss
from gubs.ufm.model import background_thread, load
from gubs.ufm.monitor import Phases
from gubs.ufm.rollout import FIGURES, Response
from gubs.ufm.samples import StepPlan
from gubs.ufm.settings import GRPOSettings, ModelSettings, OptimizerSettings
from gubs.ufm.train_worker import DivergedError, TrainWorker
from gubs.ufm.trainer import _adamw, _config, check_allocator, learning_rate, logprobs, micro_batches

pytestmark = pytest.mark.timeout(240)


def run_ranks(world_size: int, folder: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """What each rank found; every process is ended at the deadline."""
    script = Path(__file__).with_name("trainer_ranks.py")
    outs = [folder / f"{world_size}-{rank}.pt" for rank in range(world_size)]
    logs = [out.with_suffix(".log").open("w") for out in outs]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                str(script),
                str(rank),
                str(world_size),
                str(folder / f"meet-{world_size}"),
                str(out),
                str(checkpoint),
            ],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, (out, log) in enumerate(zip(outs, logs, strict=True))
    ]
    try:
        for process, out in zip(processes, outs, strict=True):
            code = process.wait(timeout=180)
            assert code == 0, out.with_suffix(".log").read_text()[-3000:]
    finally:
        [p.kill() for p in processes]
        [log.close() for log in logs]
    return [torch.load(out, weights_only=False) for out in outs]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny) -> dict[int, list[dict[str, Any]]]:
    """Results by number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    return {world_size: run_ranks(world_size, folder, tiny) for world_size in (1, 2)}


def test_a_full_disk_while_deepspeed_saves_is_told_by_its_rank_and_holds_up_none(ranks):
    for world_size, results in ranks.items():
        messages = [f["full disk"]["message"] for f in results]
        assert "No space left" in messages[-1]
        assert not any(messages[:-1])
        assert results[0]["full disk"]["files"] >= world_size


def plain(
    tiny: Path, level: str = "sequence", now: dict[str, torch.Tensor] | None = None, clip: float | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients and loss of all samples as one batch in plain PyTorch: no DeepSpeed, no ranks, no micro-batches; of a
    second update on the batch if `now` has the weights after the first."""
    torch.manual_seed(1)
    reference = load(tiny, MODEL)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.01 * torch.randn_like(p))
    model, inputs = load(tiny, MODEL, train=True), tiny_inputs(tiny)
    samples = six_samples(inputs)
    batch = inputs.collate([(s.encoded, s.response.ids) for s in samples])
    dense = lambda flat: torch.zeros(batch.response.shape).masked_scatter(batch.response, flat)  # noqa: E731
    with torch.no_grad():
        ref, old = (logprobs(m, batch, vision=True) for m in (reference, model))
    if now:
        model.load_state_dict(now)
    grpo = GRPOSettings()
    loss, _ = policy_loss(
        dense(logprobs(model, batch, vision=True)),
        dense(old) if now else None,
        dense(ref),
        torch.tensor([s.advantage for s in samples]),
        batch.response,
        denominators=Denominators.of(batch.response),
        beta=grpo.beta,
        clip=clip,
        rollout_logp=dense(torch.tensor([p for s in samples for p in s.response.logprobs])),
        tis_cap=grpo.tis_cap,
        level=level,
    )
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, float(loss.detach())


def test_answers_in_one_row_are_worth_what_they_are_alone(tiny):
    """Log-probabilities and gradients, with text and with pictures: a prompt computed once is the same prompt."""
    model, inputs = load(tiny, MODEL, train=True), tiny_inputs(tiny)
    seen, text = inputs.encode(video_prompt("a")), inputs.encode(text_prompt())
    answers = [(seen, (5, 6, 7)), (text, (9,)), (seen, (8, 9)), (seen, ()), (text, (10, 11, 12, 13)), (seen, (14,))]
    results = []
    for share in (False, True):
        model.zero_grad()
        batch = inputs.collate(answers, share=share)
        logp = logprobs(model, batch, vision=True)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        results.append((batch, logp.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (alone, logp, grads), (together, shared_logp, shared_grads) = results
    assert together.tokens < 0.5 * alone.tokens
    assert torch.allclose(logp, shared_logp, atol=1e-5)
    assert apart(shared_grads, grads) < 1e-4


@pytest.fixture(scope="module")
def expected(tiny) -> dict[str, tuple[dict[str, torch.Tensor], float]]:
    return {level: plain(tiny, level) for level in ("sequence", "token")}


def apart(grads: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Distance of all gradients together, relative to their size."""
    assert set(grads) == set(wanted)
    difference = sum(float((grads[n] - g).double().pow(2).sum()) for n, g in wanted.items())
    return (difference / sum(float(g.double().pow(2).sum()) for g in wanted.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", ["k1", "k2", "k3", "token", "recomputed"])
def test_any_cut_gives_the_gradients_of_one_batch(ranks, expected, world_size, case):
    """Micro-batches and ranks must not weigh samples: with 2 ranks, one has the pictures and the other only text."""
    grads, loss = expected["token" if case == "token" else "sequence"]
    for result in ranks[world_size]:
        assert apart(result[case]["grads"], grads) < 1e-4
        assert result[case]["sums"]["loss"] == pytest.approx(loss, rel=1e-4)
        assert result[case]["norm"] == pytest.approx(
            sum(float(g.double().pow(2).sum()) for g in grads.values()) ** 0.5, rel=1e-4
        )
        assert result[case]["sums"]["tokens"] == 3 + 11 + 24 + 1 + 17 + 6


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_second_update_is_measured_against_the_policy_before_the_first(ranks, tiny, world_size):
    """On any number of ranks and micro-batches; without the clip, or against the present policy, it is another one."""
    wanted, loss = plain(tiny, now=ranks[1][0]["twice"]["between"], clip=CLIP)
    unclipped, _ = plain(tiny, now=ranks[1][0]["twice"]["between"])
    for result in ranks[world_size]:
        twice = result["twice"]
        assert twice["first"]["clipped"] == 0 < twice["sums"]["clipped"] < twice["sums"]["tokens"]
        assert twice["sums"]["kl_old"] > 1e-4
        assert twice["sums"]["loss"] == pytest.approx(loss, rel=1e-3)
        assert apart(twice["grads"], wanted) < 0.01 < 0.1 < apart(twice["grads"], unclipped)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_in_bfloat16_the_gradients_are_about_the_same(ranks, expected, world_size):
    """As far as eight bits go; the policy's weights keep the type."""
    for result in ranks[world_size]:
        assert apart(result["bfloat16"]["grads"], expected["sequence"][0]) < 0.1
        assert {w.dtype for w in result["bfloat16"]["weights"].values()} == {torch.bfloat16}
        assert result["bfloat16"]["sums"]["loss"] == pytest.approx(expected["sequence"][1], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_with_the_settings_of_a_gpu_two_steps_go_as_they_should(ranks, expected, world_size):
    """Sums in float32 are nearer to the whole batch's gradient than those in bfloat16, and all ranks agree."""
    for result in (f["as on a GPU"] for f in ranks[world_size]):
        assert (result["accumulated"], result["fused"]) == ("torch.float32", True)
        assert apart(result["grads"], expected["sequence"][0]) < 0.1
        assert result["second"] is False
        first, second = ranks[world_size][0]["as on a GPU"]["weights"], ranks[world_size][0]["as on a GPU"]["after"]
        assert all(torch.equal(w, second[n]) for n, w in result["after"].items())
        assert any(not torch.equal(w, second[n]) for n, w in first.items()), "the second step moved on"
        assert all(bool(w.isfinite().all()) for w in result["after"].values())


@pytest.mark.parametrize("gpu", [True, False])
def test_only_a_gpu_has_a_fused_optimizer_and_sums_in_float32(gpu):
    made = _adamw([torch.nn.Parameter(torch.zeros(2))], OPTIMIZER, gpu)
    assert bool(made.defaults["fused"]) is gpu
    config = _config(ModelSettings(dtype="bfloat16"), OPTIMIZER, 4, gpu, 10)
    assert config["data_types"] == ({"grad_accum_dtype": "fp32"} if gpu else {})
    assert config["zero_optimization"]["overlap_comm"] is gpu


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_memory_that_cannot_be_shared_with_the_engine_is_refused(name):
    check_allocator({name: "max_split_size_mb:512,expandable_segments:False"})
    with pytest.raises(PlatformError, match=rf"{name}=.*remove expandable_segments"):
        check_allocator({name: "max_split_size_mb:512, expandable_segments: True"})


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_any_cut_gives_the_same_weights(ranks, world_size, k):
    """After the optimiser step, on every rank. (Adam's first step is the gradient's sign: where a gradient is all but
    zero, rounding decides it; a wrong denominator would not show here at all, hence the test above.)"""
    wanted = ranks[1][0]["k1"]["weights"]
    for result in ranks[world_size]:
        far = sum(int(((result[f"k{k}"]["weights"][n] - w).abs() > 1e-4).sum()) for n, w in wanted.items())
        assert far < 0.001 * sum(w.numel() for w in wanted.values())


@pytest.mark.slow
def test_ranks_have_the_same_weights_bit_for_bit(ranks):
    first, second = ranks[2]
    for case in ("k1", "k2", "k3", "uneven"):
        assert all(torch.equal(second[case]["weights"][n], w) for n, w in first[case]["weights"].items())


@pytest.mark.slow
def test_a_rank_without_any_sample_neither_hangs_nor_counts(ranks, expected):
    """All samples on rank 0, in several micro-batches; rank 1 keeps step with empty ones."""
    for result in (*ranks[1], *ranks[2]):
        assert result["uneven"]["batches"] > 1
        assert apart(result["uneven"]["grads"], expected["sequence"][0]) < 1e-4
        assert result["uneven"]["health"] == {
            "health/ratio": pytest.approx(1.0, abs=1e-4),
            "health/kl_old": pytest.approx(0.0, abs=1e-4),
        }


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_mean_of_micro_batch_means_is_wrong(ranks, expected, world_size):
    """Parts of 2, 2, 1 and 1 samples (on 2 ranks 2 and 1 each): their means weigh the single ones double. If this
    passed for right, the tests above could not tell anything."""
    assert apart(ranks[world_size][0]["naive"]["grads"], expected["sequence"][0]) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_not_a_number_is_skipped_on_all_ranks(ranks, world_size):
    """NaN in one micro-batch of one rank: no rank may step, and the next step is a clean one."""
    for result in ranks[world_size]:
        assert result["nan"]["skipped"] == [True, True, False]
        assert result["nan"]["norms"][0] != result["nan"]["norms"][0], "the log says nan"
        assert result["nan"]["unchanged"]
        assert result["nan"]["recovered"]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", ["resumed", "resumed from a copy"])
def test_a_trainer_continues_from_what_was_saved_bit_for_bit(ranks, world_size, case):
    """Weights come from the policy alone: a second copy of them is 16 GB of a 7B's checkpoint."""
    for result in (f[case] for f in ranks[world_size]):
        assert result["equal"]
        assert result["moved"]
        parameters = sum(w.numel() for n, w in ranks[1][0]["k1"]["weights"].items() if n != "lm_head.weight")
        assert result["saved"] < 1.05 * 12 * parameters, "masters and Adam's two moments, in float32"


def rates(steps: int = 10, **settings: Any) -> list[float]:
    chosen = OptimizerSettings(learning_rate=1.0, **settings)
    return [learning_rate(chosen, step, steps) for step in range(steps)]


def test_learning_rates():
    assert rates() == [1.0] * 10
    assert rates(warmup_steps=3)[:4] == [0.25, 0.5, 0.75, 1.0]
    linear = rates(schedule="linear")
    assert linear == pytest.approx([1.0 - i / 10 for i in range(10)])
    cosine = rates(schedule="cosine", warmup_steps=2)
    assert cosine[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert cosine[6] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in itertools.pairwise(cosine[2:]))


@pytest.mark.slow
def test_the_rate_of_the_schedule_is_the_one_used(ranks):
    assert ranks[1][0]["k1"]["rate"] == OPTIMIZER.learning_rate


def test_micro_batches_hold_all_and_are_within_their_size():
    lengths = [5, 90, 31, 30, 200, 7, 7]
    dealt = micro_batches(lengths, 100)
    assert sorted(i for part in dealt for i in part) == list(range(7))
    for part in dealt:
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 100
    assert [4] in dealt, "too long for any micro-batch: alone, not lost"
    assert micro_batches([], 100) == []


def test_bad_steps_in_a_row_stop_the_run_with_their_batch(tmp_path):
    """One bad step is passed over; several in a row are a run that only burns money."""
    worker = object.__new__(TrainWorker)
    worker.ufm = type("U", (), {"grpo": GRPOSettings()})()
    worker.folder, worker.rank, worker._bad = tmp_path, 0, 0
    worker.trainer = type("T", (), {"settings": OptimizerSettings(max_bad_steps=3)})()
    for step, bad in enumerate((True, True, False, True, True)):
        worker.skipped(step, bad, [{"answer": "x"}])
    with pytest.raises(
        DivergedError, match=r"3 steps in a row, the last one step 5; its batch is in .*bad-step-5-rank-0"
    ):
        worker.skipped(5, True, [{"answer": "last"}])
    assert "last" in (tmp_path / "bad-step-5-rank-0.json").read_text()


def test_workers_that_see_different_checkpoints_do_not_start(tmp_path, monkeypatch):
    """ZeRO's shards of two steps would be put together, without any error."""
    worker = object.__new__(TrainWorker)
    worker.folder, worker.rank, worker.device = tmp_path, 0, torch.device("cpu")
    worker.checkpoints = type("C", (), {"latest": lambda self: None})()
    worker.job = type("J", (), {"checkpoints": "/scratch/checkpoints"})()
    monkeypatch.setattr("gubs.ufm.train_worker.reduce_max", lambda own, _: max(own, 50))  # another rank has step 50
    with pytest.raises(SharedError, match="/scratch/checkpoints is not shared"):
        worker._resume()


class OldEngine:
    """Answers once with weights that it was not sent last."""

    sync = SimpleNamespace(version=2)

    def generate(self, asked, model):
        return [Response((1,), (0.0,), v) for v in (2, 1)]


@pytest.mark.parametrize("step", [0, 40])
def test_answers_of_an_engine_with_old_weights_are_refused_at_every_step(step):
    shell = object.__new__(GRPOWorker)
    shell.phases, shell.engine, shell.inputs = Phases(), OldEngine(), None
    shell.trainer = SimpleNamespace(model=None)
    with pytest.raises(PlatformError, match=r"weights \[1\]"):
        shell._answer(StepPlan(Task.SEQUENTIAL, 0, 1, []), step)


def test_an_engine_that_dies_while_it_is_counted_costs_the_worker_nothing():
    """The next call to it starts it again; its counters then begin at zero."""
    from ray.exceptions import RayActorError

    def dead(*_):
        raise RayActorError

    shell = object.__new__(RolloutEngine)
    shell.handle = SimpleNamespace(figures=SimpleNamespace(remote=lambda: None))
    shell._counted, shell._get = {"prefix_hits": 7.0}, dead
    assert shell.reuse() == dict.fromkeys(FIGURES, 0.0)
    shell._get = lambda *_: dict.fromkeys(FIGURES, 3.0)
    assert shell.reuse() == dict.fromkeys(FIGURES, 3.0)


def test_a_thread_beside_the_training_has_no_team_and_leaves_the_trainers_alone():
    before = torch.get_num_threads()
    try:
        for device, threads in (("cpu", 1), ("cuda", 3)):
            torch.set_num_threads(3)
            with background_thread("ahead", torch.device(device)) as pool:
                assert pool.submit(torch.get_num_threads).result() == threads
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_step_whose_prompts_were_all_too_long_moves_no_weight(ranks):
    """Adam would move on by its momentum, and decay the weights."""
    for results in ranks.values():
        assert all(f["silent"] == {"equal": True, "skipped": False} for f in results)
