"""The memory sum: the numbers of the paper's model, and that what cannot fit is refused with them."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from gubs.config import load_settings
from gubs.errors import PlatformError
from gubs.ufm import memory
from gubs.ufm.memory import (
    GIB,
    QWEN2_5_VL_7B,
    Architecture,
    Machine,
    check,
    check_disk,
    config_of,
    pinned,
    plan_grpo,
    plan_sft,
)
from gubs.ufm.settings import ModelSettings

FRAMES = load_settings("paper").frames


@pytest.fixture
def paper():
    return load_settings("paper").ufm


def phase(plan, name):
    return next(p for p in plan.phases if p.name == name)


def test_the_papers_model_has_the_published_number_of_parameters():
    a = Architecture.of(QWEN2_5_VL_7B)
    assert a.parameters == 8_292_166_656  # Qwen2.5-VL-7B-Instruct's model card and index: 8.29 B
    assert a.kv_bytes(2) == 57_344


@pytest.mark.parametrize("size", ["tiny", "7b"])
def test_parameters_equal_those_of_the_model_itself(size):
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = config_of(load_settings("tiny", [f"ufm.model.size={size}", "ufm.model.lessons=0"]).ufm)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    assert Architecture.of(config).parameters == sum(p.numel() for p in model.parameters())


def test_shares_of_the_papers_setting(paper):
    """bf16 16.6 GB; ZeRO-2 on 4: masters and Adam 24.9 GB, gradients (summed in float32) 8.3 GB; reference 16.6 GB."""
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    parts = phase(plan, "train").parts
    assert parts["weights"] / 1e9 == pytest.approx(16.6, abs=0.05)
    assert parts["masters, Adam"] / 1e9 == pytest.approx(24.9, abs=0.05)
    assert parts["gradients"] / 1e9 == pytest.approx(8.3, abs=0.05)
    assert sum(parts[n] for n in ("weights", "masters, Adam", "gradients")) / 1e9 == pytest.approx(49.8, abs=0.5)
    assert phase(plan, "reference").parts["reference"] / 1e9 == pytest.approx(16.6, abs=0.05)
    assert plan.host["reference"] == 16 * GIB, "one pinned buffer for 15.4 GiB, rounded up to a power of two"


def test_the_papers_setting_fits_four_a100_and_not_one(paper):
    assert not plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB).problems
    assert not plan_sft(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB).problems
    alone = load_settings("paper", ["ufm.workers.count=1"]).ufm
    with pytest.raises(PlatformError, match=r"cannot fit(.|\n)*masters, Adam 92\.7 GiB"):
        check(plan_grpo(alone, QWEN2_5_VL_7B, FRAMES, 80 * GIB), Machine(80 * GIB, 4, 512 * GIB))


def test_what_the_workers_keep_in_their_machines_memory_has_to_fit_too(paper):
    """The reference in a pinned buffer of 16 GiB, a quarter of a checkpoint that is being written, two processes; for
    each of the machine's workers."""
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    assert plan.host["checkpoint"] == plan.checkpoint / 4
    check(plan, Machine(80 * GIB, 4, 208 * GIB))
    check(plan, Machine(80 * GIB, 2, 104 * GIB))
    with pytest.raises(PlatformError, match=r"4 worker\(s\) keep 204\.\d GiB .* has 200\.0 GiB"):
        check(plan, Machine(80 * GIB, 4, 200 * GIB))
    plain = load_settings("paper", ["ufm.grpo.checkpoint.background=false"]).ufm
    assert "checkpoint" not in plan_grpo(plain, QWEN2_5_VL_7B, FRAMES, 80 * GIB).host


@pytest.mark.parametrize(
    ("size", "taken"), [(0, 1), (1, 1), (2, 2), (3, 4), (1 << 34, 1 << 34), ((1 << 34) + 1, 1 << 35)]
)
def test_pinned_memory_comes_in_powers_of_two(size, taken):
    assert pinned(size) == taken


def test_a_rollout_takes_more_than_the_engines_share(paper):
    """vLLM's CUDA context and graphs are not in it: at 0.45 the 7B would use 77 of 80 GiB."""
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    assert phase(plan, "rollout").total / GIB == pytest.approx(69.6, abs=0.1)
    wide = load_settings("paper", ["ufm.rollout.gpu_memory=0.45"]).ufm
    assert phase(plan_grpo(wide, QWEN2_5_VL_7B, FRAMES, 80 * GIB), "rollout").total / GIB == pytest.approx(
        77.6, abs=0.1
    )


def test_answers_that_share_a_row_make_it_longer(paper):
    """A prompt of 8,192 tokens with four answers of 512: a smaller micro-batch still has to hold it."""

    def tokens(*overrides):
        ufm = load_settings("paper", ["ufm.grpo.micro_tokens=64", *overrides]).ufm
        parts = phase(plan_grpo(ufm, QWEN2_5_VL_7B, FRAMES, 80 * GIB), "train").parts
        return parts["activations"], parts["shared rows"]

    shared, alone = tokens(), tokens("ufm.model.attention=flash_attention_2")
    assert shared[0] / alone[0] == pytest.approx((8192 + 4 * 512) / (8192 + 512), rel=0.01)
    assert shared[1] == 4 * 4 * (8192 + 4 * 512) * 3584 * 2, "keys and values for each answer, and their gradients"
    assert alone[1] == 0.0


def test_checkpoints_and_policy_have_to_fit_the_disk(paper, tmp_path, monkeypatch):
    """116 GB each: masters and moments 99.5, weights 16.6. Two are kept, the best one, and one is being written."""
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    assert plan.checkpoint / 1e9 == pytest.approx(116.1, abs=0.1)
    assert plan.disk / 1e9 == pytest.approx(4 * 116.1 + 16.6, abs=0.5)
    sft = plan_sft(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    assert sft.disk / 1e9 == pytest.approx(3 * 116.1 + 16.6, abs=0.5)
    free = [481 * 10**9]
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    check_disk(plan, tmp_path)
    (tmp_path / "step").write_bytes(bytes(2000))
    free[0] = int(plan.disk) - 1000
    check_disk(plan, tmp_path)  # what an earlier attempt wrote is part of it
    free[0] = int(plan.disk) - 3000
    with pytest.raises(
        PlatformError, match=r"free, and this training's checkpoints take up to 447\.9 GiB: 108\.1 GiB each"
    ):
        check_disk(plan, tmp_path)


def test_a_training_asks_for_its_disk_before_its_first_step(tmp_path, monkeypatch):
    """On CPUs too: three checkpoints of SFT, four of GA-GRPO, and the policy."""
    from gubs.ufm.model import init
    from gubs.ufm.stage import _check_disk

    ufm, start = load_settings("tiny", ["ufm.model.lessons=0"]).ufm, init("tiny")
    size = Architecture.of(config_of(ufm, start)).parameters
    for plan, kept in ((plan_sft, 3), (plan_grpo, 4), (memory.plan_distil, 3)):
        needed = kept * 16 * size + 4 * size
        for free in (needed, needed - 1):
            monkeypatch.setattr(memory.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            with nullcontext() if free == needed else pytest.raises(PlatformError, match="one of them being written"):
                _check_disk(ufm, FRAMES, start, plan, tmp_path)


def test_the_plan_tells_host_and_disk(paper):
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    lines = "\n".join(plan.lines())
    assert "host        51.0 GiB = " in lines
    assert "disk       447.9 GiB at most: checkpoints of 108.1 GiB each" in lines
    assert (plan.to_json()["disk"], plan.to_json()["checkpoint"]) == (plan.disk, plan.checkpoint)


def test_without_sleep_the_engine_stays_beside_the_trainer():
    plans = {
        sleep: plan_grpo(load_settings("paper", [f"ufm.rollout.sleep={sleep}"]).ufm, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
        for sleep in (True, False)
    }
    share = 0.35 * 80 * GIB
    assert phase(plans[False], "train").total - phase(plans[True], "train").total == pytest.approx(share)
    assert plans[False].problems


def test_an_engine_too_small_for_one_answer_is_refused():
    ufm = load_settings("paper", ["ufm.rollout.gpu_memory=0.2"]).ufm
    problems = plan_grpo(ufm, QWEN2_5_VL_7B, FRAMES, 80 * GIB).problems
    assert any("raise ufm.rollout.gpu_memory" in p for p in problems)


def test_checkpointing_and_shorter_micro_batches_save_memory(paper):
    def activations(*overrides):
        ufm = load_settings("paper", list(overrides)).ufm
        return phase(plan_grpo(ufm, QWEN2_5_VL_7B, FRAMES, 80 * GIB), "train").parts["activations"]

    usual = activations()
    assert activations("ufm.model.gradient_checkpointing=false") > 10 * usual
    assert activations("ufm.grpo.micro_tokens=64") < usual
    assert activations("ufm.inputs.vision=false") < usual


def test_more_workers_need_less_each(paper):
    four = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    eight = plan_grpo(
        load_settings("paper", ["ufm.workers.count=8", "ufm.grpo.prompts=8"]).ufm, QWEN2_5_VL_7B, FRAMES, 80 * GIB
    )
    assert phase(four, "train").parts["masters, Adam"] == 2 * phase(eight, "train").parts["masters, Adam"]
    assert eight.peak.total < four.peak.total


def test_the_7b_is_known_to_the_plan_but_has_to_be_given_to_train():
    from gubs.errors import SettingsError
    from gubs.ufm.model import checkpoint

    with pytest.raises(SettingsError, match=r"ufm\.model\.path"):
        checkpoint(ModelSettings(size="7b"))
