"""What is always logged of the answers, by hand, over workers; who shows which answers to people."""

from dataclasses import replace

import pytest

from gubs.prompts.answers import Failure
from gubs.records import Option, Task
from gubs.ufm.advantage import SampleRole
from gubs.ufm.inputs import Encoded
from gubs.ufm.questions import Item
from gubs.ufm.rollout import Response
from gubs.ufm.samples import Sample, StepPlan, answer_figures, answer_sums, assign_rewards
from gubs.ufm.settings import GRPOSettings

RIGHT, SKIPS, WATCHES = (f"<think>t</think><answer>{o}</answer>" for o in "BCA")
CUT, CUT_LATE, OPEN = "<think>t", f"{RIGHT} and more", "<think>t</think><answer>B"
TEXTS = {1: (RIGHT, True), 2: (SKIPS, True), 3: (WATCHES, True), 4: (CUT, False), 5: (CUT_LATE, False), 6: (OPEN, True)}
"""Answer and whether the model ended it, by its first token."""

FIRST = {"T": (1, 2, 3, 4), "S": (1,), "G": (6,)}
"""Rewards T 3, 2, 1, 0; S 3; G 0: all parts, the right form and a skip, the form only, nothing."""
SECOND = {"T": (1, 1, 1, 1), "S": (1,), "G": (5,)}
"""Rewards 3 and for G 2: the right option, in a form that was cut off."""


def plan_of(group: int, answers: dict[str, tuple[int, ...]], dropped: int = 0, alone: int = 0) -> tuple[StepPlan, list]:
    item = Item("i", "u", "v", Task.SEQUENTIAL, Option.B, "x")
    encoded = Encoded.__new__(Encoded)
    samples, responses = [], []
    for role, firsts in answers.items():
        for k, first in enumerate(firsts):
            samples.append(Sample(group, SampleRole(role), k, item, encoded, 0))
            responses.append(Response((first,) * (first + 1), (0.0,) * (first + 1), 0))
    return StepPlan(Task.SEQUENTIAL, 0, 2, samples, dropped, alone), responses


def figures(settings: GRPOSettings) -> dict[str, float]:
    """Of two workers with a group each."""
    sums: dict[str, float] = {}
    for plan, responses in (plan_of(0, FIRST, dropped=2), plan_of(1, SECOND, alone=1)):
        result = assign_rewards(plan.samples, responses, lambda ids: TEXTS[ids[0]], settings)
        for name, value in answer_sums(plan, result).items():
            sums[name] = sums.get(name, 0.0) + value
    return answer_figures(sums)


def test_what_is_always_logged_is_what_one_counts_by_hand():
    """Rule `paper`, weights .7, .15, .15; right: 2 + 6 answers, also the one that was cut off after its answer part."""
    f = figures(GRPOSettings(advantage={"rule": "paper"}))
    assert f["reward_raw/T"] == pytest.approx((3 + 2 + 1 + 0 + 4 * 3) / 8)
    assert f["reward_raw/S"] == 3
    assert f["reward_raw/G"] == pytest.approx((0 + 2) / 2)
    assert f["reward_weighted/T"] == pytest.approx(0.7 * 18 / 8)
    assert f["reward_weighted/S"] == pytest.approx(0.45)
    assert f["reward_weighted/G"] == pytest.approx(0.15)
    assert f["reward"] == pytest.approx((9 + 17) / 12)
    assert f["reward/format"] == pytest.approx((4 + 5) / 12)
    assert f["reward/skip"] == pytest.approx((3 + 6) / 12)
    assert f["reward/choice"] == pytest.approx((2 + 6) / 12)
    # of the first group, times W: 2.1, 1.4, .7, 0, .45, 0, mean .775; of the second 2.1 x 4, .45, .3, mean 1.525
    mean = [(2.1 + 1.4 + 0.7 - 3 * 0.775 - 0.775, 0.45 - 0.775, 0.0 - 0.775), (4 * 0.575, 0.45 - 1.525, 0.3 - 1.525)]
    std = [
        (sum((x - 0.775) ** 2 for x in (2.1, 1.4, 0.7, 0, 0.45, 0)) / 5) ** 0.5,
        (sum((x - 1.525) ** 2 for x in (2.1, 2.1, 2.1, 2.1, 0.45, 0.3)) / 5) ** 0.5,
    ]
    for place, (role, count) in enumerate({"T": 8, "S": 2, "G": 2}.items()):
        wanted = sum(m[place] / s for m, s in zip(mean, std, strict=True)) / count
        assert f[f"advantage/{role}"] == pytest.approx(wanted, rel=1e-3), role
    assert f["frac_zero_variance"] == 0
    assert f["frac_right_pushed_down"] == pytest.approx(3 / 8), "the S of both, the G of the second"
    assert f["frac_wrong_pushed_up"] == pytest.approx(1 / 4), "the wrong skip of the first"
    assert f["dropped_too_long"] == 2
    assert f["without_peer"] == 1


def test_what_was_cut_off_and_what_cannot_be_read_are_two_things():
    """Cut off before its answer part ended: one. Three cannot be read, by the cause that `read_answer` gives."""
    f = figures(GRPOSettings())
    assert f["frac_truncated"] == pytest.approx(1 / 12)
    causes = {str(c): f[f"unparsed/{c}"] for c in Failure if f[f"unparsed/{c}"]}
    assert causes == {"truncated": pytest.approx(3 / 12)}
    assert f["response_tokens"] == pytest.approx((2 + 3 + 4 + 5 + 2 + 7 + 5 * 2 + 6) / 12)
    assert f["tokens/rollout"] == 39


def test_rewards_can_be_switched_off():
    """Table 10."""
    f = figures(GRPOSettings(rewards={"format": True, "skip": False, "choice": True}))
    assert f["reward/skip"] == 0
    assert f["reward_raw/S"] == 2
    assert f["reward"] == pytest.approx((9 + 8) / 12)


def test_alike_groups_are_counted():
    plan, responses = plan_of(0, {"T": (1, 1, 1, 1), "S": (1,), "G": (1,)})
    result = assign_rewards(
        plan.samples, responses, lambda ids: TEXTS[ids[0]], GRPOSettings(advantage={"rule": "weighted"})
    )
    assert answer_figures(answer_sums(plan, result))["frac_zero_variance"] == 1
    assert {s.advantage for s in plan.samples} == {0.0}


@pytest.mark.parametrize(("gold", "rewards"), [(Option.A, (1, 1, 2, 0)), (None, (2, 2, 1, 0))])
def test_where_no_reason_is_known_only_skip_or_not_is_rewarded(gold, rewards):
    """Any skip is as right as another, and watching on earns no more than a skip that is right."""
    plan, responses = plan_of(0, FIRST)
    for sample in plan.samples:
        sample.item = replace(sample.item, gold=gold, reasons_known=False)
    assign_rewards(plan.samples, responses, lambda ids: TEXTS[ids[0]], GRPOSettings())
    own = [s for s in plan.samples if s.role == SampleRole.T]
    assert tuple(s.parts.total for s in own) == rewards
    assert [s.right for s in own] == [gold is None, gold is None, gold is not None, False]
    assert own[0].to_json()["gold"] == ("skip" if gold is None else "A")


def test_a_doubted_record_gives_no_advantage_and_is_counted():
    """Gold B; four of six answers say that it is watched on. With `doubt` up to 4/6 the record is dropped."""
    answers = {"T": (3, 3, 3, 1), "S": (3,), "G": (2,)}
    for doubt, dropped in ((0.0, False), (0.6, True), (0.7, False)):
        plan, responses = plan_of(0, answers)
        settings = GRPOSettings(advantage={"rule": "weighted"}, doubt=doubt)
        result = assign_rewards(plan.samples, responses, lambda ids: TEXTS[ids[0]], settings)
        assert any(s.advantage for s in plan.samples) is not dropped
        assert answer_figures(answer_sums(plan, result))["frac_doubted"] == float(dropped)


def test_answers_without_an_option_doubt_nothing():
    plan, responses = plan_of(0, {"T": (4, 4, 4, 1), "S": (4,), "G": (4,)})
    assign_rewards(plan.samples, responses, lambda ids: TEXTS[ids[0]], GRPOSettings(doubt=0.5))
    assert not any(s.doubted for s in plan.samples)


@pytest.mark.parametrize(
    ("tasks", "steps", "total"),
    [
        (["sequential", "sequential", "sequential", "click"], 45, 60),
        (["sequential", "click"], 200, 400),
        (["click"], 45, 45),
        (["sequential", "sequential", "click"], 3, 4),
    ],
)
def test_steps_are_those_of_a_task(tasks, steps, total):
    """The paper's 200 steps are 200 of each task; of a task that the data set lacks there are none."""
    settings = GRPOSettings(tasks=tasks, steps=steps)
    assert settings.total_steps() == total
    turns = [tasks[n % len(tasks)] for n in range(total)]
    assert max(map(turns.count, tasks)) == steps
    assert settings.total_steps([Task.CLICK]) == steps
