"""The training stages, on the driver's side: `sft_model` from the teacher's examples, `grpo` from there.

The driver first checks everything that can be checked, then starts Ray Train, shows progress, and publishes the
artifact: `policy/` (a checkpoint for transformers and vLLM), the table `steps`, samples, TensorBoard files,
checkpoints. After a kill, the same command resumes from the last checkpoint.
"""

import json
import os
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gubs.artifacts import ArtifactWriter, JsonObject, Recipe, Run, StageJob, fingerprint, fingerprint_files, in_words
from gubs.console import OnProgress, progress, say
from gubs.data.ifvr import PROFILES
from gubs.errors import ArtifactError, GubsError, PlatformError, SettingsError
from gubs.records import TASK_OPTIONS, Task
from gubs.ufm import distil, memory
from gubs.ufm import model as models
from gubs.ufm.advantage import MEASURED
from gubs.ufm.checkpoint import POLICY, Checkpoints
from gubs.ufm.held_out import HeldOut
from gubs.ufm.monitor import STUCK, check_trackers, read_metrics
from gubs.ufm.questions import SKIP, Item, Questions, trainable_tasks
from gubs.ufm.settings import CheckpointSettings, GRPOSettings, ModelSettings, UFMSettings, WorkerSettings
from gubs.ufm.sft import COLUMNS, order_of, steps_of
from gubs.ufm.train_worker import CHECKPOINTS, SETTINGS, Job
from gubs.ufm.trainer import check_allocator
from gubs.ufm.vocabulary import Vocabulary
from gubs.video.settings import FrameSettings

if TYPE_CHECKING:
    from ray.data import Dataset

BASE, SFT, GRPO, EXAMPLES = "base", "sft_model", "grpo", "sft"
_POLL_S = 0.5
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Hides the GPUs, which Ray leaves visible to workers that have none."""


def make_sft(job: StageJob, ufm: UFMSettings, frames: FrameSettings, seed: int) -> str:
    """Fine-tunes the base model on the teacher's examples. Ray has to be running.

    Raises:
        ArtifactError: there is no example, or an unfinished training of other settings is in the way.
        PlatformError: no GPU, or a worker failed more often than allowed. DivergedError: see there.
    """
    table = _examples(job, HeldOut(ufm.held_out, seed))
    if ufm.sft.batch % ufm.workers.count:
        raise SettingsError(f"ufm.sft.batch={ufm.sft.batch} cannot be divided evenly among {ufm.workers.count} workers")
    base = base_model(ufm.model, job.run)
    check_trackers(ufm.grpo.trackers)
    _check_memory(ufm, frames, base, memory.plan_sft)
    _detail(_options("examples", Counter(zip(*(table[c].to_pylist() for c in ("task", "gold")), strict=True))))
    with _training(job) as (out, folder):
        work = _job(job, ufm, seed, folder, base)
        check_checkpoint(work, ufm.sft.checkpoint.keep)
        _check_disk(ufm, frames, base, memory.plan_sft, folder)
        steps = steps_of(table.num_rows, ufm.sft)
        order = order_of(table.num_rows, ufm.sft, ufm.training_seed(seed))
        data = _dataset(table.select(list(COLUMNS)).take(order), ufm.workers.count)
        config = {"job": work, "examples": table.num_rows}
        with _watching(folder, steps, "SFT"):
            _say_scarce(ufm.workers)
            ended = _fit("gubs.ufm.sft", config, ufm.workers, ufm.sft.checkpoint, folder, {"train": data})
        last = _finish(out, folder, {"examples": table.num_rows, "base": base.name, **ended})
        out.summary = f"{steps:,} steps, loss {last['loss']:.3f}"
    return out.summary


def _examples(job: StageJob, held_out: HeldOut) -> pa.Table:
    """The teacher's examples of users that are not held out."""
    examples = job.input(EXAMPLES)
    table = examples.table("examples", [*COLUMNS, "gold"])
    table = table.filter(pa.array([user not in held_out for user in table["user_id"].to_pylist()], pa.bool_()))
    if not table.num_rows:
        raise ArtifactError(
            f"{examples.uri} has no examples of users that may be trained on (see teachers.sft_dislikes, "
            "teachers.sft_click_users and ufm.held_out); ufm.grpo.start=base trains without SFT"
        )
    return table


def make_grpo(job: StageJob, ufm: UFMSettings, frames: FrameSettings, seed: int) -> str:
    """Trains the policy by GA-GRPO. Ray has to be running. Errors: as `make_sft`."""
    grpo = ufm.grpo
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    start = base_model(ufm.model, job.run) if grpo.start == "base" else policy_folder(job.run, SFT)
    check_trackers(grpo.trackers)
    held_out = HeldOut(ufm.held_out, seed)
    tasks = _tasks(questions, grpo.tasks, held_out)
    _check_memory(ufm, frames, start, memory.plan_grpo)
    more_steps = ("ufm.grpo.steps",) if grpo.optimizer.schedule == "constant" else ()
    with _training(job, more_steps) as (out, folder):
        work = _job(job, ufm, seed, folder, start, tasks=tasks, free=more_steps)
        check_checkpoint(work, grpo.checkpoint.keep)
        _check_disk(ufm, frames, start, memory.plan_grpo, folder)
        _say_rule(grpo)
        with _watching(folder, grpo.total_steps(tasks), "GA-GRPO"):
            _say_scarce(ufm.workers)
            ended = _fit("gubs.ufm.grpo", {"job": work}, ufm.workers, grpo.checkpoint, folder, {})
        about: JsonObject = {"tasks": [str(t) for t in tasks], "start": start.name, "rule": grpo.advantage.rule}
        about["outcome_only"] = _outcome_only({t: questions.training_outcomes(t, held_out) for t in set(tasks)})
        _finish(out, folder, about | ended)
        rewards = [s["reward"] for s in read_metrics(folder)]
        edge = max(1, len(rewards) // 10)
        first, last = sum(rewards[:edge]) / edge, sum(rewards[-edge:]) / edge
        out.summary = f"{len(rewards):,} steps, mean reward {first:.2f} at the start, {last:.2f} at the end"
    return out.summary


def make_distil(job: StageJob, ufm: UFMSettings, frames: FrameSettings, seed: int, policy: str) -> str:
    """Teaches a trained policy to answer without a thought; see `gubs.ufm.distil`. Ray has to be running.

    Raises:
        ArtifactError: no sampled answer can be read. Others: as `make_sft`.
    """
    settings, start = ufm.distil, policy_or_base(job.run, policy, ufm)
    questions = Questions(job.run, ufm.inputs, tastes=job.reads(PROFILES))
    tasks = trainable_tasks(questions, ufm.grpo.tasks)
    if settings.batch % ufm.workers.count:
        raise SettingsError(
            f"ufm.distil.batch={settings.batch} cannot be divided evenly among {ufm.workers.count} workers"
        )
    items = distil.chosen_targets(questions, tasks, ufm, seed)
    with _training(job) as (out, folder):
        work = _job(job, ufm, seed, folder, start)
        check_checkpoint(work, settings.checkpoint.keep)
        _check_disk(ufm, frames, start, memory.plan_distil, folder)
        table = distil.targets_table(
            folder / "targets.parquet", lambda: distil.sampled(items, questions, start, ufm, use_gpu(ufm.workers), seed)
        )
        if not table.num_rows:
            raise ArtifactError(f"{job.run.uri}: no answer of {policy} names an option; there is nothing to distil")
        steps, order = steps_of(table.num_rows, settings), order_of(table.num_rows, settings, ufm.training_seed(seed))
        _check_memory(ufm, frames, start, memory.plan_distil)
        data = _dataset(distil.with_turns(table, order), ufm.workers.count)
        with _watching(folder, steps, "distil"):
            config = {"job": work, "examples": table.num_rows}
            ended = _fit("gubs.ufm.distil", config, ufm.workers, settings.checkpoint, folder, {"train": data})
        last = _finish(out, folder, {"targets": table.num_rows, "start": policy, **ended})
        out.summary = f"{steps:,} steps on {table.num_rows:,} targets, loss {last['loss']:.3f}"
    return out.summary


def preflight_sft(ufm: UFMSettings, frames: FrameSettings, seed: int) -> None:  # noqa: ARG001
    """Checks what needs no data, before anything is made: model, trackers, GPUs and their memory.

    Raises:
        SettingsError: the model is not available. PlatformError: a tracker is not installed; GPUs are missing or too
            small.
    """
    _preflight(ufm, frames, memory.plan_sft)


def preflight_grpo(ufm: UFMSettings, frames: FrameSettings, seed: int) -> None:  # noqa: ARG001
    """The same for GA-GRPO."""
    _preflight(ufm, frames, memory.plan_grpo)


def preflight_distil(ufm: UFMSettings, frames: FrameSettings, seed: int, policy: str) -> None:  # noqa: ARG001
    """The same for distillation."""
    _preflight(ufm, frames, memory.plan_distil)


def base_model(settings: ModelSettings, run: Run) -> Path:
    """The checkpoint that training starts from; `tiny` and `small` are made first if they are missing.

    Raises:
        ArtifactError: it is to read the run's own words, and the run has no data set.
    """
    words = Vocabulary.of(run) if settings.own_words and not settings.path else None
    if models.exists(settings, words):
        return models.checkpoint(settings, words=words)
    began = time.monotonic()
    lessons = f", {settings.lessons} steps of lessons" if settings.lessons else ""
    about = f" in the run's own words ({len(words.tags)} tags)" if words else ""
    say(f"[model]  make {settings.size}{lessons}{about} ...")
    with progress("lessons") as on_progress:
        folder = models.checkpoint(settings, on_progress, words)
    say(f"[model]  done in {time.monotonic() - began:.1f} s: {folder}")
    return folder


def policy_folder(run: Run, stage: str) -> Path:
    """Local folder of a trained policy.

    Raises:
        ArtifactError: it was not trained, or the run is not on a local path.
    """
    artifact = run.artifact(stage)
    if "://" in run.uri and not run.uri.startswith("file://"):
        raise ArtifactError(
            f"{artifact.uri}: copy {POLICY}/ to a path that all machines see, and pass that as ufm.model.path"
        )
    return Path(run.path(stage, POLICY))


def policy_or_base(run: Run, policy: str, ufm: UFMSettings) -> Path:
    """Local folder of a trained policy, or of the model before any training (`base`). Errors: see `policy_folder`."""
    return base_model(ufm.model, run) if policy == BASE else policy_folder(run, policy)


def check_checkpoint(job: Job, keep: int) -> None:
    """Checks what an earlier attempt left, before anything is overwritten.

    Raises:
        ArtifactError: the newest checkpoint is damaged or of another model, other data or other settings.
    """
    Checkpoints(job.checkpoints, job.recipe, keep, world_size=job.ufm.workers.count).latest()


def _tasks(questions: Questions, wanted: Sequence[Task], held_out: HeldOut) -> tuple[Task, ...]:
    """The tasks in turn, without those whose records all have the same option: they teach only a constant.

    Raises:
        ArtifactError: none is left.
    """
    tasks = trainable_tasks(questions, wanted)
    items = {t: questions.training_outcomes(t, held_out) for t in tasks}
    counts = Counter((str(t), i.outcome) for t in tasks for i in items[t])
    _detail(_options("records", counts))
    if unknown := _outcome_only(items):
        _detail(f"{', '.join(unknown)} task: why videos were skipped is unknown; only skip or not is rewarded")
    useful = [t for t in tasks if sum(task == t for task, _ in counts) > 1]
    for task in set(tasks) - set(useful):
        _detail(f"the {task} task is left out: its records all have the same option")
    if not useful:
        raise ArtifactError(f"{questions.run.uri}: no task has training records with two options; see `gubs show`")
    return tuple(t for t in wanted if t in useful)


def _outcome_only(items: Mapping[Task, Sequence[Item]]) -> list[str]:
    """The tasks in which only the outcome is known, and the reason for no skip."""
    return [str(task) for task, task_items in items.items() if not all(i.reasons_known for i in task_items)]


def _options(what: str, counts: Mapping[tuple[str, str], int]) -> str:
    """Number per task and option, and the options without any."""
    parts = []
    for task, options in TASK_OPTIONS.items():
        unknown = [SKIP] if (str(task), SKIP) in counts else []
        per_option = {o: counts.get((str(task), o), 0) for o in [*map(str, options), *unknown]}
        listed = ", ".join(f"{n:,} {o}" for o, n in per_option.items() if n)
        absent = ", ".join(o for o, n in per_option.items() if not n)
        missing = f" (none of {absent})" if absent and listed else ""
        parts.append(f"{task} task: {listed or 'none'}{missing}")
    return f"{what}: " + "; ".join(parts)


def _resume_recipe(job: StageJob, free: Sequence[str] = ()) -> dict[str, str]:
    """Fingerprints of everything that decides the weights, under names for people; settings in `free` may differ
    between attempts.
    """
    recipe = job.recipe
    data = {name: content for name, content in recipe.inputs.items() if name != SFT}
    settings = {name: value for name, value in recipe.settings.items() if name not in free}
    return {
        "model": fingerprint("model", [recipe.outside, recipe.inputs.get(SFT)]),
        "data": fingerprint("data", data),
        "settings": fingerprint("settings", settings),
        "prompts": fingerprint("prompts", recipe.prompts),
    }


def _job(
    job: StageJob,
    ufm: UFMSettings,
    seed: int,
    folder: Path,
    start: Path,
    *,
    tasks: tuple[Task, ...] = (),
    free: Sequence[str] = (),
) -> Job:
    return Job(
        job.run.uri,
        ufm,
        seed,
        job.settings,
        job.stage,
        str(folder),
        str(start),
        _resume_recipe(job, free),
        job.reads(PROFILES),
        tasks,
    )


@contextmanager
def _training(job: StageJob, free: Sequence[str] = ()) -> Iterator[tuple[ArtifactWriter, Path]]:
    """An unfinished artifact of exactly this training, new or left by a killed attempt; another training's is refused
    and never removed. `free`: see `_resume_recipe`.
    """
    key = fingerprint(job.kind, _resume_recipe(job, free))
    partial = Path(job.run.path(f"{job.stage}.partial"))
    recipe = partial / "recipe.json"
    others = recipe.exists() and recipe.read_text() != key
    if others and job.force:
        shutil.rmtree(partial)  # --force keeps what this same training left when it was killed
    elif others and (partial / CHECKPOINTS).exists():
        raise ArtifactError(
            f"{partial} holds an unfinished training with other settings, data or another model"
            f"{_differences(partial / SETTINGS, job.settings)}: give those again, use another --run, or --force to "
            "discard it"
        )
    with job.writing(resume_key=key) as out:
        (partial / SETTINGS).write_text(json.dumps(dict(job.settings), indent=1))
        yield out, partial
        out.content = fingerprint_files(sorted((partial / POLICY).glob("*.safetensors")))


def _differences(path: Path, settings: Mapping[str, Any]) -> str:
    """A few settings that differ from those an unfinished training began with."""
    if not path.exists():
        return ""
    before, now = Recipe(settings=_flat(json.loads(path.read_text()))), Recipe(settings=_flat(settings))
    changes = in_words(before.changes(now))
    return f" ({changes})" if changes else " (all settings are the same: data or model differ)"


def _flat(nested: Mapping[str, Any], above: str = "") -> JsonObject:
    """Values by their full names, as on the command line."""
    flat: JsonObject = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _dataset(table: pa.Table, workers: int) -> "Dataset":
    """The examples as a stream of at least as many blocks as workers."""
    import ray.data

    from gubs.ray_runtime import quiet_ray_data

    quiet_ray_data()
    rows = table.to_pylist()
    return ray.data.from_items(rows, override_num_blocks=max(workers, min(16, len(rows) // 256 + 1)))


def _fit(
    module: str,
    config: JsonObject,
    workers: WorkerSettings,
    checkpoint: CheckpointSettings,
    folder: Path,
    datasets: "dict[str, Dataset]",
) -> JsonObject:
    """Runs Ray Train until all steps are done.

    Returns:
        `seconds_after_last_step`, by phase: no step's figures include the last checkpoint and the policy.

    Raises:
        DivergedError, ArtifactError, PlatformError: see `make_sft`.
    """
    import importlib

    from ray.train import DataConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig  # ray.train types these as older ones

    from gubs.ufm.attempts import RayTrainer

    gpu = use_gpu(workers)
    _environment(workers.stuck_after_s)
    patience = int(max(workers.stuck_after_s, checkpoint.timeout_s))  # a rank that has written waits for the others
    loop = importlib.import_module(module).train_loop
    options: dict[str, Any] = {}
    if datasets:
        from ray.data import ExecutionOptions

        in_order = DataConfig(execution_options=ExecutionOptions(preserve_order=True))
        options = {"datasets": datasets, "dataset_config": in_order}
    run_config: Any = RunConfig(
        name=f"{config['job'].stage}-{uuid.uuid4().hex[:8]}",
        storage_path=str(folder / "ray-train"),
        worker_runtime_env={} if gpu or not _gpus() else {"env_vars": _NO_GPU},
        failure_config=FailureConfig(workers.max_failures, controller_failure_limit=workers.max_failures),
    )
    trainer = RayTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=patience),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=gpu, resources_per_worker=_resources(workers, gpu)
        ),
        run_config=run_config,
        **options,
    )
    try:
        result: Any = trainer.fit()
    except Exception as e:  # Ray wraps whatever a worker raised
        raise _unwrapped(e, folder) from e
    finally:
        shutil.rmtree(folder / "ray-train", ignore_errors=True)
    outcome = result.return_value or {}
    if "error" in outcome:
        raise outcome["error"]
    return {"seconds_after_last_step": outcome.get("after_last_step", {})}


def use_gpu(workers: WorkerSettings) -> bool:
    """Whether each worker gets a GPU.

    Raises:
        PlatformError: the settings ask for GPUs and there are none, or too few.
    """
    gpus = _gpus()
    if workers.gpu == "no" or (workers.gpu == "auto" and not gpus):
        return False
    if gpus < workers.count:
        raise PlatformError(
            f"ufm.workers.count={workers.count}, but the cluster has {gpus} GPUs: use at most one worker per GPU, or "
            "train on CPUs (ufm.workers.gpu=no)"
        )
    return True


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _preflight(ufm: UFMSettings, frames: FrameSettings, plan: Callable[..., memory.MemoryPlan]) -> None:
    models.check(ufm.model)
    check_trackers(ufm.grpo.trackers)
    _check_memory(ufm, frames, "", plan)


def _check_memory(
    ufm: UFMSettings, frames: FrameSettings, folder: Path | str, plan: Callable[..., memory.MemoryPlan]
) -> None:
    """Refuses a training that cannot fit the workers' GPUs, with the estimate, before anything is loaded."""
    if use_gpu(ufm.workers):
        check_allocator(os.environ)
        machine = memory.gpu_machine()
        memory.check(plan(ufm, memory.config_of(ufm, folder), frames, machine.gpu), machine)


def _check_disk(
    ufm: UFMSettings, frames: FrameSettings, start: Path, plan: Callable[..., memory.MemoryPlan], folder: Path
) -> None:
    """Refuses a training whose checkpoints do not fit the disk; see `memory.check_disk`."""
    memory.check_disk(plan(ufm, memory.config_of(ufm, start), frames, 0.0), folder)


def _resources(workers: WorkerSettings, gpu: bool) -> dict[str, float]:
    return {"CPU": workers.cpus, **({"GPU": 1.0} if gpu else {})}


def _say_scarce(workers: WorkerSettings) -> None:
    """Says what the workers have to wait for, if anything: another job may end, or the cluster may grow."""
    import ray

    free = ray.available_resources()
    wanted = {name: each * workers.count for name, each in _resources(workers, use_gpu(workers)).items()}
    short = [f"{n:g} {name} ({free.get(name, 0.0):g} free)" for name, n in wanted.items() if free.get(name, 0.0) < n]
    if short:
        _detail(f"{workers.count} workers wait for {' and '.join(short)}")


def _say_rule(grpo: GRPOSettings) -> None:
    """Says what is known of the advantage rule, where it takes part."""
    if grpo.groups and (measured := MEASURED.get(grpo.advantage.rule)):
        _detail(f"advantage rule {grpo.advantage.rule}: {measured}")


def _detail(text: str) -> None:
    say(f"         {text}")


def _environment(stuck_after_s: float) -> None:
    """Sets what Ray Train reads from the driver's environment, unless it is set."""
    timeout = str(int(stuck_after_s))
    variables = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # each report waits for a poll
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": timeout,
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": timeout,  # a cluster may have to grow
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": timeout,  # a report waits for all workers
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    }
    os.environ.update({name: value for name, value in variables.items() if name not in os.environ})


def _unwrapped(error: Exception, folder: Path) -> GubsError:
    """The error that a worker raised; any other becomes a `PlatformError`."""
    from gubs.ufm.attempts import cause_of

    if cause := cause_of(error):
        return cause
    stuck = folder / STUCK
    if stuck.exists():  # of the last attempt: each attempt removes it first
        text = json.loads(stuck.read_text())["message"]
        stuck.unlink()
        return PlatformError(f"{text}, more often than ufm.workers.max_failures allows; Ray's log has its stack")
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    timeout = getattr(error, "controller_failure", None)
    if isinstance(timeout, WorkerGroupStartupTimeoutError):
        return PlatformError(
            f"{timeout.num_workers} workers could not start in time (ufm.workers.stuck_after_s, with max_failures "
            "retries): the cluster has too few free CPUs or GPUs for ufm.workers; see `ray status`"
        )
    failures = getattr(error, "worker_failures", None) or {}
    text = next((str(f) for f in failures.values()), str(error)) or repr(error)
    return PlatformError(f"training failed: {text.strip()[-3000:]}")


@contextmanager
def _watching(folder: Path, steps: int, title: str) -> Iterator[None]:
    """Shows the figures that rank 0 writes, while Ray Train runs."""
    ended = threading.Event()

    def look(show: OnProgress) -> None:
        last = -1
        while not ended.wait(_POLL_S):
            lines = read_metrics(folder)
            if lines and lines[-1]["step"] != last:
                last = lines[-1]["step"]
                show(last + 1, steps, _figures(lines[-1]))

    with progress(title) as show:
        thread = threading.Thread(target=look, args=(show,), daemon=True, name="progress")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _figures(figures: JsonObject) -> str:
    """The figures of a step that are shown during training."""
    names = {
        "reward": "reward",
        "loss": "loss",
        "accuracy": "accuracy",
        "health/kl": "KL",
        "seconds/step": "s per step",
    }
    return ", ".join(f"{name} {figures[k]:.3g}" for k, name in names.items() if figures.get(k) is not None)


def _finish(out: ArtifactWriter, folder: Path, info: JsonObject) -> JsonObject:
    """Writes the table `steps` and the info; returns the last step's figures."""
    steps = read_metrics(folder)
    names = sorted({k for s in steps for k in s} - {"step"})
    columns: dict[str, pa.Array] = {"step": pa.array([s["step"] for s in steps], pa.int64())}
    columns |= {n: pa.array([s.get(n) for s in steps], pa.float64()) for n in names}
    out.write_table("steps", pa.table(columns))
    out.info = {**info, "steps": len(steps), "last": steps[-1] if steps else {}}
    return out.info["last"]
