"""Ray jobs: what the scripts in ray_jobs/ do, and `gubs submit`, which submits one and follows it.

A job goes to the cluster that `--address` or RAY_API_SERVER_ADDRESS names; without one, a head node is started on this
machine, used, and stopped.
"""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

import gubs
from gubs import stages
from gubs.artifacts import Run, open_run
from gubs.config import Settings, load_settings, preset_names
from gubs.console import err, print_json, say
from gubs.errors import ArtifactError, GubsError, MissingArtifactError, PlatformError
from gubs.ray_runtime import follow_job, local_head

DEFAULT_RUN = "runs/demo-synthetic"

RunOption = Annotated[str, typer.Option("--run", "-r", help="Run folder: a path or URI (s3://...).")]
PresetOption = Annotated[str, typer.Option("--preset", "-p", help=f"{', '.join(preset_names())}, or a YAML file.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make it again, and any stale stage it needs.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to the preset.")]

Work = Callable[[Run, Settings, bool], object]
"""(run, settings, force)"""

_EXCLUDES = [".venv", ".git", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"]


def making(*targets: str) -> Work:
    """Work that makes some stages and what they need."""
    return lambda run, settings, force: stages.make(targets, run, settings, force=force)


def main_job(run: Run, settings: Settings, force: bool = False) -> None:
    """GA-GRPO, with the policy before and after it judged on test users and compared."""
    stages.make(stages.main_targets(settings), run, settings, force=force)
    report(run, [stages.start_policy(settings), stages.GRPO])


def evaluate_job(run: Run, settings: Settings, force: bool = False) -> None:
    """Judges every policy of the run, and compares them.

    Raises:
        ArtifactError: the run has none.
    """
    trained = policies(run)
    if not trained:
        raise ArtifactError(f"{run.uri} has no trained policy: run `gubs sft` or `gubs grpo` first")
    judge(run, settings, trained, force)


def judge(run: Run, settings: Settings, names: Sequence[str], force: bool = False, as_json: bool = False) -> None:
    """Judges policies as they were trained, and compares them.

    Raises:
        MissingArtifactError: the run does not have one of them.
    """
    for name in names:
        if name != stages.BASE and not run.has(name):
            trained = ", ".join(policies(run)) or "none"
            raise MissingArtifactError(name, f"{run.uri} has no policy {name!r} (it has: {trained})")
    targets = [f"{stages.EVALUATION}{n}" for n in names]
    stages.make(targets, run, settings, force=force, as_made=[n for n in names if n != stages.BASE])
    report(run, names, as_json)


def policies(run: Run) -> list[str]:
    """The trained policies of a run, in the order in which they were made."""
    manifests = [run.artifact(n).manifest for n in run.stages()]
    trained = [m for m in manifests if m.kind in (stages.SFT, stages.GRPO)]
    return [m.stage for m in sorted(trained, key=lambda m: m.created)]


def report(run: Run, judged: Sequence[str] = (), as_json: bool = False) -> None:
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
    try:
        app(args)
    except GubsError as e:
        command = stages.command_of(e.stage) if isinstance(e, MissingArtifactError) else ""
        err.print("error: ", style="bold red", end="")
        say(f"{e}: run `{command}` first" if command else str(e))
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
    root = Path(gubs.__file__).resolve().parent.parent
    path = root / "ray_jobs" / f"{script}.py"
    if not path.is_file():
        scripts = ", ".join(sorted(p.stem for p in path.parent.glob("*.py")))
        raise PlatformError(f"there is no job {script!r} in {path.parent} (there are: {scripts})")
    if address := named_cluster(address):
        command = ["python", f"ray_jobs/{script}.py", *arguments]
        return follow_job(address, command, {"working_dir": str(root), "excludes": _EXCLUDES})
    with local_head() as head:
        return follow_job(head, [sys.executable, str(path), *arguments], {"env_vars": {"GUBS_HOME": str(Path.cwd())}})
