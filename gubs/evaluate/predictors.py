"""What predictors answered about the test users' targets: judged policies, baselines, and files from elsewhere.

All are brought into one form, for the IF-VR table. Policies that were judged with other gold options do not stand
beside each other: their rewards would be about other truths.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import Artifact, Run
from gubs.errors import ArtifactError, InputError
from gubs.evaluate.bars import BARS
from gubs.evaluate.judge import BASE, CALIBRATED, FILTER, GREEDY, STAGE_PREFIX
from gubs.records import TASK_OPTIONS, Task
from gubs.ufm.stage import GRPO, SFT

REWARD = "reward"
"""R of Eq. 4, from 0 to 3 (to 2 where no reason of a skip is known). Without a model an answer is well-formed."""
PLAIN = "plain"
"""Name of a training without groups, which stands beside those with groups in a run."""
KEYS = ["interaction_id", "user_id", "predicted", "score", REWARD]
_MODES = {GREEDY: "", CALIBRATED: ", calibrated", FILTER: ", filter"}
"""Modes of a policy's answers that take a row each, and what their names end with."""


@dataclass(frozen=True)
class Stored:
    """What one predictor answered about targets of one task."""

    name: str
    frame: pd.DataFrame
    """interaction_id, user_id, predicted (option or None), score (or NaN), reward (NaN: none was given); of policies
    `failure` too, why an answer cannot be read.
    """
    reasons: bool
    """Whether it names reasons of skips, as far as they are known."""
    kind: str
    """`policy`, `baseline` or `file`."""
    rivals: tuple[str, ...] = ()
    """Policies, as rows, that it is compared with beside the baselines: what it was trained from, and `plain`."""


def evaluations(run: Run) -> list[Artifact]:
    """All evaluations of the run's policies."""
    return [run.artifact(stage) for stage in run.stages() if stage.startswith(STAGE_PREFIX)]


def collect(run: Run, task: Task, files: Mapping[str, str]) -> tuple[list[Stored], pd.DataFrame]:
    """All predictors of a task, and what happened: interaction_id, play_rate, clicked, gold.

    Raises:
        ArtifactError: policies were judged with other gold options.
        InputError: a file cannot be used; see `read_file`.
    """
    bars = run.artifact(BARS).table("predictions").to_pandas()
    bars = bars[bars["task"] == str(task)]
    if bars.empty:
        return [], bars
    bars[REWARD], by_reward = np.nan, run.artifact(BARS).manifest.info[str(task)].get("by_reward", [])
    predictors = [Stored(str(n), f[KEYS], n in by_reward, "baseline") for n, f in bars.groupby("method", sort=False)]
    judged = {e.stage: _answers(e, task) for e in evaluations(run) if not e.remade_inputs()}
    for stage, frame in judged.items():
        predictors += _rows(run, stage.removeprefix(STAGE_PREFIX), frame)
    happened = bars.drop_duplicates("interaction_id")[["interaction_id", "play_rate", "clicked"]]
    golds = _golds({stage: frame for stage, frame in judged.items() if len(frame)}, run)
    happened = happened.assign(gold=happened["interaction_id"].map(golds).where(lambda gold: gold != "", None))
    predictors += [Stored(n, read_file(path, task, happened), True, "file") for n, path in files.items()]
    return predictors, happened


def _answers(evaluation: Artifact, task: Task) -> pd.DataFrame:
    """A policy's answers in all modes, in the natural mix."""
    frame = evaluation.table("predictions").to_pandas()
    frame = frame[(frame["task"] == str(task)) & frame["natural"]]
    return frame.assign(score=frame["skip"].fillna(0.0))  # without a readable answer a video is kept


def _rows(run: Run, policy: str, frame: pd.DataFrame) -> Iterator[Stored]:
    """A policy as predictors, one per mode."""
    rivals = _rivals(run, policy)
    for mode, suffix in _MODES.items():
        part = frame[frame["mode"] == mode]
        if len(part):
            beside = tuple(rival + suffix for rival in rivals)
            yield Stored(policy + suffix, part[[*KEYS, "failure"]], True, "policy", beside)


def _rivals(run: Run, policy: str) -> list[str]:
    """Of a policy that GA-GRPO trained: the policy it started from, and the training without groups; else none."""
    if not run.has(policy) or run.artifact(policy).manifest.kind != GRPO:
        return []
    start = SFT if SFT in run.artifact(policy).manifest.recipe.inputs else BASE
    return [start] if policy == PLAIN else [start, PLAIN]


def _golds(judged: Mapping[str, pd.DataFrame], run: Run) -> dict[str, str]:
    """The gold option of each target, "" where none is known.

    Raises:
        ArtifactError: two policies were judged with other ones.
    """
    golds: dict[str, str] = {}
    by: dict[str, str] = {}
    for stage, frame in judged.items():
        own = dict(zip(frame["interaction_id"], frame["gold"].fillna(""), strict=True))
        other = [i for i, gold in own.items() if golds.get(i, gold) != gold]
        if other:
            one, two = (s.removeprefix(STAGE_PREFIX) for s in (by[other[0]], stage))
            raise ArtifactError(
                f"{two} and {one} were judged with different gold options ({len(other):,} targets, first {other[0]}): "
                "labels or annotations changed in between. Judge both again: "
                f"`gubs judge {one} {two} --force --run {run.uri}`"
            )
        golds |= own
        by |= dict.fromkeys(own, stage)
    return golds


def read_file(path: str, task: Task, happened: pd.DataFrame) -> pd.DataFrame:
    """Predictions from elsewhere: Parquet with interaction_id, predicted (an option or null) and, if known, score.

    Raises:
        InputError: it cannot be read, a column is missing, no row is about a target of this run, a target has several
            rows, an option is none of the task's, or a score is no number.
    """
    try:
        frame = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowInvalid) as e:
        raise InputError(f"{path}: cannot be read ({e}); give a Parquet file") from None
    if missing := {"interaction_id", "predicted"} - set(frame.columns):
        raise InputError(f"{path}: no column {', '.join(sorted(missing))}; it needs interaction_id and predicted")
    frame = frame[frame["task"] == str(task)] if "task" in frame else frame
    frame = frame[frame["interaction_id"].isin(happened["interaction_id"])]
    if frame.empty:
        raise InputError(f"{path}: no row is about a {task} target of this run's test users")
    _check_rows(path, frame)
    _check_options(path, frame["predicted"], task)
    return frame.assign(user_id="", score=_scores(path, frame), **{REWARD: np.nan})[KEYS]


def _check_rows(path: str, frame: pd.DataFrame) -> None:
    repeated = frame.loc[frame["interaction_id"].duplicated(), "interaction_id"]
    if len(repeated):
        remedy = "keep one row per target"
        if "mode" in frame:
            remedy += f", of one mode ({', '.join(sorted(map(str, frame['mode'].unique())))})"
        raise InputError(
            f"{path}: {repeated.nunique():,} targets have several rows, first {repeated.iloc[0]}; {remedy}"
        )


def _check_options(path: str, predicted: pd.Series, task: Task) -> None:
    options = [str(o) for o in TASK_OPTIONS[task]]
    wrong = predicted[predicted.notna() & ~predicted.isin(options)]
    if len(wrong):
        raise InputError(
            f"{path}: column predicted has {wrong.iloc[0]!r} ({len(wrong):,} rows), no option of the {task} task; "
            f"write {', '.join(options)}, or null where nothing was answered"
        )


def _scores(path: str, frame: pd.DataFrame) -> npt.NDArray[np.float64]:
    if "score" not in frame:
        return np.full(len(frame), np.nan)
    try:
        return frame["score"].to_numpy(dtype=float)
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: column score has values that are no numbers; leave it out, or write numbers"
        ) from None
