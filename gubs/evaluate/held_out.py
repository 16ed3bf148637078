"""Targets of training users that a policy's decisions are made from: calibration, threshold and quality of a ranking.

Held-out users are training users: calibration and threshold see no test user, and no policy is trained on the targets
of held-out users (`gubs.ufm.held_out`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gubs.evaluate.calibration import Calibration, cross_fitted, fit
from gubs.evaluate.settings import DecisionSettings
from gubs.evaluate.thresholds import Threshold, auc, choose_threshold
from gubs.records import Option, Split, Task
from gubs.ufm.held_out import HeldOut
from gubs.ufm.labels import OptionProbabilities
from gubs.ufm.questions import Item, Questions

_SALT = 59


@dataclass(frozen=True)
class DecisionRule:
    """How a policy decides in one task and mode: P(skip) is calibrated, then compared with the threshold."""

    calibration: Calibration
    threshold: Threshold
    """On the calibrated scale."""
    auc: float
    """Of P(skip) on the held-out targets."""


def held_out_items(
    questions: Questions, tasks: Collection[Task], held_out: HeldOut, decision: DecisionSettings, seed: int
) -> list[Item]:
    """Targets of held-out training users in their natural mix, at most `decision.items` per task.

    Args:
        questions: of the run.
        tasks: of the targets.
        held_out: the users.
        decision: how many.
        seed: of the draw.
    """
    chosen = []
    for task in tasks:
        items = questions.items(task, Split.TRAIN, unexplained=True)
        items = [i for i in items if i.user_id in held_out]
        order = np.random.default_rng([seed, _SALT, list(Task).index(task)]).permutation(len(items))[: decision.items]
        chosen += [items[i] for i in order]
    return chosen


def skipped(item: Item) -> bool:
    """What happened: a fast skip, or no click."""
    if item.task == Task.CLICK:
        return item.gold != Option.A
    return item.gold != Option.A if item.gold else True  # without a gold option only unexplained skips are asked about


def decision_rule(
    items: Sequence[Item], options: Sequence[OptionProbabilities | None], task: Task, settings: DecisionSettings
) -> DecisionRule | None:
    """Calibration and threshold for a task; None if its readable targets are all of one kind, or of one user.

    Args:
        items: held-out targets, of any task.
        options: the policy's probabilities for each; None where its answer names no option.
        task: of the decision.
        settings: the goal.
    """
    read = [(i, o) for i, o in zip(items, options, strict=True) if i.task == task and o is not None]
    chosen = [i for i, _ in read]
    truth, users = [skipped(i) for i in chosen], [i.user_id for i in chosen]
    return rule_from([o for _, o in read], truth, users, [i.gold for i in chosen], settings)


def rule_from(
    options: Sequence[OptionProbabilities],
    truth: Sequence[bool],
    users: Sequence[str],
    golds: Sequence[Option | None],
    settings: DecisionSettings,
) -> DecisionRule | None:
    """Calibration and threshold from held-out targets of one task; None if all are of one kind, or of one user.

    Args:
        options: the policy's probabilities of each target.
        truth: whether it was skipped (not clicked).
        users: whose targets they are.
        golds: the gold options; None where unknown.
        settings: the goal.
    """
    if len(set(truth)) < 2 or len(set(users)) < 2:
        return None
    raw = [o.skip for o in options]
    calibration = fit(raw, truth, users, options, golds)
    return DecisionRule(calibration, _threshold(calibration, raw, truth, users, settings), auc(raw, truth))


def _threshold(
    calibration: Calibration,
    raw: Sequence[float],
    truth: Sequence[bool],
    users: Sequence[str],
    settings: DecisionSettings,
) -> Threshold:
    """The threshold that meets the goal on users that the calibration was not fitted on, and measured on these.

    Fitted values follow the targets that they were fitted to, so on them alone a goal looks met that is not. A goal
    with a bound has to be met by both: where few values occur, each fold moves them a little, and a threshold among
    such neighbours would part what the filter cannot.
    """
    crossed = cross_fitted(calibration.method, raw, truth, users).tolist()
    chosen = choose_threshold(crossed, truth, settings)
    if settings.goal == "balanced":
        return chosen
    fitted = choose_threshold(calibration.curve(raw).tolist(), truth, settings)
    return replace(chosen, value=max(chosen.value, fitted.value))
