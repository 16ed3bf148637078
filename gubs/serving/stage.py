"""The stage `filter`: measures a policy on held-out training users, and packs it with what a replica needs."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import StageJob
from gubs.console import progress
from gubs.data.ifvr import PROFILES, VIEW_COLUMNS
from gubs.errors import ArtifactError
from gubs.records import SCHEMAS, Option, Role, Split, Task
from gubs.serving.bundle import CONFIG, FilterConfig, content_of, describe, write_config
from gubs.serving.filter import Mode, Threshold, auc, choose_threshold
from gubs.serving.settings import ServingSettings
from gubs.ufm.checkpoint import POLICY
from gubs.ufm.distil import DISTIL, held_out_users
from gubs.ufm.inputs import Inputs
from gubs.ufm.labels import Labels
from gubs.ufm.predict import Predictor, Query
from gubs.ufm.questions import UGM, Item, Questions, trainable_tasks
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
"""One row per target of a held-out training user: what happened, and P(skip) in each mode (null: unreadable)."""


def make(job: StageJob, ufm: UFMSettings, serving: ServingSettings, frames: FrameSettings, seed: int) -> str:
    """Measures the policy on held-out training users, chooses thresholds, and writes the filter.

    Raises:
        ArtifactError: no task has held-out targets that were skipped and others that were not.
    """
    distilled = job.reads(DISTIL)
    folder = policy_or_base(job.run, DISTIL if distilled else serving.policy, ufm)
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    modes = (Mode.REASON, Mode.SCORE) if distilled else (Mode.REASON,)
    items = _held_out_items(questions, ufm, serving, seed)
    skips = _ask(items, questions, folder, ufm, modes)
    thresholds, areas = _quality(items, skips, modes)
    if not thresholds:
        raise ArtifactError(f"{job.run.uri} has no held-out targets of both kinds: raise ufm.distil.held_out")
    refused = _refusal(areas, serving.score_gap, distilled)
    config = FilterConfig(
        name=job.run.name,
        policy=serving.policy,
        tasks=tuple(thresholds),
        model=ufm.model,
        inputs=ufm.inputs,
        rollout=ufm.rollout,
        pictures=questions.pictures,
        thresholds=describe(thresholds),
        auc={str(task): {str(m): a for m, a in by_mode.items()} for task, by_mode in areas.items()},
        modes=(Mode.REASON,) if refused else modes,
        refused=refused,
        prompts=dict(job.recipe.prompts),
        frame_store=str(job.input(FRAMES).manifest.info["store_uri"]) if questions.pictures else "",
        frames=DecodeOptions.of(frames) if questions.pictures else None,
    )
    with job.writing() as out:
        for name, table in _tables(job, questions).items():
            out.write_table(name, table)
        out.write_table("held_out", _held_out_table(items, skips))
        shutil.copytree(folder, out.path(POLICY), dirs_exist_ok=True)
        write_config(out.path(CONFIG), config, job.run.fs)
        out.content = content_of(folder, config, out.hashes)
        unreadable = {str(mode): sum(s is None for s in values) for mode, values in skips.items()}
        out.info = {
            "unreadable": unreadable,
            "targets": len(items),
            "thresholds": config.thresholds,
            "auc": config.auc,
            "refused": refused,
        }
        out.summary = _summary(areas, refused)
        if any(unreadable.values()):
            counts = ", ".join(f"{n:,} ({mode})" for mode, n in unreadable.items())
            out.summary += f"; of {len(items):,} answers could not be read: {counts}"
    return out.summary


def _held_out_items(questions: Questions, ufm: UFMSettings, serving: ServingSettings, seed: int) -> list[Item]:
    """Targets of held-out training users, at most `held_out_items` per task, as they come."""
    chosen = []
    for number, task in enumerate(trainable_tasks(questions, ufm.grpo.tasks)):
        items = questions.items(task, Split.TRAIN, unexplained=True)
        users = held_out_users({i.user_id for i in items}, ufm.distil.held_out, seed)
        items = [i for i in items if i.user_id in users]
        order = np.random.default_rng([seed, 59, number]).permutation(len(items))[: serving.held_out_items]
        chosen += [items[i] for i in order]
    return chosen


def _ask(
    items: Sequence[Item], questions: Questions, folder: Path, ufm: UFMSettings, modes: Sequence[Mode]
) -> dict[Mode, list[float | None]]:
    """P(skip) of each item in each mode, greedy; None where an answer names no option."""
    inputs = Inputs(folder, ufm.inputs)
    labels = {task: Labels.of(inputs, task) for task in Task}
    skips: dict[Mode, list[float | None]] = {mode: [None] * len(items) for mode in modes}
    queries = (
        Query(
            (mode, number),
            questions.about_user(item.task, item.user_id, item.video_id),
            labels=labels[item.task],
            score=mode is Mode.SCORE,
        )
        for mode in modes
        for number, item in enumerate(items)
    )
    pictures = ufm.inputs.vision and questions.pictures
    with (
        progress("held-out targets") as on_progress,
        Predictor(folder, ufm, pictures=pictures, gpu=use_gpu(ufm.workers)) as predictor,
    ):
        for done, prediction in enumerate(predictor.stream(queries), 1):
            mode, number = prediction.key
            skips[mode][number] = prediction.options.skip if prediction.options else None
            if done % 64 == 0:
                on_progress(done, len(items) * len(modes))
    return skips


def skipped(item: Item) -> bool:
    """What happened: a fast skip, or no click."""
    if item.task == Task.CLICK:
        return item.gold != Option.A
    return item.gold != Option.A if item.gold else True  # without a gold option only unexplained skips are asked about


def _quality(
    items: Sequence[Item], skips: dict[Mode, list[float | None]], modes: Sequence[Mode]
) -> tuple[dict[Task, dict[Mode, Threshold]], dict[Task, dict[Mode, float]]]:
    """Threshold and AUC per task and mode; a task whose targets are all of one kind is left out."""
    thresholds: dict[Task, dict[Mode, Threshold]] = {}
    areas: dict[Task, dict[Mode, float]] = {}
    for task in Task:
        for mode in modes:
            known = [
                (s, skipped(i)) for i, s in zip(items, skips[mode], strict=True) if i.task == task and s is not None
            ]
            if len({happened for _, happened in known}) == 2:
                values, truth = zip(*known, strict=True)
                thresholds.setdefault(task, {})[mode] = choose_threshold(values, truth)
                areas.setdefault(task, {})[mode] = auc(values, truth)
    return thresholds, areas


def _refusal(areas: dict[Task, dict[Mode, float]], gap: float, distilled: bool) -> str:
    """Why mode `score` may not be asked; empty if it may."""
    if not distilled:
        return "the policy was not distilled (ufm.distil.enabled)"
    bad = []
    for task, by_mode in areas.items():
        score, reason = by_mode.get(Mode.SCORE, 0.0), by_mode.get(Mode.REASON, 0.0)
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


def _held_out_table(items: Sequence[Item], skips: dict[Mode, list[float | None]]) -> pa.Table:
    rows = [
        {
            "interaction_id": item.interaction_id,
            "user_id": item.user_id,
            "task": str(item.task),
            "skipped": skipped(item),
            **{str(mode): values[i] for mode, values in skips.items()},
        }
        for i, item in enumerate(items)
    ]
    return pa.Table.from_pylist(rows, schema=HELD_OUT)


def _summary(areas: dict[Task, dict[Mode, float]], refused: str) -> str:
    parts = []
    for task, by_mode in areas.items():
        parts.append(f"{task} task AUC " + ", ".join(f"{area:.3f} ({mode})" for mode, area in by_mode.items()))
    return "; ".join(parts) + (f"; no mode score: {refused}" if refused else "")
