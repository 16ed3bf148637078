"""Settings as earlier versions named and recorded them: runs that were made then stay readable, and current.

A recipe records settings under the names that they had when the first runs were made, and leaves out what came later as
long as it has the value that does what was done before. So the fingerprint of what has not changed stays what it was.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from gubs.ufm.settings import total_steps

Values = dict[str, Any]

_TRUTH, _TRAIN, _TEST = "teachers.truth", "teachers.train_labels", "teachers.test_labels"
_FLAWS, _STEPS, _TASKS = "teachers.script_flaws", "ufm.grpo.steps", "ufm.grpo.tasks"
ALL_STEPS = "ufm.grpo.steps of all tasks together"
"""What recipes hold under the name `ufm.grpo.steps`: the setting is the steps of one task."""

RENAMED: Mapping[str, str] = {
    _TRUTH: "is now three settings: teachers.train_labels=truth, teachers.test_labels=truth (whose reasons are true), "
    "teachers.script_flaws=true (what the scripted teacher is told)",
}
"""Settings that no longer exist -> what to write instead."""

ADDED: Mapping[str, object] = {
    "ufm.seed": 0,
    "ufm.grpo.profiles": "own",
    "ufm.grpo.similar": "group",
    "ufm.grpo.similar_gold": "target",
    "ufm.grpo.doubt": 0.0,
}
"""Settings that came later -> the value that does what was done before."""


def recorded(values: Mapping[str, Any]) -> Values:
    """The settings of a stage, by dotted name, as its recipe records them."""
    kept = {n: v for n, v in values.items() if n not in ADDED or v != ADDED[n]}
    if _FLAWS in kept:
        kept[_TRUTH] = kept.pop(_FLAWS)
    if kept.get(_TRAIN, "") == kept.get(_TEST) and kept[_TRAIN] in ("teacher", "truth"):
        kept[_TRUTH] = kept.pop(_TRAIN) == kept.pop(_TEST) == "truth"
    if _STEPS in kept:
        kept[_STEPS] = total_steps(kept[_STEPS], kept[_TASKS])
    return kept


def shown(values: Mapping[str, Any], beside: Mapping[str, Any]) -> Values:
    """The settings of a recipe under the names of today; what `beside`, another recipe of the stage, has and this one
    leaves out is added.
    """
    named = {ALL_STEPS if n == _STEPS else n: v for n, v in values.items()}
    if _TRUTH in named:
        told = named.pop(_TRUTH)
        labels = "truth" if told else "teacher"
        named |= {_TRAIN: labels, _TEST: labels} if "teachers.train_skips" in named else {_FLAWS: told}
    return {n: v for n, v in ADDED.items() if n in beside} | named


def as_now(settings: Mapping[str, Any]) -> Values:
    """All settings of a manifest under the names of today.

    Raises:
        KeyError, TypeError: they are not those of a manifest.
    """
    now = deepcopy(dict(settings))
    teachers, ufm = now["teachers"], now["ufm"]
    if "truth" in teachers:
        told = teachers.pop("truth")
        labels = "truth" if told else "teacher"
        now["teachers"] = teachers | {"train_labels": labels, "test_labels": labels, "script_flaws": told}
    if "grpo" in ufm and "similar_gold" not in ufm["grpo"]:  # its steps were those of all tasks together
        tasks, steps = ufm["grpo"]["tasks"], ufm["grpo"]["steps"]
        ufm["grpo"]["steps"] = max(1, steps * max(map(tasks.count, tasks)) // len(tasks))
    return now
