"""Ray jobs: what the scripts in ray_jobs/ do, and `gubs submit`, which submits one and follows it.

A job goes to the cluster that `--address` or RAY_API_SERVER_ADDRESS names; without one, a head node is started on this
machine, used, and stopped.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import gubs
from gubs import stages
from gubs.artifacts import Artifact, Run, open_run
from gubs.config import Settings, load_settings, preset_names
from gubs.console import err, print_json, print_line, quiet_libraries, say
from gubs.errors import GubsError, MissingArtifactError, PlatformError, SettingsError
from gubs.ray_runtime import follow_job, free_port, local_head
from gubs.records import Split, Task

if TYPE_CHECKING:
    from gubs.serving.control import Control
    from gubs.serving.settings import ServingSettings

DEFAULT_RUN = "runs/demo-synthetic"

RunOption = Annotated[str, typer.Option("--run", "-r", help="Run folder: a path or URI (s3://...).")]
PresetOption = Annotated[str, typer.Option("--preset", "-p", help=f"{', '.join(preset_names())}, or a YAML file.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make it again, and any stale stage it needs.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to the preset.")]

Work = Callable[[Run, Settings, bool], object]
"""(run, settings, force)"""

CHOICES = ("movielens", "amazon", "agent4rec", "microlens", "netflix", "yelp")
"""Sources that only know what users chose: no exposure without a click, no play rate."""
_ROOT = Path(gubs.__file__).resolve().parent.parent
_EXCLUDES = [".venv", ".git", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"]


def making(*targets: str) -> Work:
    """Work that makes some stages and what they need."""
    return lambda run, settings, force: stages.make(targets, run, settings, force=force)


def main_job(run: Run, settings: Settings, force: bool = False) -> None:
    """GA-GRPO, with the policy before and after it judged on test users and compared, also with every baseline."""
    from gubs.evaluate.compare import compare, verdict
    from gubs.evaluate.predictors import PLAIN
    from gubs.evaluate.table import rewards_in_words, tables
    from gubs.report import policy as policy_page
    from gubs.report.training import write_page

    stages.make(stages.main_targets(settings), run, settings, force=force)
    _make_bars(run, settings, force)
    blocks = compare(run, [stages.start_policy(settings), stages.GRPO])
    say(f"[page]   {write_page(run, blocks)}")
    evaluate, seed = settings.evaluate, settings.seed
    say(f"[page]   {policy_page.write_page(run, policy_page.report(run, evaluate, seed, stages.GRPO))}")
    beside = tables(run, {}, least_users=evaluate.least_users, resamples=evaluate.bootstrap, seed=seed)
    policies = [stages.start_policy(settings), PLAIN, stages.GRPO]
    for line in [*verdict(blocks), *(rewards_in_words(t, policies) for t in beside if t.task == Task.SEQUENTIAL)]:
        say(line)


def _make_bars(run: Run, settings: Settings, force: bool) -> None:
    """Makes the baselines; anew if they are stale: they cost little, and a refusal would come after the training."""
    stale = stages.Graph(["bars"], run, settings).state("bars").status is stages.Status.STALE
    stages.make(["bars"], run, settings, force=force or stale)


def evaluate_job(run: Run, settings: Settings, force: bool = False) -> None:
    """Judges every policy of the run and compares them, then fills the tables that the data allow.

    IF-VR's table where users have targets to predict; "10 + 10" and the ranking where every record is a choice. What is
    finished is kept, so that a job that was killed resumes.
    """
    if trained := policies(run):
        judge(run, settings, trained, force)
    stages.make(["raw"], run, settings)
    if settings.source.kind in CHOICES:
        evaluate_public(run, settings, force)
        evaluate_ranking(run, settings, force)
    else:
        evaluate_ifvr(run, settings, {}, force)


def evaluate_ifvr(
    run: Run, settings: Settings, files: Mapping[str, str], force: bool = False, as_json: bool = False
) -> None:
    """Makes the baselines of IF-VR, and shows every predictor of the run beside them.

    Args:
        run: the run.
        settings: all settings.
        files: predictions from elsewhere, by name.
        force: make the baselines again.
        as_json: print JSON instead of tables.
    """
    stages.make(["bars"], run, settings, force=force)
    _show_evaluation(run, settings, ("ifvr",), as_json, files)


def evaluate_public(
    run: Run, settings: Settings, force: bool = False, as_json: bool = False, *, simulated: bool = False
) -> None:
    """Draws candidates, answers them by every baseline (and by language models), and shows the table."""
    stages.make(["simulated" if simulated else "public"], run, settings, force=force)
    _show_evaluation(run, settings, ("public", "simulated"), as_json)


def evaluate_ranking(run: Run, settings: Settings, force: bool = False, as_json: bool = False) -> None:
    """Ranks every user's last item by SASRec and its rivals, and shows the table."""
    stages.make(["ranking"], run, settings, force=force)
    _show_evaluation(run, settings, ("ranking",), as_json)


def evaluate_sensitivity(
    run: Run, settings: Settings, policy: str = "", force: bool = False, as_json: bool = False
) -> None:
    """Asks a policy about test targets with changed prompts, and shows what its answers depend on.

    Args:
        run: the run.
        settings: all settings.
        policy: as it was trained; empty = GA-GRPO's, else the one trained last.
        force: ask again.
        as_json: print JSON instead of tables.

    Raises:
        MissingArtifactError: the run does not have it.
    """
    from gubs.evaluate.sheets import print_sheet, sensitivity_sheets

    name = policy or (stages.GRPO if run.has(stages.GRPO) else (policies(run) or [stages.GRPO])[-1])
    as_made = _trained(run, [name])
    stages.make([f"{stages.SENSITIVITY}{name}"], run, settings, force=force, as_made=as_made)
    artifact = run.artifact(f"{stages.SENSITIVITY}{name}")
    if as_json:
        print_json(_figures(artifact) | artifact.manifest.info)
        return
    for sheet in sensitivity_sheets(artifact):
        print_sheet(sheet)


def evaluate_log(run: Run, settings: Settings, folder: str, as_json: bool = False) -> None:
    """Shows how the decisions in the service's log fit what the run's test users did.

    Args:
        run: has the targets.
        settings: all settings.
        folder: of the log (`serving.log_dir`).
        as_json: print JSON instead of tables.

    Raises:
        InputError: the folder has no decisions. ArtifactError: the run has no test targets.
    """
    from gubs.data.ifvr import IFVR
    from gubs.evaluate.decision_log import figures, happened, sheets
    from gubs.evaluate.sheets import print_sheet
    from gubs.serving.shadow import read_log

    truth = happened(IFVR(run))
    decided = figures(read_log(folder), truth, resamples=settings.evaluate.bootstrap, seed=settings.seed)
    if as_json:
        print_json([f.to_json() for f in decided])
        return
    for sheet in sheets(decided):
        print_sheet(sheet)


def evaluate_page(run: Run, settings: Settings) -> None:
    """Writes the page and prints all tables again from what is stored; makes nothing."""
    _show_evaluation(run, settings, ("ifvr", "public", "simulated", "ranking"))


def audit(
    table: str, columns: Path | None, run: str, preset: str, overrides: Sequence[str], as_json: bool = False
) -> None:
    """Checks a published table, beside the baselines of a run on the same files.

    Args:
        table: name of a case, or a CSV file; empty = print the names of the cases.
        columns: what the columns of a file mean.
        run: has the artifact `public`, or gets it if there are settings; empty = no run.
        preset: of the settings.
        overrides: settings of the run, as the source of its data.
        as_json: print JSON.

    Raises:
        SettingsError: settings without a run.
    """
    from gubs.evaluate.audit_sheet import audit
    from gubs.evaluate.printed import case_names, read_printed
    from gubs.evaluate.sheets import print_sheet

    if not table:
        for name in case_names():
            print_line(f"{name:<16} {read_printed(name).columns.title}")
        return
    printed, public = read_printed(table, columns), None
    if overrides and not run:
        raise SettingsError("settings are those of a run: name its folder with --run")
    if run:
        opened = open_run(run)
        if overrides:
            stages.make(["public"], opened, load_settings(preset, list(overrides)))
        public = opened.artifact("public")
    checked = audit(printed, public)
    if as_json:
        print_json(checked.to_json())
    else:
        print_sheet(checked.sheet())


def _show_evaluation(
    run: Run, settings: Settings, parts: Sequence[str], as_json: bool = False, files: Mapping[str, str] | None = None
) -> None:
    from gubs.evaluate.sheets import ifvr_sheets, print_sheet, public_sheets, ranking_sheet
    from gubs.evaluate.table import tables
    from gubs.report.evaluation import write_page

    evaluate = settings.evaluate
    options = {"least_users": evaluate.least_users, "resamples": evaluate.bootstrap, "seed": settings.seed}
    ifvr = tables(run, files or {}, **options) if run.has("bars") else []
    stored = [run.artifact(name) for name in ("public", "simulated", "ranking") if name in parts and run.has(name)]
    if as_json:
        print_json([t.to_json() for t in ifvr] if "ifvr" in parts else {a.stage: _figures(a) for a in stored})
    else:
        for sheet in [s for t in ifvr for s in ifvr_sheets(t)] if "ifvr" in parts else []:
            print_sheet(sheet)
        chosen = [a for a in stored if a.stage != "ranking"]
        for sheet in public_sheets(chosen) if chosen else []:
            print_sheet(sheet)
        for artifact in (a for a in stored if a.stage == "ranking"):
            print_sheet(ranking_sheet(artifact))
    say(f"[page]   {write_page(run, ifvr)}")


def _figures(artifact: Artifact) -> dict[str, object]:
    names = (n for n in ("metrics", "figures", "verdicts") if n in artifact.manifest.tables)
    return {name: artifact.table(name).to_pylist() for name in names}


def judge(run: Run, settings: Settings, names: Sequence[str], force: bool = False, as_json: bool = False) -> None:
    """Judges policies as they were trained, and compares them.

    Raises:
        MissingArtifactError: the run does not have one of them.
    """
    as_made = _trained(run, names)
    targets = [f"{stages.EVALUATION}{n}" for n in names]
    stages.make(targets, run, settings, force=force, as_made=as_made)
    show_judged(run, names, as_json)


def _trained(run: Run, names: Sequence[str]) -> list[str]:
    """Those of the policies that were trained.

    Raises:
        MissingArtifactError: the run does not have one of them.
    """
    trained = [n for n in names if n != stages.BASE]
    for name in trained:
        if not run.has(name):
            trained_names = ", ".join(policies(run)) or "none"
            raise MissingArtifactError(name, f"{run.uri} has no policy {name!r} (it has: {trained_names})")
    return trained


def serve_job(run: Run, settings: Settings, force: bool = False) -> None:
    """Makes the filter and deploys it on the cluster that this process is connected to, or is about to be.

    Raises:
        PlatformError: the cluster has no dashboard, or the filter does not start there.
    """
    from gubs.ray_runtime import dashboard_address, ray_session
    from gubs.serving.control import Control

    with ray_session(settings.ray):
        stages.make([stages.FILTER], run, settings, force=force)
        import ray

        gpus = bool(ray.cluster_resources().get("GPU"))
        control = Control(dashboard_address())
        filter_ = run.artifact(stages.FILTER)
        say(f"[serve]  deploy version {filter_.content} ...")
        name = control.deploy(filter_.uri, filter_.content, settings.serving, gpus=gpus)
        say(f"[serve]  {name} is up; shares {control.traffic()['versions']}")


def serve(arguments: Sequence[str], run: Run, settings: Settings) -> None:
    """Runs the service on a head node of this machine until it is interrupted; prints the URL and a command to try.

    Args:
        arguments: command line of `ray_jobs/serve_ufm.py`.
        run: the run.
        settings: all settings.

    Raises:
        PlatformError: it does not start.
    """
    from gubs.serving.keys import add_key

    serving, key, arguments, folder = settings.serving, "", list(arguments), ExitStack()
    if not serving.insecure and not serving.keys_file:
        keys = Path(folder.enter_context(tempfile.TemporaryDirectory(prefix="gubs-keys-"))) / "keys.json"
        key = add_key(keys, "this-machine", 60_000)
        arguments.append(f"serving.keys_file={keys}")
    with folder, _serving_head(serving) as head:
        url = _deploy(head, arguments, serving)
        say(f"[serve]  {url}/ is the console, {url}/openapi.json the API, {head} the dashboard")
        print(try_it(url, key or ("" if serving.insecure else "KEY"), run), flush=True)
        say("[serve]  Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def demo(arguments: Sequence[str], run: Run, settings: Settings) -> int:
    """The main job and then the service, on a head node of this machine; asks the service once. Returns an exit code.

    Args:
        arguments: command line of the jobs.
        run: the run.
        settings: all settings.
    """
    port = free_port()
    served = [*arguments, f"serving.port={port}", "serving.insecure=true"]
    serving = settings.serving.model_copy(update={"port": port, "insecure": True})
    with _serving_head(serving) as head:
        if code := _follow(head, "train_grpo", arguments):
            return code
        url = _deploy(head, served, serving)
        _ask_once(url, run)
    return 0


_LAST_S = 20.0
"""For an ingress to write its log, after its last request."""


@contextmanager
def _serving_head(serving: "ServingSettings") -> Iterator[str]:
    """A head node whose HTTP proxy has the guard. At the end, what is left of a log of decisions is written."""
    from gubs.serving.guard import CALLBACK, CALLBACK_VARIABLE, LIMIT_VARIABLE

    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)
    os.environ.setdefault(LIMIT_VARIABLE, str(serving.limits.body_mb))
    with local_head() as head:
        try:
            yield head
        finally:
            if serving.log_dir:
                _write_log(head, serving.timeout_s + _LAST_S)


def _write_log(head: str, timeout_s: float) -> None:
    from gubs.serving.control import Control

    say("[serve]  writing the last decisions to the log ...")
    try:
        Control(head).end(timeout_s)
    except PlatformError as e:  # what is to end has ended already
        say(f"[serve]  the last decisions are lost: {e}")


def _deploy(head: str, arguments: Sequence[str], serving: "ServingSettings") -> str:
    """Deploys on a head node of this machine; returns the service's URL."""
    if code := _follow(head, "serve_ufm", arguments):
        raise PlatformError(f"the service did not start (exit code {code})")
    return f"http://127.0.0.1:{serving.port}"


def _ask_once(url: str, run: Run) -> None:
    """Asks about a test user and some of this user's targets, and prints the answer."""
    from gubs.data.ifvr import IFVR
    from gubs.serving.client import Client

    rows = IFVR(run).targets(Task.SEQUENTIAL, [Split.TEST]).to_pylist() or IFVR(run).targets(Task.CLICK).to_pylist()
    user, task = rows[0]["user_id"], Task(rows[0]["task"])
    videos = list(dict.fromkeys(r["video_id"] for r in rows if r["user_id"] == user))[:5]
    with Client(url, timeout_s=120) as client:
        answer = client.filter(user, videos, task=task)
    say(f"[demo]   POST {url}/v1/filter: user {user}, {len(videos)} videos, {answer.timing_ms['total']:.0f} ms")
    for result in answer.results:
        about = result.error.message if result.error else f"P(skip) {result.skip_probability:.2f}, {result.option}"
        say(f"           {result.id}: {result.decision}, {about}: {' '.join((result.reason or '').split())[:120]}")


def try_it(url: str, key: str, run: Run) -> str:
    """A curl command that asks about a user and two videos of the run."""
    artifact = run.artifact(stages.FILTER)
    user = artifact.table("users", ["user_id"])["user_id"][0].as_py()
    videos = artifact.table("videos", ["video_id"])["video_id"][:2].to_pylist()
    body = json.dumps({"user": {"id": user}, "candidates": [{"id": v} for v in videos]})
    header = f" -H 'Authorization: Bearer {key}'" if key else ""
    return f"curl {url}/v1/filter{header} -H 'Content-Type: application/json' -d {shlex.quote(body)}"


def control(address: str) -> "Control":
    """The service on a cluster.

    Raises:
        SettingsError: no cluster is named. PlatformError: it cannot be reached.
    """
    from gubs.serving.control import Control

    if not (named := named_cluster(address)):
        raise SettingsError("name the cluster: --address http://host:8265, or RAY_API_SERVER_ADDRESS")
    return Control(named)


def parse_shares(texts: Sequence[str]) -> dict[str, float]:
    """Shares from `APP=SHARE` texts.

    Raises:
        SettingsError: one is not of that form, or two name the same application.
    """
    shares: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in shares:
            raise SettingsError(f"{name} is named twice")
        try:
            shares[name] = float(value)
        except ValueError:
            raise SettingsError(f"{text!r} is not of the form APP=SHARE") from None
    return shares


def parse_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers from a text such as `0,1,2`.

    Raises:
        SettingsError: it is not of that form.
    """
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise SettingsError(f"{text!r} is not of the form 0,1,2") from None


def filter_table(
    run: Run, settings: Settings, tables: Sequence[str], out: str, task: Task, mode: str, force: bool = False
) -> None:
    """Makes the filter of a run, and decides about the rows of tables.

    Raises:
        InputError: see `gubs.serving.batch.filter_table`.
    """
    from gubs.ray_runtime import ray_session
    from gubs.serving.batch import filter_table, outs
    from gubs.serving.filter import Mode
    from gubs.ufm.stage import use_gpu

    folders = outs(tables, out)
    with ray_session(settings.ray):
        stages.make([stages.FILTER], run, settings, force=force)
        for table, folder in zip(tables, folders, strict=True):
            gpus = use_gpu(settings.ufm.workers)
            engines = settings.ufm.workers.count if gpus else 1
            uri = run.artifact(stages.FILTER).uri
            counts = filter_table(uri, table, folder, task=task, mode=Mode(mode), engines=engines, gpus=gpus)
            say(f"[filter] {folder}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))


def policies(run: Run) -> list[str]:
    """The trained policies of a run, in the order in which they were made."""
    manifests = [run.artifact(n).manifest for n in run.stages()]
    trained = [m for m in manifests if m.kind in (stages.SFT, stages.GRPO)]
    return [m.stage for m in sorted(trained, key=lambda m: m.created)]


def show_judged(run: Run, judged: Sequence[str] = (), as_json: bool = False) -> None:
    """Writes the page about training and prints the judged policies (default: all) side by side."""
    from gubs.evaluate.compare import compare, print_blocks
    from gubs.report.training import write_page

    blocks = compare(run, judged)
    page = write_page(run, blocks)
    if as_json:
        print_json([b.to_json() for b in blocks])
    else:
        print_blocks(blocks)
    say(f"[page]   {page}")


def report(run: Run, settings: Settings, policy: str = "", as_json: bool = False) -> None:
    """Writes the page about a judged policy (default: the one trained last), and prints its verdicts."""
    from gubs.report import policy as page

    made = page.report(run, settings.evaluate, settings.seed, policy)
    if as_json:
        print_json(made.to_json())
    for finding in [] if as_json else made.findings:
        print_line(f"{made.policy}, {finding.task}: {finding.about}")
        for sentence in finding.sentences:
            print_line(f"  {sentence}")
    for stale in made.stale:
        say(f"stale: {stale}")
    for missing in made.missing:
        say(f"not in this run: {missing}")
    say(f"[page]   {page.write_page(run, made)}")


def job_main(work: Work) -> None:
    """The command line of a script in ray_jobs/ (--run, --preset, --force, key=value), then `work`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def command(
        run: RunOption = DEFAULT_RUN,
        preset: PresetOption = "tiny",
        force: ForceOption = False,
        overrides: Overrides = None,
    ) -> None:
        work(open_run(run), load_settings(preset, overrides or []), force)

    run_app(app)


def run_app(app: Callable[[list[str] | None], object], args: list[str] | None = None) -> None:
    """Runs a command line; an error with a remedy becomes one message and an exit code."""
    quiet_libraries()
    try:
        app(args)
    except GubsError as e:
        commands = stages.commands_of(e.stage) if isinstance(e, MissingArtifactError) else []
        err.print("error: ", style="bold red", end="")
        say(f"{e}: run {' or '.join(f'`{c}`' for c in commands)} first" if commands else str(e))
        sys.exit(e.exit_code)


def named_cluster(address: str) -> str:
    """Dashboard address of the cluster that jobs go to; empty = a new head node on this machine."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS", "")


def submit(script: str, arguments: Sequence[str], address: str = "") -> int:
    """Submits `ray_jobs/<script>.py`, prints its log while it runs, and returns its exit code.

    Args:
        script: name of the script without `.py`.
        arguments: its command line.
        address: dashboard address of a cluster (http://host:8265); empty = RAY_API_SERVER_ADDRESS, else a local head.

    Raises:
        PlatformError: there is no such script, or no cluster can be reached or started.
    """
    _script(script)
    if address := named_cluster(address):
        command = ["python", f"ray_jobs/{script}.py", *arguments]
        return follow_job(address, command, {"working_dir": str(_ROOT), "excludes": _EXCLUDES})
    with local_head() as head:
        return _follow(head, script, arguments)


def _follow(head: str, script: str, arguments: Sequence[str]) -> int:
    """Runs a script of this checkout as a job on a head node of this machine."""
    command = [sys.executable, str(_script(script)), *arguments]
    return follow_job(head, command, {"env_vars": {"GUBS_HOME": str(Path.cwd())}})


def _script(name: str) -> Path:
    path = _ROOT / "ray_jobs" / f"{name}.py"
    if not path.is_file():
        scripts = ", ".join(sorted(p.stem for p in path.parent.glob("*.py")))
        raise PlatformError(f"there is no job {name!r} in {path.parent} (there are: {scripts})")
    return path
