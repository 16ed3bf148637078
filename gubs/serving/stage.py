"""The stage `filter`: measures a policy on held-out training users, and packs it with what a replica needs."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import StageJob
from gubs.console import progress
from gubs.data.ifvr import PROFILES, VIEW_COLUMNS
from gubs.errors import ArtifactError
from gubs.evaluate.held_out import DecisionRule, decision_rule, held_out_items, skipped
from gubs.evaluate.settings import DecisionSettings, EvalSettings
from gubs.records import SCHEMAS, Role, Task
from gubs.serving.bundle import CONFIG, FilterConfig, content_of, write_config
from gubs.serving.filter import Mode
from gubs.serving.settings import ServingSettings
from gubs.ufm.checkpoint import POLICY
from gubs.ufm.distil import DISTIL
from gubs.ufm.held_out import HeldOut
from gubs.ufm.inputs import Inputs
from gubs.ufm.labels import Labels, OptionProbabilities, mean_options
from gubs.ufm.predict import Predictor, Query
from gubs.ufm.questions import UGM, Item, Questions, trainable_tasks
from gubs.ufm.sampling import sample_seed
from gubs.ufm.settings import UFMSettings
from gubs.ufm.stage import policy_or_base, use_gpu
from gubs.ugm.placement import CENTRES, ENCODER
from gubs.ugm.stage import MEMBERSHIPS
from gubs.video.clips import STAGE as FRAMES
from gubs.video.decoded import DecodeOptions
from gubs.video.settings import FrameSettings

HELD_OUT = pa.schema(
    [
        pa.field("interaction_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("skipped", pa.bool_(), nullable=False),
        ("reason", pa.float64()),
        ("score", pa.float64()),
    ]
)
"""One row per target of a held-out training user: what happened, and the calibrated P(skip) in each mode (null:
unreadable)."""


_Options = dict[Mode, list[OptionProbabilities | None]]
"""By mode, the policy's probabilities for each item; None where an answer names no option."""


def make(
    job: StageJob,
    ufm: UFMSettings,
    evaluate: EvalSettings,
    serving: ServingSettings,
    frames: FrameSettings,
    seed: int,
) -> str:
    """Measures the policy on held-out training users, calibrates it, chooses thresholds, and writes the filter.

    Raises:
        ArtifactError: no task has held-out targets that were skipped and others that were not.
    """
    distilled = job.reads(DISTIL)
    folder = policy_or_base(job.run, DISTIL if distilled else serving.policy, ufm)
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    modes = (Mode.REASON, Mode.SCORE) if distilled else (Mode.REASON,)
    tasks = trainable_tasks(questions, ufm.grpo.tasks)
    items = held_out_items(questions, tasks, HeldOut(ufm.held_out, seed), evaluate.decision, seed)
    options = _ask(items, questions, folder, ufm, modes, evaluate.decision.thoughts, seed)
    decisions = _decisions(items, options, evaluate.decision)
    if not decisions:
        raise ArtifactError(f"{job.run.uri} has no held-out targets of both kinds: raise ufm.held_out")
    refused = _refusal(decisions, serving.score_gap, distilled)
    config = FilterConfig(
        name=job.run.name,
        policy=serving.policy,
        tasks=tuple(decisions),
        model=ufm.model,
        inputs=ufm.inputs,
        rollout=ufm.rollout,
        pictures=questions.pictures,
        decisions=decisions,
        thoughts=evaluate.decision.thoughts,
        modes=(Mode.REASON,) if refused else modes,
        refused=refused,
        prompts=dict(job.recipe.prompts),
        frame_store=str(job.input(FRAMES).manifest.info["store_uri"]) if questions.pictures else "",
        frames=DecodeOptions.of(frames) if questions.pictures else None,
    )
    with job.writing() as out:
        for name, table in _tables(job, questions).items():
            out.write_table(name, table)
        out.write_table("held_out", _held_out_table(items, options, decisions))
        shutil.copytree(folder, out.path(POLICY), dirs_exist_ok=True)
        write_config(out.path(CONFIG), config, job.run.fs)
        out.content = content_of(folder, config, out.hashes)
        unreadable = {str(mode): sum(o is None for o in values) for mode, values in options.items()}
        out.info = {
            "unreadable": unreadable,
            "targets": len(items),
            "decisions": config.model_dump(mode="json")["decisions"],
            "refused": refused,
        }
        out.summary = _summary(decisions, refused)
        if any(unreadable.values()):
            counts = ", ".join(f"{n:,} ({mode})" for mode, n in unreadable.items())
            out.summary += f"; of {len(items):,} answers could not be read: {counts}"
    return out.summary


def _ask(
    items: Sequence[Item],
    questions: Questions,
    folder: Path,
    ufm: UFMSettings,
    modes: Sequence[Mode],
    thoughts: int,
    seed: int,
) -> _Options:
    """The policy's answers about each item in each mode, as the service asks: in mode `reason`, the mean of `thoughts`
    sampled answers.
    """
    inputs = Inputs(folder, ufm.inputs)
    labels = {task: Labels.of(inputs, task) for task in Task}
    samples = {mode: thoughts if mode is Mode.REASON else 1 for mode in modes}
    answers: dict[tuple[Mode, int], list[OptionProbabilities | None]] = {
        (mode, number): [] for mode in modes for number in range(len(items))
    }
    queries = (
        Query(
            (mode, number),
            prompt,
            sample_seed(seed, 2, number, mode, k),
            temperature=1.0 if samples[mode] > 1 else 0.0,
            labels=labels[item.task],
            score=mode is Mode.SCORE,
        )
        for mode in modes
        for number, item in enumerate(items)
        for prompt in [questions.about_user(item.task, item.user_id, item.video_id)]
        for k in range(samples[mode])
    )
    pictures = ufm.inputs.vision and questions.pictures
    with (
        progress("held-out targets") as on_progress,
        Predictor(folder, ufm, pictures=pictures, gpu=use_gpu(ufm.workers)) as predictor,
    ):
        for done, prediction in enumerate(predictor.stream(queries), 1):
            answers[prediction.key].append(prediction.options)
            if done % 64 == 0:
                on_progress(done, len(items) * sum(samples.values()))
    return {mode: [mean_options(answers[mode, number]) for number in range(len(items))] for mode in modes}


def _decisions(
    items: Sequence[Item], options: _Options, settings: DecisionSettings
) -> dict[Task, dict[Mode, DecisionRule]]:
    """By task and mode; a task whose targets are all of one kind is left out."""
    rules: dict[Task, dict[Mode, DecisionRule]] = {}
    for task in Task:
        for mode, answers in options.items():
            if rule := decision_rule(items, answers, task, settings):
                rules.setdefault(task, {})[mode] = rule
    return rules


def _refusal(decisions: dict[Task, dict[Mode, DecisionRule]], gap: float, distilled: bool) -> str:
    """Why mode `score` may not be asked; empty if it may."""
    if not distilled:
        return "the policy was not distilled (ufm.distil.enabled)"
    bad = []
    for task, by_mode in decisions.items():
        score, reason = (by_mode[m].auc if m in by_mode else 0.0 for m in (Mode.SCORE, Mode.REASON))
        if reason - score > gap:
            bad.append(f"{task}: {score:.3f} against {reason:.3f}")
    return f"its AUC is more than {gap:g} below that of mode reason ({'; '.join(bad)})" if bad else ""


def _tables(job: StageJob, questions: Questions) -> dict[str, pa.Table]:
    """The tables of a filter; see `gubs.serving.bundle`."""
    ifvr = questions.ifvr
    tastes = {}
    if job.reads(PROFILES):
        tastes = {r["user_id"]: r for r in job.input(PROFILES).table("profiles").to_pylist()}
    users = ifvr.artifact.table("users")
    rows = [tastes.get(u, {}) for u in users["user_id"].to_pylist()]
    users = users.append_column("taste", pa.array([r.get("text") for r in rows], pa.string()))
    users = users.append_column("taste_tags", pa.array([r.get("tags") for r in rows], pa.list_(pa.string())))
    users = users.append_column("taste_until", pa.array([r.get("until") for r in rows], pa.int64()))
    log = ifvr.log([*VIEW_COLUMNS, "task", "role"])
    views = log.filter(pc.equal(log["role"], str(Role.HISTORY))).drop_columns(["role"])
    tables = {"users": users, "videos": ifvr.artifact.table("videos"), "views": views}
    groups, memberships = SCHEMAS["groups"].empty_table(), MEMBERSHIPS.empty_table()
    if job.reads(UGM):
        groups = job.input(UGM).table("groups")
        groups = groups.filter(pc.is_null(groups["dropped"])).drop_columns(["dropped"])
        memberships = job.input(UGM).table("memberships")
        tables |= {name: job.input(UGM).table(name) for name in (ENCODER, CENTRES)}
    tables |= {"groups": groups, "memberships": memberships}
    frames = pa.schema([("video_id", pa.string()), ("content_hash", pa.string())]).empty_table()
    if questions.pictures:
        frames = job.input(FRAMES).table("frames", ["video_id", "content_hash", "frames"])
        frames = frames.filter(pc.greater(pc.fill_null(frames["frames"], 0), 0)).drop_columns(["frames"])
    return tables | {"frames": frames}


def _held_out_table(
    items: Sequence[Item], options: _Options, decisions: dict[Task, dict[Mode, DecisionRule]]
) -> pa.Table:
    def calibrated(item: Item, mode: Mode, number: int) -> float | None:
        answer, rule = options[mode][number], decisions.get(item.task, {}).get(mode)
        return float(rule.calibration.curve(answer.skip)) if answer and rule else None

    rows = [
        {
            "interaction_id": item.interaction_id,
            "user_id": item.user_id,
            "task": str(item.task),
            "skipped": skipped(item),
            **{str(mode): calibrated(item, mode, i) for mode in options},
        }
        for i, item in enumerate(items)
    ]
    return pa.Table.from_pylist(rows, schema=HELD_OUT)


def _summary(decisions: dict[Task, dict[Mode, DecisionRule]], refused: str) -> str:
    parts = []
    for task, by_mode in decisions.items():
        parts.append(f"{task} task AUC " + ", ".join(f"{rule.auc:.3f} ({mode})" for mode, rule in by_mode.items()))
    return "; ".join(parts) + (f"; no mode score: {refused}" if refused else "")
