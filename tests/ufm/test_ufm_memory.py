"""The memory sum: the numbers of the paper's model, and that what cannot fit is refused with them."""

import pytest

from gubs.config import load_settings
from gubs.errors import PlatformError
from gubs.ufm.memory import GIB, QWEN2_5_VL_7B, Architecture, Machine, check, config_of, plan_grpo, plan_sft
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
    """ga-grpo: bf16 16.6 GB; ZeRO-2 on 4: masters and Adam 24.9 GB, gradients 4.1 GB; reference 16.6 GB."""
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    parts = phase(plan, "train").parts
    assert parts["weights"] / 1e9 == pytest.approx(16.6, abs=0.05)
    assert parts["masters, Adam"] / 1e9 == pytest.approx(24.9, abs=0.05)
    assert parts["gradients"] / 1e9 == pytest.approx(4.15, abs=0.05)
    assert sum(parts[n] for n in ("weights", "masters, Adam", "gradients")) / 1e9 == pytest.approx(46, abs=0.5)
    assert phase(plan, "reference").parts["reference"] / 1e9 == pytest.approx(16.6, abs=0.05)
    assert plan.host["reference"] == parts["weights"]


def test_the_papers_setting_fits_four_a100_and_not_one(paper):
    assert not plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB).problems
    assert not plan_sft(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB).problems
    alone = load_settings("paper", ["ufm.workers.count=1"]).ufm
    with pytest.raises(PlatformError, match=r"cannot fit(.|\n)*masters, Adam 92\.7 GiB"):
        check(plan_grpo(alone, QWEN2_5_VL_7B, FRAMES, 80 * GIB), Machine(80 * GIB, 4, 512 * GIB))


def test_what_the_workers_keep_in_their_machines_memory_has_to_fit_too(paper):
    """Reference and sleeping engine, twice 15.4 GiB, for each of the machine's workers."""
    plan = plan_grpo(paper, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
    check(plan, Machine(80 * GIB, 4, 128 * GIB))
    check(plan, Machine(80 * GIB, 2, 64 * GIB))
    with pytest.raises(PlatformError, match=r"4 worker\(s\) keep 123\.\d GiB .* has 120\.0 GiB"):
        check(plan, Machine(80 * GIB, 4, 120 * GIB))


def test_without_sleep_the_engine_stays_beside_the_trainer():
    plans = {
        sleep: plan_grpo(load_settings("paper", [f"ufm.rollout.sleep={sleep}"]).ufm, QWEN2_5_VL_7B, FRAMES, 80 * GIB)
        for sleep in (True, False)
    }
    share = 0.45 * 80 * GIB
    assert phase(plans[False], "train").total - phase(plans[True], "train").total == pytest.approx(share - GIB)
    assert "engine asleep" not in plans[False].host
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
