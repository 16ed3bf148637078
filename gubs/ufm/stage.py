"""The training stages, on the driver's side: `sft_model` from the teacher's examples, `grpo` from there.

The driver checks everything that can be checked before anything is spent, starts Ray Train, shows progress, and
publishes the artifact: `policy/` (a checkpoint for transformers and vLLM), the table `steps`, samples, TensorBoard
files, checkpoints. Run again after a kill, the same command goes on from the last checkpoint.
"""

import json
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from gubs.artifacts import Artifact, ArtifactWriter, Run, fingerprint, fingerprint_files, writing
from gubs.config import Settings
from gubs.errors import ArtifactError, GubsError, PlatformError, SettingsError
from gubs.records import TASK_OPTIONS, Split, Task
from gubs.teachers.sft import STAGE as EXAMPLES
from gubs.ufm import memory
from gubs.ufm import model as models
from gubs.ufm.checkpoint import POLICY, Checkpoints
from gubs.ufm.monitor import STUCK, check_trackers, read_metrics
from gubs.ufm.questions import Questions, known_tasks
from gubs.ufm.sft import COLUMNS, order_of, steps_of
from gubs.ufm.worker import CHECKPOINTS, SETTINGS, Job

SFT, GRPO = "sft_model", "grpo"
_POLL_S = 0.5
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Ray leaves the GPUs visible to workers that have none."""
_SHOWN = 4
"""Settings named in an error that says what differs."""

OnProgress = Callable[[int, int, Mapping[str, Any]], None]
"""Told (steps done, steps in all, figures of the last one)."""


def sft_stage(
    run: Run,
    settings: Settings,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, bool]:
    """Fine-tunes the base model on the teacher's examples. Ray has to be running.

    Returns:
        The artifact `sft_model` and whether it was made now.

    Raises:
        ArtifactError: an input is missing, or an unfinished training of other settings is in the way.
        PlatformError: no GPU, or a worker failed more often than allowed. DivergedError: see there.
    """
    ufm = settings.ufm
    examples = run.artifact(EXAMPLES)
    table = examples.table("examples", [*COLUMNS, "gold"])
    if not table.num_rows:
        raise ArtifactError(
            f"{examples.uri} has no examples (see teachers.sft_dislikes and teachers.sft_click_users); "
            "ufm.grpo.start=base trains without SFT"
        )
    if ufm.sft.batch % ufm.workers.count:
        raise SettingsError(f"ufm.sft.batch={ufm.sft.batch} cannot be dealt evenly to {ufm.workers.count} workers")
    base = models.checkpoint(ufm.model)
    inputs = {"examples": examples.fingerprint, **_prompt_inputs(run)}
    recipe = _recipe(settings, ufm.sft.model_dump(exclude={"checkpoint"}), inputs, base)
    mark = fingerprint(SFT, recipe, inputs)
    if found := run.finished(SFT, mark, force):
        return found, False
    check_trackers(ufm.grpo.trackers)
    _check_memory(settings, base, memory.plan_sft)
    say(_options("examples", Counter(zip(*(table[c].to_pylist() for c in ("task", "gold")), strict=True))))
    with _training(run, SFT, mark, settings, inputs, force) as (out, folder):
        job = Job(run.uri, settings, SFT, str(folder), _checkpoints(folder), str(base), recipe)
        check_checkpoint(job, ufm.sft.checkpoint.keep)
        steps = steps_of(table.num_rows, ufm.sft)
        order = order_of(table.num_rows, ufm.sft, settings.seed)
        data = _dataset(table.select(list(COLUMNS)).take(order), ufm.workers.count)
        config = {"job": job, "examples": table.num_rows}
        with _watching(folder, steps, on_progress):
            _say_scarce(settings, say)
            ended = _fit("gubs.ufm.sft", config, settings, folder, {"train": data})
        _finish(out, folder, {"examples": table.num_rows, "base": base.name, **ended})
    return run.artifact(SFT), True


def grpo_stage(
    run: Run,
    settings: Settings,
    *,
    name: str = GRPO,
    force: bool = False,
    say: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress | None = None,
) -> tuple[Artifact, bool]:
    """Trains the policy by GA-GRPO. Ray has to be running.

    Args:
        run: with `ifvr`, `labels`, and where the settings need them `sft_model` and `ugm`.
        settings: of the run.
        name: of the artifact; several trainings can stand side by side in one run.
        force: make it again.
        say: told what it trains on.
        on_progress: see `OnProgress`.

    Returns:
        The artifact and whether it was made now.

    Raises:
        As `sft_stage`.
    """
    grpo = settings.ufm.grpo
    questions = Questions(run, settings)
    start, inputs = _start(run, settings)
    if grpo.groups and "ugm" not in run.stages():
        raise ArtifactError(f"{run.uri} has no groups (artifact ugm): run `gubs ugm`, or set ufm.grpo.groups=false")
    inputs |= questions.fingerprints()
    free = {"steps", "checkpoint", "samples_every", "trackers"}
    keep = {"steps"} if grpo.optimizer.schedule == "constant" else set()
    recipe = _recipe(settings, grpo.model_dump(exclude=(free - {"steps"}) | keep), inputs, start)
    mark = fingerprint(name, {**recipe, "steps": str(grpo.steps)}, inputs)
    if found := run.finished(name, mark, force):
        return found, False
    check_trackers(grpo.trackers)
    tasks = _tasks(questions, grpo.tasks, say)
    _check_memory(settings, start, memory.plan_grpo)
    with _training(run, name, fingerprint(name, recipe, inputs), settings, inputs, force, mark) as (out, folder):
        job = Job(run.uri, settings, name, str(folder), _checkpoints(folder), str(start), recipe, tasks)
        check_checkpoint(job, grpo.checkpoint.keep)
        with _watching(folder, grpo.steps, on_progress):
            _say_scarce(settings, say)
            ended = _fit("gubs.ufm.grpo", {"job": job}, settings, folder, {})
        about = {"tasks": [str(t) for t in tasks], "start": start.name, "rule": grpo.advantage.rule}
        _finish(out, folder, about | ended)
    return run.artifact(name), True


def policy_folder(run: Run, stage: str) -> Path:
    """Local folder of a trained policy.

    Raises:
        ArtifactError: it was not trained, or the run is not on a path that this machine sees.
    """
    artifact = run.artifact(stage)
    if "://" in run.uri and not run.uri.startswith("file://"):
        raise ArtifactError(
            f"{artifact.uri}: copy {POLICY}/ to a path that all machines see, and give it as a model path"
        )
    return Path(run.path(stage, POLICY))


def check_checkpoint(job: Job, keep: int) -> None:
    """Looks at what an earlier attempt left, before anything is overwritten.

    Raises:
        ArtifactError: the newest checkpoint is damaged or of another model, other data or other settings.
    """
    Checkpoints(job.checkpoints, job.recipe, keep, world=job.settings.ufm.workers.count).latest()


def _tasks(questions: Questions, wanted: Sequence[Task], say: Callable[[str], None]) -> tuple[Task, ...]:
    """The turns of the tasks, without those that have records of one option only: there is but a constant to be learnt.

    Raises:
        ArtifactError: there is none.
    """
    known = known_tasks(questions, wanted)
    counts = Counter((str(t), str(i.gold)) for t in known for i in questions.items(t, Split.TRAIN))
    say(_options("records", counts))
    useful = [t for t in known if sum(task == t for task, _ in counts) > 1]
    for task in set(known) - set(useful):
        say(f"the {task} task is left out: its records have one option only")
    if not useful:
        raise ArtifactError(f"{questions.run.uri}: no task has training records of two options; see `gubs show`")
    return tuple(t for t in wanted if t in useful)


def _options(what: str, counts: Mapping[tuple[str, str], int]) -> str:
    """How many there are of each task and option, and which are missing."""
    parts = []
    for task, options in TASK_OPTIONS.items():
        mine = {str(o): counts.get((str(task), str(o)), 0) for o in options}
        absent = [o for o, n in mine.items() if not n]
        listed = ", ".join(f"{n:,} {o}" for o, n in mine.items() if n)
        lack = f" (none of {', '.join(absent)})" if absent and listed else ""
        parts.append(f"{task} task: {listed or 'none'}{lack}")
    return f"{what}: " + "; ".join(parts)


def _start(run: Run, settings: Settings) -> tuple[Path, dict[str, str]]:
    if settings.ufm.grpo.start == "base":
        return models.checkpoint(settings.ufm.model), {}
    artifact = run.artifact(SFT)
    now, then = _model_name(settings.model_dump(mode="json")), _model_name(artifact.manifest.settings)
    if now != then:
        raise ArtifactError(
            f"{artifact.uri} was fine-tuned from {then}, and the settings name {now}: give the same model, use another "
            "--run, or fine-tune again (`gubs sft --force`)"
        )
    return policy_folder(run, SFT), {SFT: artifact.fingerprint}


def _model_name(settings: Mapping[str, Any]) -> str:
    """What the settings say of the model to start from, as one gives it."""
    model = settings["ufm"]["model"]
    names = ("path",) if model["path"] else ("size", "lessons") if model["size"] == "tiny" else ("size",)
    return " ".join(f"ufm.model.{name}={model[name]}" for name in names)


def _prompt_inputs(run: Run) -> dict[str, str]:
    return {n: run.artifact(n).fingerprint for n in ("ifvr", "frames") if n in run.stages()}


def _recipe(settings: Settings, stage: Mapping[str, Any], inputs: Mapping[str, str], start: Path) -> dict[str, str]:
    """Fingerprints of everything that decides the weights, by what a person would call it."""
    ufm = settings.ufm
    weights = sorted(start.glob("*.safetensors"))
    chosen = {
        "seed": settings.seed,
        "inputs": ufm.inputs.model_dump(),
        "dtype": ufm.model.dtype,
        "min_new_tokens": ufm.rollout.min_new_tokens,
        "workers": ufm.workers.count,
        **stage,
    }
    return {
        "model": fingerprint_files(weights) if weights else start.name,
        "data": fingerprint("data", {}, inputs),
        "settings": fingerprint("settings", chosen, {}),
    }


def _checkpoints(folder: Path) -> str:
    return str(folder / CHECKPOINTS)


@contextmanager
def _training(
    run: Run,
    stage: str,
    mark: str,
    settings: Settings,
    inputs: Mapping[str, str],
    force: bool,
    published: str = "",
) -> Iterator[tuple[ArtifactWriter, Path]]:
    """An unfinished artifact of this very training, found again or new; another one's is refused, never removed.

    `published` is the artifact's own fingerprint, where it takes in more than what a checkpoint must agree with (the
    number of steps: an unfinished run may be given more).
    """
    partial = Path(run.path(f"{stage}.partial"))
    recipe = partial / "recipe.json"
    others = recipe.exists() and recipe.read_text() != mark
    if others and force:
        shutil.rmtree(partial)  # what this very training left, when it was killed, is gone on with: force or not
    elif others and (partial / CHECKPOINTS).exists():
        raise ArtifactError(
            f"{partial} holds an unfinished training with other settings, data or another model"
            f"{_differences(partial / SETTINGS, settings)}: give those again, use another --run, or --force to throw "
            "it away"
        )
    with writing(run, stage, fingerprint=mark, settings=settings, inputs=inputs, resumable=True) as out:
        (partial / SETTINGS).write_text(json.dumps(settings.model_dump(mode="json"), indent=1))
        yield out, partial
        out.fingerprint = published or mark


def _differences(path: Path, settings: Settings) -> str:
    """The settings that an unfinished training was begun with and that are others now, a few of them."""
    if not path.exists():
        return ""
    before, now = _flat(json.loads(path.read_text())), _flat(settings.model_dump(mode="json"))
    names = [n for n in sorted(before.keys() | now.keys()) if before.get(n) != now.get(n)]
    if not names:
        return " (all settings are the same: data or model differ)"
    shown = ", ".join(f"{n}={before.get(n)}, now {now.get(n)}" for n in names[:_SHOWN])
    return f" ({shown}{', ...' if len(names) > _SHOWN else ''})"


def _flat(nested: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by their whole names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}": value}
    return flat


def _dataset(table: pa.Table, workers: int) -> Any:
    """The examples as a stream; as many blocks as workers at least."""
    import ray.data

    from gubs.cluster import quiet_ray_data

    quiet_ray_data()
    rows = table.to_pylist()
    return ray.data.from_items(rows, override_num_blocks=max(workers, min(16, len(rows) // 256 + 1)))


def _fit(
    module: str, config: dict[str, Any], settings: Settings, folder: Path, datasets: dict[str, Any]
) -> dict[str, Any]:
    """Runs Ray Train until all steps are done.

    Returns:
        `seconds_after_last_step`, by phase: the last checkpoint and the policy stand in no step's figures.

    Raises:
        DivergedError, ArtifactError, PlatformError: see `sft_stage`.
    """
    import importlib

    from ray.train import DataConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import FailureConfig, RunConfig  # those of Ray's type hints know less

    workers = settings.ufm.workers
    gpu = use_gpu(settings)
    _environment(workers.stuck_after_s)
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
    trainer = TorchTrainer(
        loop,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(workers.stuck_after_s)),
        scaling_config=ScalingConfig(
            num_workers=workers.count, use_gpu=gpu, resources_per_worker=_resources(settings, gpu)
        ),
        run_config=run_config,
        **options,
    )
    try:
        result: Any = trainer.fit()
    except Exception as e:  # Ray wraps whatever a worker raised; here it gets its own name back
        raise _named(e, folder) from e
    finally:
        shutil.rmtree(folder / "ray-train", ignore_errors=True)
    outcome = result.return_value or {}
    if "error" in outcome:
        raise outcome["error"]
    return {"seconds_after_last_step": outcome.get("after_last_step", {})}


def use_gpu(settings: Settings) -> bool:
    """Whether each worker gets a GPU.

    Raises:
        PlatformError: they are asked for and not there, or there are some but not enough.
    """
    workers, there = settings.ufm.workers, _gpus()
    if workers.gpu == "no" or (workers.gpu == "auto" and not there):
        return False
    if there < workers.count:
        raise PlatformError(
            f"ufm.workers.count={workers.count}, but the cluster has {there} GPUs: ask for as many workers as there "
            "are GPUs, or train on CPUs (ufm.workers.gpu=no)"
        )
    return True


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def preflight(settings: Settings) -> None:
    """Looks at all that needs no data: model, trackers, GPUs and their memory. Ray has to be running.

    Raises:
        SettingsError: the model cannot be had. PlatformError: a tracker is not installed; GPUs lack or are too small.
    """
    models.check(settings.ufm.model)
    check_trackers(settings.ufm.grpo.trackers)
    for plan in (memory.plan_sft, memory.plan_grpo) if settings.ufm.grpo.start == "sft" else (memory.plan_grpo,):
        _check_memory(settings, "", plan)


def _check_memory(settings: Settings, folder: Path | str, plan: Callable[..., memory.MemoryPlan]) -> None:
    """Refuses a training that cannot fit the workers' GPUs, with the sum, before anything is loaded."""
    if use_gpu(settings):
        frames = (settings.frames.count, settings.frames.max_pixels)
        machine = memory.gpu_machine()
        memory.check(plan(settings.ufm, memory.config_of(settings.ufm, folder), frames, machine.gpu), machine)


def _resources(settings: Settings, gpu: bool) -> dict[str, float]:
    return {"CPU": settings.ufm.workers.cpus, **({"GPU": 1.0} if gpu else {})}


def _say_scarce(settings: Settings, say: Callable[[str], None]) -> None:
    """Tells what the workers have to wait for, if anything: another job may end, or the cluster grow."""
    import ray

    workers, free = settings.ufm.workers, ray.available_resources()
    wanted = {name: each * workers.count for name, each in _resources(settings, use_gpu(settings)).items()}
    short = [f"{n:g} {name} ({free.get(name, 0.0):g} free)" for name, n in wanted.items() if free.get(name, 0.0) < n]
    if short:
        say(f"{workers.count} workers wait for {' and '.join(short)}")


def _environment(stuck_after_s: float) -> None:
    """Ray Train reads these where the driver runs."""
    import os

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # each report waits for a poll
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(int(stuck_after_s)))
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(int(stuck_after_s))
    )  # a cluster may have to grow
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(int(stuck_after_s)))  # a report waits for all workers
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")


def _named(error: Exception, folder: Path) -> GubsError:
    """The error a worker raised, as one of ours."""
    failures = getattr(error, "worker_failures", None) or {}
    for cause in (*failures.values(), error):
        for found in (cause, getattr(cause, "cause", None), cause.__cause__):
            if isinstance(found, GubsError):
                return found
    stuck = folder / STUCK
    if stuck.exists():  # of the last attempt: each begins by removing it
        text = json.loads(stuck.read_text())["message"]
        stuck.unlink()
        return PlatformError(f"{text}, more often than ufm.workers.max_failures allows; Ray's log has its stack")
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    late = getattr(error, "controller_failure", None)
    if isinstance(late, WorkerGroupStartupTimeoutError):
        return PlatformError(
            f"{late.num_workers} workers could not be started in time (ufm.workers.stuck_after_s, max_failures times "
            "again): the cluster lacks the free CPUs or GPUs that ufm.workers asks for; see `ray status`"
        )
    text = next((str(f) for f in failures.values()), str(error)) or repr(error)
    return PlatformError(f"training failed: {text.strip()[-3000:]}")


@contextmanager
def _watching(folder: Path, steps: int, on_progress: OnProgress | None) -> Iterator[None]:
    """Reads the figures that rank 0 writes, while Ray Train runs, and passes them on."""
    ended = threading.Event()

    def look() -> None:
        last = -1
        while not ended.wait(_POLL_S):
            lines = read_metrics(folder)
            if on_progress and lines and lines[-1]["step"] != last:
                last = lines[-1]["step"]
                on_progress(last + 1, steps, lines[-1])

    thread = threading.Thread(target=look, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _finish(out: ArtifactWriter, folder: Path, info: dict[str, Any]) -> None:
    steps = read_metrics(folder)
    names = sorted({k for s in steps for k in s} - {"step"})
    columns: dict[str, Any] = {"step": pa.array([s["step"] for s in steps], pa.int64())}
    columns |= {n: pa.array([s.get(n) for s in steps], pa.float64()) for n in names}
    out.write_table("steps", pa.table(columns))
    out.info = {**info, "steps": len(steps), "last": steps[-1] if steps else {}}
