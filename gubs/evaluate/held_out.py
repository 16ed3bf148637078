"""Targets of training users that a policy's decisions are made from: calibration, threshold and quality of a ranking.

Held-out users are training users: calibration and threshold see no test user, and no policy is trained on the targets
of held-out users (`gubs.ufm.held_out`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from gubs.evaluate.calibration import Calibration, fit
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
    known = [(i, o) for i, o in zip(items, options, strict=True) if i.task == task and o is not None]
    truth = [skipped(i) for i, _ in known]
    if len(set(truth)) < 2 or len({i.user_id for i, _ in known}) < 2:
        return None
    raw = [o.skip for _, o in known]
    users, probabilities, golds = [i.user_id for i, _ in known], [o for _, o in known], [i.gold for i, _ in known]
    calibration = fit(raw, truth, users, probabilities, golds)
    threshold = choose_threshold(calibration.curve(raw).tolist(), truth, settings)
    return DecisionRule(calibration, threshold, auc(raw, truth))
