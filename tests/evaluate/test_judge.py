"""What becomes of an answer's probabilities: the option of the highest expected reward, and that of the threshold."""

import pytest

from gubs.evaluate import judge
from gubs.evaluate.calibration import Calibration, Curve
from gubs.evaluate.held_out import DecisionRule, decision_rule
from gubs.evaluate.settings import DecisionSettings
from gubs.evaluate.thresholds import Threshold
from gubs.records import Option, Task
from gubs.ufm.labels import OptionProbabilities
from gubs.ufm.predict import Prediction
from gubs.ufm.questions import Item


def item(number: int = 0, gold: Option | None = Option.A, task: Task = Task.SEQUENTIAL) -> Item:
    rate = None if task == Task.CLICK else 0.9 if gold == Option.A else 0.1
    return Item(f"i{number}", f"u{number % 10}", "v", task, gold, "rule", play_rate=rate)


def prediction(skip: float, said: str = "C", text: str | None = None) -> Prediction:
    """The policy wrote an option and finds B half as probable as C."""
    shares = (1 - skip, skip / 3, 2 * skip / 3, 0.0)
    options = OptionProbabilities(dict(zip(Option, shares, strict=True)), 1.0)
    text = text or f"<think>No.</think><answer>{said}</answer>"
    return Prediction((judge.GREEDY, 0), text, True, options=options)


def rule(threshold: float, shift: float = 0.0) -> DecisionRule:
    """Adds `shift` to the logit."""
    curve = Curve((-9.0, 9.0), (-9.0 + shift, 9.0 + shift))
    return DecisionRule(Calibration("platt", curve, {}, 0, 0, 0, (), 1), Threshold(threshold, 0, 0, 0, 1), 0.5)


def rows(answer: Prediction, target: Item, rules: judge.Rules) -> dict[str, judge.Row]:
    answers = {(mode, 0): answer for mode in (judge.GREEDY, judge.SAMPLED)}
    found = judge.predictions([(target, {"natural": True, "balanced": False})], answers, rules)
    return {r["mode"]: r for r in found}


def test_calibration_and_threshold_decide_and_not_the_letter():
    found = rows(prediction(0.7), item(), {Task.SEQUENTIAL: rule(0.9, shift=-1.0)})
    assert list(found) == list(judge.MODES)
    assert (found["greedy"]["predicted"], found["greedy"]["skip"]) == ("C", pytest.approx(0.7))
    assert found["calibrated"]["skip"] == found["filter"]["skip"] == pytest.approx(0.4619, abs=1e-3)
    assert found["calibrated"]["predicted"] == "A", "2 x .54 against .46 + .31"
    assert found["filter"]["predicted"] == "A"
    assert rows(prediction(0.7), item(), {Task.SEQUENTIAL: rule(0.4, shift=-1.0)})["filter"]["predicted"] == "C"


def test_the_reward_is_that_of_the_option_in_the_form_of_the_answer():
    bare = "<answer>C</answer> So it is."  # an option that can be read, in no good form
    for text, of_form in ((None, 1.0), (bare, 0.0)):
        found = rows(prediction(0.7, text=text), item(gold=Option.B), {Task.SEQUENTIAL: rule(0.5)})
        assert found["greedy"]["reward"] == of_form + 1.0, "a skip, but for another reason"
        assert found["filter"]["reward"] == of_form + 1.0
        kept = rows(prediction(0.7, text=text), item(gold=Option.A), {Task.SEQUENTIAL: rule(0.8)})
        assert kept["greedy"]["reward"] == of_form
        assert kept["filter"]["reward"] == of_form + 2.0


def test_an_answer_without_an_option_stays_one():
    unread = Prediction((judge.GREEDY, 0), "I cannot tell.", True)
    found = rows(unread, item(), {Task.SEQUENTIAL: rule(0.5)})
    assert {r["predicted"] for r in found.values()} == {None}
    assert {r["skip"] for r in found.values()} == {None}


def test_without_held_out_targets_the_greedy_answer_counts():
    found = rows(prediction(0.7), item(), {})
    assert found["filter"] == {**found["greedy"], "mode": "filter"}


def test_an_unexplained_skip_has_a_decision_and_no_reward():
    found = rows(prediction(0.7), item(gold=None), {Task.SEQUENTIAL: rule(0.5)})
    assert (found["filter"]["predicted"], found["filter"]["reward"]) == ("C", None)


def test_a_rule_is_made_per_task_from_readable_targets_of_both_kinds():
    items = [item(k, Option.A if k % 2 else Option.B) for k in range(40)]
    items += [item(k, Option.A, Task.CLICK) for k in range(20)]
    options = [prediction(0.3 if k % 2 else 0.8).options for k in range(60)]
    options[0] = None
    found = decision_rule(items, options, Task.SEQUENTIAL, DecisionSettings(share=0.0))
    assert (found.auc, found.threshold.n, found.threshold.lost) == (1.0, 39, 0.0)
    assert found.threshold.kept == pytest.approx(20 / 39)
    assert float(found.calibration.curve(0.3)) < found.threshold.value <= float(found.calibration.curve(0.8)) + 1e-9
    assert decision_rule(items, options, Task.CLICK, DecisionSettings()) is None, "all were clicked"


def test_what_was_not_calibrated_is_told():
    items = [(item(), {}), (item(task=Task.CLICK), {})]
    assert judge._uncalibrated(items, {Task.SEQUENTIAL: rule(0.5)}).endswith("are the greedy answers: click")
    assert judge._uncalibrated(items, {task: rule(0.5) for task in Task}) == ""
