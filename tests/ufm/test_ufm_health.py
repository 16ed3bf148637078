"""The health checks of training can fail: what is wrong in one layout of a batch shows against another."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ufm_helpers import text_prompt, tiny_inputs, video_prompt

from gubs.ufm import health
from gubs.ufm import inputs as inputs_module
from gubs.ufm.grpo import GRPOWorker
from gubs.ufm.health import HealthError
from gubs.ufm.model import load
from gubs.ufm.settings import ModelSettings
from gubs.ufm.trainer import logprobs

CPU = torch.device("cpu")
HEALTHY = {"health/ratio": 1.0, "health/kl_old": 0.0, "health/kl": 0.0, "health/mismatch": 1.001, "skipped": 0.0}
HEALTHY |= {"health/drift": 0.0001}


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny, ModelSettings(dtype="float32", gradient_checkpointing=False))


@pytest.fixture
def inputs(tiny):
    return tiny_inputs(tiny)


def sequences(inputs):
    """Three answers to one prompt with a video, two to one of text only, of unequal lengths."""
    rng = np.random.default_rng(5)
    prompts = [inputs.encode(video_prompt("a")), inputs.encode(text_prompt("User: x. A longer text than the other"))]
    return [
        (prompts[which], [int(i) for i in rng.integers(300, len(inputs.tokenizer), length)])
        for which, length in ((0, 7), (0, 12), (0, 3), (1, 9), (1, 5))
    ]


def passes(model, inputs):
    """Log-probabilities in the layout of training, answers behind their prompt in one row, and those of the check."""

    def compute(batch):
        return logprobs(model, batch, vision=True)

    asked = sequences(inputs)
    with torch.no_grad():
        first = compute(inputs.collate(asked, share=True))
    return first, torch.cat(health.second_pass(compute, inputs, asked, 2048, CPU))


def test_two_layouts_agree(model, inputs):
    figures = health.compared(*passes(model, inputs))
    assert figures["health/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert figures["health/kl_old"] == pytest.approx(0.0, abs=1e-6)
    health.check(HEALTHY | figures, 0, "float32")


def test_answers_that_see_each_other_are_found(model, inputs, monkeypatch):
    one_text = lambda rows, sequences: None  # noqa: E731
    monkeypatch.setattr(inputs_module, "_shared_rows", one_text)
    figures = health.compared(*passes(model, inputs))
    with pytest.raises(HealthError, match="ratio = "):
        health.check(HEALTHY | figures, 0, "float32")


def test_positions_that_depend_on_the_layout_are_found(model, inputs, monkeypatch):
    """The second answer in a row must not be placed as if it came after the first."""
    collate = inputs_module.Inputs.collate

    def shifted(self, asked, *, share=False):
        batch = collate(self, asked, share=share)
        if not share:
            return batch
        onwards = torch.arange(batch.ids.shape[1]).expand_as(batch.positions)
        return dataclasses.replace(batch, positions=torch.maximum(batch.positions, onwards))

    monkeypatch.setattr(inputs_module.Inputs, "collate", shifted)
    figures = health.compared(*passes(model, inputs))
    with pytest.raises(HealthError, match=r"(kl_old|ratio) = "):
        health.check(HEALTHY | figures, 0, "float32")


@pytest.mark.parametrize(
    ("step", "ill", "says"),
    [
        (0, {}, None),
        (0, {"health/mismatch": 1.5}, "mismatch = 1.5, not 0 to 1.02"),
        (0, {"health/drift": 0.03}, "drift = 0.03, not -0.001 to 0.01"),
        (0, {"health/kl": 0.3}, "kl = 0.3"),
        (0, {"health/ratio": 1.1, "health/kl_old": 0.1}, "ratio = 1.1.*kl_old = 0.1"),
        (0, {"health/mismatch": float("nan")}, "mismatch = nan"),
        (0, {"health/mismatch": float("nan"), "skipped": 1.0}, None),
        (40, {"health/kl": 0.3}, None),
        (40, {"health/mismatch": 1.5}, "mismatch"),
    ],
)
def test_the_first_step_of_an_attempt_ends_a_run_that_is_not_healthy(step, ill, says):
    if says is None:
        health.check(HEALTHY | ill, step, "float32")
        return
    with pytest.raises(HealthError, match=says):
        health.check(HEALTHY | ill, step, "float32")


def test_rounding_of_half_precision_is_no_illness():
    """What was measured on a CPU in bfloat16: an unsure model, and one with wrong positions."""
    health.check(HEALTHY | {"health/mismatch": 1.063, "health/drift": 0.0032, "health/ratio": 1.004}, 0, "bfloat16")
    with pytest.raises(HealthError, match=r"mismatch = 1.67, not 0 to 1.12; drift = 0.096"):
        health.check(HEALTHY | {"health/mismatch": 1.67, "health/drift": 0.096}, 0, "bfloat16")


def test_a_step_has_the_alarm_among_its_figures_and_one_rank_says_it(capsys):
    drifted = HEALTHY | {"health/drift": 0.05}
    for rank, printed in ((0, 1), (1, 0)):
        worker = object.__new__(GRPOWorker)
        worker.rank, worker.ufm = rank, SimpleNamespace(model=SimpleNamespace(dtype="float32"))
        assert worker._with_alarm(dict(HEALTHY), 3) == HEALTHY | {health.ALARM: 0.0}
        assert worker._with_alarm(drifted, 4) == drifted | {health.ALARM: 1.0}
        message = " ".join(capsys.readouterr().err.split())
        assert message.count("step 4: engine and trainer drift apart: drift = 0.05") == printed


def test_later_steps_raise_an_alarm_and_go_on():
    assert health.alarm(HEALTHY, "float32") == ""
    assert health.alarm(HEALTHY | {"health/kl": 9.0, "health/ratio": 1.3}, "float32") == "", "learning moves these"
    assert health.alarm(HEALTHY | {"health/drift": 0.05}, "float32") == "drift = 0.05, not -0.001 to 0.01"
    assert "mismatch" in health.alarm(HEALTHY | {"health/mismatch": 1.2}, "bfloat16")
