"""The stage `eval-<policy>`: a policy's answers about the test users' targets, and the metrics of them.

Each target is asked twice, greedy and sampled, from the user's own prompt (as in use); the metrics are taken on the
natural mix of options and on a balanced one, since a policy trained on balanced batches may do well on either alone.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.artifacts import Artifact, Run, fingerprint, fingerprint_files, writing
from gubs.config import Settings
from gubs.errors import ArtifactError, PlatformError
from gubs.evaluate.metrics import Predictions, table
from gubs.records import TASK_OPTIONS, Option, Split, Task
from gubs.ufm import model as models
from gubs.ufm.inputs import Inputs
from gubs.ufm.questions import Item, Questions
from gubs.ufm.rewards import judge
from gubs.ufm.rollout import Request, Shape, start_rollout
from gubs.ufm.sampling import sample_seed
from gubs.ufm.settings import RewardSettings
from gubs.ufm.stage import policy_folder, use_gpu

BASE = "base"
"""Name of the policy before any training."""

MODES = ("greedy", "sampled")
MIXES = ("natural", "balanced")

PREDICTIONS = pa.schema(
    [
        pa.field("interaction_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        ("natural", pa.bool_()),
        ("balanced", pa.bool_()),
        ("gold", pa.string()),
        ("predicted", pa.string()),
        ("failure", pa.string()),
        ("reward", pa.float64()),
        ("play_rate", pa.float64()),
        ("clicked", pa.bool_()),
        ("answer", pa.string()),
    ]
)
"""One row a target and mode. `natural`, `balanced`: the mixes that it belongs to; `reward`: R of Eq. 4, with all of its
parts, whatever training used; no gold and no reward: a skip whose reason nobody knows."""

_HEAT = {"greedy": 0.0, "sampled": 1.0}
_CHUNK = 64
"""Answers between two looks at the progress."""
_AT_ONCE = 8 * _CHUNK
"""Requests that an engine is given at once."""
OnProgress = Callable[[int, int], None]


def judge_stage(
    run: Run,
    settings: Settings,
    policy: str,
    *,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, bool]:
    """Asks a policy about the test users and measures. Ray has to be running.

    Args:
        run: with `ifvr`, `labels`, and the policy.
        settings: `ufm.evaluate`, `ufm.inputs`.
        policy: stage that trained it, or `base`.
        force: make it again.
        on_progress: told (answers, answers in all).

    Returns:
        The artifact (tables predictions, metrics) and whether it was made now.

    Raises:
        ArtifactError: something it needs is not there.
    """
    ufm = settings.ufm
    folder = models.checkpoint(ufm.model) if policy == BASE else policy_folder(run, policy)
    questions = Questions(run, settings)
    inputs = {policy: fingerprint_files(list(folder.glob("*.safetensors"))), **questions.fingerprints()}
    chosen = {"evaluate": ufm.evaluate.model_dump(), "inputs": ufm.inputs.model_dump(), "seed": settings.seed}
    chosen |= {"min_new_tokens": ufm.rollout.min_new_tokens, "dtype": ufm.model.dtype}
    stage = f"eval-{policy}"
    mark = fingerprint(stage, chosen, inputs)
    if found := run.finished(stage, mark, force):
        return found, False
    chosen_items = test_items(questions, ufm.evaluate.items, settings.seed)
    rows = predictions(chosen_items, questions, folder, settings, on_progress)
    with writing(run, stage, fingerprint=mark, settings=settings, inputs=inputs) as out:
        out.write_table("predictions", pa.Table.from_pylist(rows, schema=PREDICTIONS))
        metrics = measure(rows, ufm.evaluate.bootstrap, settings.seed)
        out.write_table("metrics", pa.Table.from_pylist(metrics))
        out.info = {"policy": policy, "summary": summary(rows, metrics)}
    return run.artifact(stage), True


def test_items(questions: Questions, count: int, seed: int) -> list[tuple[Item, dict[str, bool]]]:
    """The targets to be judged, of all tasks, and which mixes each is in.

    The natural mix is `count` targets drawn at random (0 = all) a task, those among them whose reason nobody knows; the
    balanced one has as many of every option, at most `count` in all, drawn from all test targets. So the union of both
    is judged.
    """
    found = []
    for number, task in enumerate(Task):
        items = questions.items(task, Split.TEST, unexplained=True)
        order = np.random.default_rng([seed, 41, number]).permutation(len(items))
        natural = set(order[: count or len(items)].tolist())
        balanced = _balanced(items, order.tolist(), count, task)
        found += [(items[i], {"natural": i in natural, "balanced": i in balanced}) for i in sorted(natural | balanced)]
    if not found:
        raise ArtifactError(f"{questions.ifvr.uri} has no labelled targets of test users: see splits.test_users")
    return found


def predictions(
    items: Sequence[tuple[Item, dict[str, bool]]],
    questions: Questions,
    folder: Path,
    settings: Settings,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Rows of `PREDICTIONS`: what the policy in a folder says about the items."""
    ufm = settings.ufm
    shape = Shape(
        str(folder), ufm.model, ufm.inputs, ufm.rollout, max_pictures=ufm.inputs.vision and questions.pictures
    )
    with _started(shape, settings, len(MODES) * len(items)) as engines:  # they come up while prompts are encoded
        inputs = Inputs(folder, ufm.inputs)
        encoded = [inputs.encode(questions.about_user(i.task, i.user_id, i.video_id)) for i, _ in items]
        kept = [k for k, e in enumerate(encoded) if inputs.fits(e)]
        asked = [
            (k, mode, Request(inputs.for_engine(encoded[k]), sample_seed(settings.seed, 0, k, mode, 0)))
            for mode in MODES
            for k in kept
        ]
        rows = []
        for done, (k, mode, response) in enumerate(_ask(asked, engines, ufm.workers.stuck_after_s), start=1):
            item, mixes = items[k]
            text, finished = inputs.text(response.ids)
            parts, reading = judge(text, item.gold or Option.B, item.task, RewardSettings(), finished)
            reward = parts.total if item.gold else None
            said = {"predicted": reading.option, "failure": reading.failure, "reward": reward, "answer": text}
            rows.append(_row(item, mode, mixes) | {n: str(v) if n != "reward" and v else v for n, v in said.items()})
            if on_progress and (done % _CHUNK == 0 or done == len(asked)):
                on_progress(done, len(asked))
    dropped = sorted(set(range(len(items))) - set(kept))
    return rows + [_row(items[k][0], mode, items[k][1]) for mode in MODES for k in dropped]


def measure(rows: Sequence[dict[str, Any]], resamples: int, seed: int) -> list[dict[str, Any]]:
    """The metrics with all baselines beside them, by task, mix and mode."""
    found = []
    for task in Task:
        for mix in MIXES:
            for mode in MODES:
                mine = [r for r in rows if r["task"] == task and r["mode"] == mode and r[mix]]
                if mine:
                    said = as_predictions(mine, task)
                    found += [
                        {"task": str(task), "mix": mix, "mode": mode, **m}
                        for m in table(said, "model", resamples=resamples, seed=seed)
                    ]
    return found


def summary(rows: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures that one looks at first, `task/mix/mode/name`; the mean raw reward among them."""
    wanted = ("judge_f1", "judge_acc", "judge_balanced_acc", "reason_f1", "reason_f1_B", "reason_acc", "click_f1")
    found = {
        f"{m['task']}/{m['mix']}/{m['mode']}/{m['name']}": m["value"]
        for m in metrics
        if m["method"] == "model" and m["name"] in (*wanted, "click_balanced_acc", "share_kept", "total_play_rate")
    }
    for task in Task:
        for mix in MIXES:
            for mode in MODES:
                mine = [r["reward"] for r in rows if r["task"] == task and r["mode"] == mode and r[mix]]
                if rewards := [r for r in mine if r is not None]:
                    found[f"{task}/{mix}/{mode}/reward"] = float(np.mean(rewards))
    return found


def as_predictions(rows: Sequence[dict[str, Any]], task: Task) -> Predictions:
    """Rows of one task as the metrics take them."""
    return Predictions(
        user=[r["user_id"] for r in rows],
        gold=[r["gold"] for r in rows],
        predicted=[r["predicted"] for r in rows],
        task=task,
        play_rate=[r["play_rate"] for r in rows] if task == Task.SEQUENTIAL else None,
        clicked=[r["clicked"] for r in rows] if task == Task.CLICK else None,
    )


@contextmanager
def _started(shape: Shape, settings: Settings, requests: int) -> Iterator[list[Any]]:
    """As many engines as there are workers (one on a CPU), but no more than have work; they end with the block."""
    import ray

    gpu = use_gpu(settings)
    chunks = math.ceil(requests / len(MODES) / _AT_ONCE) * len(MODES)
    engines = [_engine(shape, gpu) for _ in range(min(settings.ufm.workers.count if gpu else 1, chunks))]
    try:
        yield engines
    finally:
        for engine in engines:
            ray.kill(engine)


def _ask(
    asked: Sequence[tuple[int, str, Request]], engines: Sequence[Any], deadline: float
) -> Iterator[tuple[int, str, Any]]:
    """Answers as they come. An engine is given work once it is up, and more when it is done: one that waits for a busy
    GPU keeps nothing from the others.
    """
    import ray
    from ray.exceptions import RayActorError

    chunks = deque((mode, part) for mode in MODES for part in _parts([a for a in asked if a[1] == mode]))
    work: dict[Any, tuple[Any, Sequence[tuple[int, str, Request]]]] = {e.ready.remote(): (e, ()) for e in engines}
    try:
        while chunks or any(part for _, part in work.values()):
            done, _ = ray.wait(list(work), timeout=deadline)
            if not done:
                raise PlatformError(f"no engine that judges test users was up or answered within {deadline:g} s")
            engine, part = work.pop(done[0])
            said = ray.get(done[0])
            if chunks:
                mode, following = chunks.popleft()
                work[engine.generate.remote([r for _, _, r in following], _HEAT[mode])] = (engine, following)
            for (k, mode, _), response in zip(part, said if part else (), strict=True):
                yield k, mode, response
    except RayActorError as e:
        raise PlatformError(f"the engine that judges test users died: {e}") from None


def _engine(shape: Shape, gpu: bool) -> Any:
    import ray

    if not gpu:
        return start_rollout(shape)
    from gubs.ufm.rollout import Engine

    remote: Any = ray.remote(Engine)
    return remote.options(num_gpus=1, num_cpus=0).remote(shape)


def _parts(asked: Sequence[tuple[int, str, Request]]) -> Iterator[Sequence[tuple[int, str, Request]]]:
    for start in range(0, len(asked), _AT_ONCE):
        yield asked[start : start + _AT_ONCE]


def _balanced(items: Sequence[Item], order: Sequence[int], count: int, task: Task) -> set[int]:
    by_option = {o: [i for i in order if items[i].gold == o] for o in TASK_OPTIONS[task]}
    there = [found for found in by_option.values() if found]
    if not there:
        return set()
    size = min(map(len, there))
    if count:
        size = min(size, math.ceil(count / len(there)))
    return {i for found in there for i in found[:size]}


def _row(item: Item, mode: str, mixes: dict[str, bool]) -> dict[str, Any]:
    return {
        "interaction_id": item.interaction_id,
        "user_id": item.user_id,
        "task": str(item.task),
        "mode": mode,
        **mixes,
        "gold": str(item.gold) if item.gold else None,
        "predicted": None,
        "failure": "too_long",
        "reward": 0.0 if item.gold else None,
        "play_rate": item.play_rate,
        "clicked": item.gold == Option.A if item.task == Task.CLICK else None,
        "answer": None,
    }
