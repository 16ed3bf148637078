"""What becomes of an answer's probabilities: the option of the highest expected reward, and that of the threshold."""

import numpy as np
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


def prediction(skip: float, letter: str = "C", text: str | None = None) -> Prediction:
    """The policy wrote an option and finds B half as probable as C."""
    shares = (1 - skip, skip / 3, 2 * skip / 3, 0.0)
    options = OptionProbabilities(dict(zip(Option, shares, strict=True)), 1.0)
    text = text or f"<think>No.</think><answer>{letter}</answer>"
    return Prediction((judge.GREEDY, 0), text, True, options=options)


def rule(threshold: float, shift: float = 0.0) -> DecisionRule:
    """Adds `shift` to the logit."""
    curve = Curve((-9.0, 9.0), (-9.0 + shift, 9.0 + shift))
    return DecisionRule(Calibration("platt", curve, {}, 0, 0, 0, (), 1), Threshold(threshold, 0, 0, 0, 1), 0.5)


def rows(answer: Prediction, target: Item, rules: judge.Rules) -> dict[str, judge.Row]:
    answers = {(mode, 0): answer for mode in (judge.GREEDY, judge.SAMPLED)}
    predictions = judge.predictions([(target, {"natural": True, "balanced": False})], answers, rules)
    return {r["mode"]: r for r in predictions}


def test_calibration_and_threshold_decide_and_not_the_letter():
    by_mode = rows(prediction(0.7), item(), {Task.SEQUENTIAL: rule(0.9, shift=-1.0)})
    assert list(by_mode) == list(judge.MODES)
    assert (by_mode["greedy"]["predicted"], by_mode["greedy"]["skip"]) == ("C", pytest.approx(0.7))
    assert by_mode["calibrated"]["skip"] == by_mode["filter"]["skip"] == pytest.approx(0.4619, abs=1e-3)
    assert by_mode["calibrated"]["predicted"] == "A", "2 x .54 against .46 + .31"
    assert by_mode["filter"]["predicted"] == "A"
    assert rows(prediction(0.7), item(), {Task.SEQUENTIAL: rule(0.4, shift=-1.0)})["filter"]["predicted"] == "C"


def test_the_reward_is_that_of_the_option_in_the_form_of_the_answer():
    bare = "<answer>C</answer> So it is."  # an option that can be read, in no good form
    for text, of_form in ((None, 1.0), (bare, 0.0)):
        by_mode = rows(prediction(0.7, text=text), item(gold=Option.B), {Task.SEQUENTIAL: rule(0.5)})
        assert by_mode["greedy"]["reward"] == of_form + 1.0, "a skip, but for another reason"
        assert by_mode["filter"]["reward"] == of_form + 1.0
        kept = rows(prediction(0.7, text=text), item(gold=Option.A), {Task.SEQUENTIAL: rule(0.8)})
        assert kept["greedy"]["reward"] == of_form
        assert kept["filter"]["reward"] == of_form + 2.0


def test_an_answer_without_an_option_stays_one():
    unread = Prediction((judge.GREEDY, 0), "I cannot tell.", True)
    by_mode = rows(unread, item(), {Task.SEQUENTIAL: rule(0.5)})
    assert {r["predicted"] for r in by_mode.values()} == {None}
    assert {r["skip"] for r in by_mode.values()} == {None}


def test_without_held_out_targets_the_greedy_answer_counts():
    by_mode = rows(prediction(0.7), item(), {})
    assert by_mode["filter"] == {**by_mode["greedy"], "mode": "filter"}


def test_an_unexplained_skip_has_a_decision_and_no_reward():
    by_mode = rows(prediction(0.7), item(gold=None), {Task.SEQUENTIAL: rule(0.5)})
    assert (by_mode["filter"]["predicted"], by_mode["filter"]["reward"]) == ("C", None)


def test_a_rule_is_made_per_task_from_readable_targets_of_both_kinds():
    items = [item(k, Option.A if k % 2 else Option.B) for k in range(40)]
    items += [item(k, Option.A, Task.CLICK) for k in range(20)]
    options = [prediction(0.3 if k % 2 else 0.8).options for k in range(60)]
    options[0] = None
    fitted = decision_rule(items, options, Task.SEQUENTIAL, DecisionSettings(share=0.0))
    assert (fitted.auc, fitted.threshold.n, fitted.threshold.lost) == (1.0, 39, 0.0)
    assert fitted.threshold.kept == pytest.approx(20 / 39)
    assert float(fitted.calibration.curve(0.3)) < fitted.threshold.value <= float(fitted.calibration.curve(0.8)) + 1e-9
    assert decision_rule(items, options, Task.CLICK, DecisionSettings()) is None, "all were clicked"


def test_what_was_not_calibrated_is_told():
    items = [(item(), {}), (item(task=Task.CLICK), {})]
    assert judge._uncalibrated(items, {Task.SEQUENTIAL: rule(0.5)}).endswith("are the greedy answers: click")
    assert judge._uncalibrated(items, {task: rule(0.5) for task in Task}) == ""


def noise(seed: int, users: int) -> tuple[list[Item], list[OptionProbabilities]]:
    """Four targets per user; P(skip) tells nothing about what happened."""
    rng, items, options = np.random.default_rng(seed), [], []
    skipped, logits = rng.random(4 * users) < 0.35, rng.normal(0, 1.5, 4 * users)
    for number, logit in enumerate(logits.tolist()):
        gold = Option.B if skipped[number] else Option.A
        items.append(Item(f"i{number}", f"u{number // 4:03}", "v", Task.SEQUENTIAL, gold, "rule", play_rate=0.5))
        options.append(prediction(float(1 / (1 + np.exp(-logit)))).options)
    return items, options


def test_at_most_a_tenth_of_what_others_watch_is_lost_and_no_figure_is_too_good():
    """Wrong here: the threshold is chosen on the values that were fitted to the same targets. Of noise it then says
    that it is better than chance, and users that it was not fitted on lose more than a tenth."""
    lost, stated = [], []
    for seed in range(20):
        items, options = noise(seed, 20)
        fitted = decision_rule(items, options, Task.SEQUENTIAL, DecisionSettings(goal="lose", share=0.1))
        others, raw = noise(1000 + seed, 500)
        dropped = fitted.calibration.curve([o.skip for o in raw]) >= fitted.threshold.value
        lost.append(np.mean([d for d, i in zip(dropped, others, strict=True) if i.gold == Option.A]))
        stated.append(fitted.threshold.balanced_accuracy)
    assert np.mean(lost) <= 0.1
    assert np.mean(stated) <= 0.51


def test_an_evaluation_of_an_earlier_version_is_decided_again_from_what_it_stored():
    items = [item(k, Option.A if k % 2 else Option.B) for k in range(40)]
    options = [prediction(0.3 if k % 2 else 0.8).options for k in range(40)]
    stored = judge.held_out_table(items, options).to_pylist()
    settings = DecisionSettings(goal="lose", share=0.0)
    threshold = decision_rule(items, options, Task.SEQUENTIAL, settings).threshold.value
    before = {"task": "sequential", "mode": judge.FILTER, "reward": 3.0}
    rows = [{**before, "skip": s, "predicted": p} for s, p in ((1.0, "A"), (1.0, "C"), (0.0, "C"), (None, None))]
    rows.append({**rows[0], "mode": judge.CALIBRATED})
    made = judge.decided_again(rows, stored, settings)
    assert 0 < threshold <= 1
    assert [r["predicted"] for r in made] == ["B", "C", "A", None, "A"]
    assert [r["reward"] for r in made] == [None, 3.0, None, 3.0, 3.0]
