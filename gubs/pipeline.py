"""Whole jobs: the stages of the data's journey in order, as the command line and the Ray jobs run them."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from gubs.artifacts import Artifact, Run
from gubs.cluster import ray_session
from gubs.config import Settings
from gubs.console import llm_progress, print_json, progress, say, training_progress
from gubs.data.build import build_stage
from gubs.data.ingest import ingest_stage
from gubs.errors import ArtifactError, SettingsError

if TYPE_CHECKING:
    from gubs.llm.budget import Plan

SFT, GRPO, BASE, POLICY = "sft_model", "grpo", "base", "policy"
"""Names of `ufm.stage`, `evaluate.judge` and `ufm.checkpoint`, which import too much to be imported here."""

_UPLOAD_MARK = "/runtime_resources/"


def open_run(uri: str) -> Run:
    """The run at a path or URI.

    A relative path stands in GUBS_HOME if that is set, else in the current folder; but inside a Ray job the current
    folder is a copy that Ray deletes, so there it stands in `~/gubs`, where results outlive the job.
    """
    if "://" in uri or Path(uri).is_absolute():
        return Run(uri)
    here = Path.home() / "gubs" if _UPLOAD_MARK in str(Path.cwd()) else Path.cwd()
    return Run(Path(os.environ.get("GUBS_HOME") or here) / uri)


def ingest(run: Run, settings: Settings, force: bool = False) -> Artifact:
    """Source -> `raw`."""
    with _stage("raw", settings.source.kind) as finish:
        artifact, fresh = ingest_stage(run, settings, force=force)
        tables = artifact.manifest.tables
        rejected = tables["rejects"].rows
        finish(
            fresh,
            f"{_counts(artifact)}"
            + (f"; {rejected:,} rows rejected, see {artifact.path('rejects.parquet')}" if rejected else ""),
        )
    for note in artifact.manifest.info["notes"] if fresh else []:
        say(f"        note: {note}")
    return artifact


def synth(run: Run, settings: Settings, force: bool = False) -> Artifact:
    """Simulation -> `raw`, `truth`, `videos` (rendered)."""
    from gubs.data.render import render_stage

    ingest(run, settings, force)
    with _stage("videos", "render") as finish, ray_session(settings.ray), progress("rendering videos") as on_progress:
        artifact, fresh = render_stage(run, settings, force=force, on_progress=on_progress)
        found = artifact.manifest.info["found_from_earlier_attempt"]
        finish(
            fresh,
            f"{artifact.manifest.info['videos']:,} files"
            + (f", {found:,} of them from an earlier attempt" if found else ""),
        )
    return artifact


def build(run: Run, settings: Settings, force: bool = False) -> Artifact:
    """`raw` -> `ifvr`."""
    with _stage("ifvr", "filter and split") as finish:
        artifact, fresh = build_stage(run, settings, force=force)
        finish(fresh, _counts(artifact))
    return artifact


def frames(run: Run, settings: Settings, force: bool = False) -> Artifact:
    """Video files of `ifvr` -> `frames`."""
    from gubs.data.frames import STAGE, frame_stage

    with _stage(STAGE, "decode") as finish, ray_session(settings.ray), progress("decoding videos") as on_progress:
        videos, inputs = video_files(run)
        before = run.artifact(STAGE).manifest.created if STAGE in run.stages() else None
        artifact = frame_stage(run, settings, videos, inputs, force, lambda done, total, _: on_progress(done, total))
        verdicts = artifact.manifest.info["verdicts"]
        finish(
            artifact.manifest.created != before,
            ", ".join(f"{n:,} {v}" for v, n in verdicts.items()) or "this source has no video files",
        )
    return artifact


def video_files(run: Run) -> tuple[pa.Table, dict[str, str]]:
    """The video files of the data set: columns video_id and uri, and the fingerprints of the artifacts they come from.

    Videos for which the source has no file are not listed.
    """
    ifvr = run.artifact("ifvr")
    inputs = {"ifvr": ifvr.fingerprint}
    videos = ifvr.table("videos", ["video_id", "uri"])
    if "videos" in run.stages():
        rendered = run.artifact("videos")
        inputs["videos"] = rendered.fingerprint
        files = {row["video_id"]: rendered.path(row["file"]) for row in rendered.table("files").to_pylist()}
        uris = pa.array([files.get(v) for v in videos["video_id"].to_pylist()], pa.string())
        videos = videos.set_column(1, "uri", uris)
    return videos.filter(videos["uri"].is_valid()), inputs


def build_ifvr(run: Run, settings: Settings, force: bool = False) -> None:
    """The journey from logs and videos to an IF-VR data set with frames and a page to look at."""
    with ray_session(settings.ray):
        if settings.source.kind == "synthetic":
            synth(run, settings, force)
        else:
            ingest(run, settings, force)
        build(run, settings, force)
        frames(run, settings, force)
    show(run)


def demo(run: Run, settings: Settings, force: bool = False) -> None:
    """The whole journey, every stage checked or made: data set, groups, teachers, SFT, GA-GRPO, before and after."""
    with _training_job(run, settings):
        build_ifvr(run, settings, force)
        if settings.ufm.grpo.groups:
            ugm(run, settings, force)
        teach(run, settings, force)
        if settings.ufm.grpo.start == "sft":
            train_sft(run, settings, force)
        _train_and_compare(run, settings, force)


def main_job(run: Run, settings: Settings, force: bool = False) -> None:
    """GA-GRPO, and what it did for test users; first whatever the run lacks. `force` trains again, from the same."""
    with _training_job(run, settings):
        prepare(run, settings)
        _train_and_compare(run, settings, force)


def sft_job(run: Run, settings: Settings, force: bool = False) -> None:
    """SFT; first whatever the run lacks."""
    with _training_job(run, settings):
        prepare(run, settings, before=SFT)
        train_sft(run, settings, force)


def evaluate_job(run: Run, settings: Settings, force: bool = False) -> None:
    """Judges every policy that the run has, and compares them.

    Raises:
        ArtifactError: there is none.
    """
    trained = policies(run)
    if not trained:
        raise ArtifactError(f"{run.uri} has no trained policy: run `gubs sft` or `gubs grpo` first")
    with ray_session(settings.ray):
        for policy in trained:
            judge(run, settings, policy, force)
    report(run, trained)


@contextmanager
def _training_job(run: Run, settings: Settings) -> Iterator[None]:
    """Ray, after a look at all that can be refused before anything is made or paid for.

    Raises:
        SettingsError, PlatformError: see `ufm.stage.preflight`.
    """
    from gubs.ufm.stage import preflight

    _check_folder(run)
    with ray_session(settings.ray):
        preflight(settings)
        yield


def prepare(run: Run, settings: Settings, before: str = GRPO) -> None:
    """Makes what a training reads and the run has not got; what is there is taken as it is. Says so line by line."""
    wanted = ["ifvr", "frames", "ugm", "sft", "labels", SFT]
    if before == SFT or not settings.ufm.grpo.groups:
        wanted.remove("ugm")
    if before == SFT or settings.ufm.grpo.start == "base":
        wanted.remove(SFT)
    there = run.stages()
    missing = [n for n in wanted if n not in there]
    if len(missing) < len(wanted):
        say(f"[run]    {run.uri} has {', '.join(n for n in wanted if n in there)}")
    if missing:
        say(f"[run]    {run.uri} has no {', '.join(missing)}: made first")
    if {"ifvr", "frames"} & set(missing):
        build_ifvr(run, settings)
    if "ugm" in missing:
        ugm(run, settings)
    if {"sft", "labels"} & set(missing):
        teach(run, settings)
    if SFT in missing:
        train_sft(run, settings)


def _train_and_compare(run: Run, settings: Settings, force: bool) -> None:
    """Judges the policy that GA-GRPO starts from, trains, judges the result, and shows both."""
    start = SFT if settings.ufm.grpo.start == "sft" else BASE
    judge(run, settings, start, force)
    train_grpo(run, settings, force)
    judge(run, settings, GRPO, force)
    report(run, [start, GRPO])


def policies(run: Run) -> list[str]:
    """The trained policies of a run, in the order in which they were made."""
    made = [run.artifact(n).manifest for n in run.stages() if run.fs.exists(run.path(n, POLICY))]
    return [m.stage for m in sorted(made, key=lambda m: m.created)]


def report(run: Run, judged: Sequence[str] = (), as_json: bool = False) -> None:
    """Writes the page about training, and prints the judged policies (none named: all) side by side."""
    from gubs.evaluate.compare import compare, print_blocks
    from gubs.evaluate.report import write_page

    blocks = compare(run, judged)
    page = write_page(run, blocks)
    if as_json:
        print_json([b.to_json() for b in blocks])
    else:
        print_blocks(blocks)
    say(f"[page]   {page}")


def ugm(run: Run, settings: Settings, force: bool = False) -> Artifact:
    """`ifvr` -> `ugm`: group profiles and memberships."""
    from gubs.ugm.show import write_page
    from gubs.ugm.stage import ugm_stage

    with (
        _stage("ugm", "summarize, cluster, reflect") as finish,
        ray_session(settings.ray),
        llm_progress() as on_progress,
    ):
        artifact, fresh = ugm_stage(run, settings, force=force, say=_detail, on_progress=on_progress)
        info = artifact.manifest.info
        grouped = f"{info['grouped_users']} of {info['users']} users in them"
        memberships = f"{artifact.manifest.tables['memberships'].rows:,} memberships in all"
        finish(fresh, f"{info['kept']} of {info['groups']} groups have a profile, {grouped}; {memberships}")
    say(f"[page]   {write_page(run)}")
    return artifact


def plan_ugm(run: Run, settings: Settings) -> "Plan":
    """About what `ugm` would ask."""
    from gubs.ugm.stage import plan_ugm

    return plan_ugm(run, settings)


def run_ugm(run: Run, settings: Settings, force: bool = False) -> None:
    """The data set, where it is not there yet, and then the groups."""
    with ray_session(settings.ray):
        if "ifvr" not in run.stages():
            say("[ugm]    this run has no data set yet: building it first")
            build_ifvr(run, settings)
        ugm(run, settings, force)


def teach(run: Run, settings: Settings, force: bool = False) -> None:
    """`ifvr` -> `sft` (chains of thought), `labels` (reasons of skips), `profiles` (where users list no tags)."""
    from gubs.teachers.desk import Desk
    from gubs.teachers.profiles import profiles_stage
    from gubs.teachers.reasons import reasons_stage
    from gubs.teachers.sft import sft_stage

    jobs = {"sft": sft_stage, "labels": reasons_stage, "profiles": profiles_stage}
    with (
        ray_session(settings.ray),
        llm_progress() as on_progress,
        Desk(run, settings, settings.teachers, on_progress) as desk,
    ):
        for name, job in jobs.items():
            with _stage(name, "ask the annotator") as finish:
                artifact, fresh = job(desk, force=force)
                finish(fresh, ", ".join(f"{t.rows:,} {n}" for n, t in artifact.manifest.tables.items()))
            for note in artifact.manifest.info["notes"] if fresh else []:
                say(f"         note: {note}")


def base_model(settings: Settings) -> Path:
    """The checkpoint that training starts from; one of ours is made first where it is not there, which it says."""
    from gubs.ufm import model as models

    wanted = settings.ufm.model
    if models.made(wanted):
        return models.checkpoint(wanted)
    doing = f"make {wanted.size}" + (f", {wanted.lessons} steps of lessons" if wanted.lessons else "")
    with _stage("model", doing) as finish, progress("lessons") as on_progress:
        folder = models.checkpoint(wanted, on_progress)
        finish(True, str(folder))
    return folder


def train_sft(run: Run, settings: Settings, force: bool = False) -> Artifact:
    """`sft` -> `sft_model`: the base model, fine-tuned on the teacher's examples."""
    from gubs.ufm.stage import sft_stage

    _check_folder(run)
    run.artifact("sft")  # what is missing is said before Ray is started
    base_model(settings)
    with _stage(SFT, "fine-tune") as finish, ray_session(settings.ray), training_progress("SFT") as on_progress:
        artifact, fresh = sft_stage(run, settings, force=force, say=_detail, on_progress=on_progress)
        last = artifact.manifest.info["last"]
        finish(fresh, f"{artifact.manifest.info['steps']:,} steps, loss {last['loss']:.3f}")
    return artifact


def train_grpo(run: Run, settings: Settings, force: bool = False, name: str = GRPO) -> Artifact:
    """`sft_model`, `labels`, `ugm` -> `grpo`: the policy, trained by GA-GRPO."""
    from gubs.ufm.stage import grpo_stage

    _check_folder(run)
    run.artifact("labels")
    if settings.ufm.grpo.start == BASE:
        base_model(settings)
    with _stage(name, "GA-GRPO") as finish, ray_session(settings.ray), training_progress("GA-GRPO") as on_progress:
        artifact, fresh = grpo_stage(run, settings, name=name, force=force, say=_detail, on_progress=on_progress)
        steps = artifact.table("steps")["reward"].to_pylist()
        edge = max(1, len(steps) // 10)
        first, last = sum(steps[:edge]) / edge, sum(steps[-edge:]) / edge
        finish(fresh, f"{len(steps):,} steps, mean reward {first:.2f} at the start, {last:.2f} at the end")
    return artifact


def judge(run: Run, settings: Settings, policy: str, force: bool = False) -> Artifact:
    """A policy -> `eval-<policy>`: its answers about the test users, and the metrics.

    The answers of a policy that was trained anew since are replaced.
    """
    from gubs.evaluate.judge import judge_stage

    stage = f"eval-{policy}"
    if policy != BASE:
        run.artifact(policy)
    else:
        base_model(settings)
    again = force or _older(run, stage, policy)
    with _stage(stage, "judge test users") as finish, ray_session(settings.ray), progress("answers") as on_progress:
        artifact, fresh = judge_stage(run, settings, policy, force=again, on_progress=on_progress)
        finish(fresh, f"{artifact.manifest.tables['predictions'].rows:,} answers")
    return artifact


def plan_teachers(run: Run, settings: Settings) -> "Plan":
    """What `teach` would ask first; a skip costs two calls a round, at most 2 x rounds."""
    from gubs.teachers import profiles, reasons, sft
    from gubs.teachers.desk import Desk

    with Desk(run, settings, settings.teachers) as desk:
        return desk.plan([*sft.sft_requests(desk), *reasons.first_requests(desk), *profiles.profile_requests(desk)])


def show(run: Run) -> str:
    """Writes the page that shows the data set; returns its path."""
    from gubs.data.show import write_page

    page = write_page(run)
    say(f"[page]   {page}")
    return page


_Finish = Callable[[bool, str], None]


@contextmanager
def _stage(name: str, doing: str) -> Iterator[_Finish]:
    """Says what starts and, through the function it yields, how it ended."""
    began = time.monotonic()
    label = f"[{name}]".ljust(8)
    say(f"{label} {doing} ...")

    def finish(fresh: bool, text: str) -> None:
        took = f"done in {time.monotonic() - began:.1f} s" if fresh else "was finished already, nothing to do"
        say(f"{label} {took}: {text}")

    yield finish


def _check_folder(run: Run) -> None:
    """Refuses a training at a URI before anything is made for it.

    Raises:
        SettingsError: see there.
    """
    if "://" in run.uri and not run.uri.startswith("file://"):
        raise SettingsError(f"--run {run.uri}: training needs a path that all workers see, not a URI")


def _detail(text: str) -> None:
    say(f"         {text}")


def _older(run: Run, stage: str, source: str) -> bool:
    """Whether a stage was made before the one it comes from."""
    there = run.stages()
    if stage not in there or source not in there:
        return False
    return run.artifact(stage).manifest.created < run.artifact(source).manifest.created


def _counts(artifact: Artifact) -> str:
    tables = artifact.manifest.tables
    return ", ".join(f"{tables[t].rows:,} {t}" for t in ("users", "videos", "interactions"))
