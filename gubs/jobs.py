"""Ray jobs: what the scripts in ray_jobs/ share, and `gubs submit`, which submits one and follows it.

A job goes to the cluster that `--address` or RAY_API_SERVER_ADDRESS names; without one, a head node of our own is
started on this machine, used, and stopped.
"""

import asyncio
import ctypes
import logging
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

import gubs
from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.console import say
from gubs.errors import GubsError, PlatformError

Work = Callable[[Run, Settings, bool], object]

_START_TIMEOUT_S = 180.0
_EXCLUDES = [".venv", ".git", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"]


def job_main(work: Work, default_run: str, whole: Work | None = None) -> None:
    """The command line of a script in ray_jobs/ (--run, --preset, --force, key=value), then `work`.

    Args:
        work: what the job does; it makes inputs that are missing, and takes those that are there as they are.
        default_run: run folder where none is given.
        whole: with --all, instead of `work`: every stage from the logs on is checked or made.
    """

    def command(
        run: Annotated[str, typer.Option(help="Run folder: a path or URI.")] = default_run,
        preset: Annotated[str, typer.Option(help="Preset or YAML file.")] = "tiny",
        force: Annotated[bool, typer.Option("--force", help="Make it again even if it is there.")] = False,
        every: Annotated[bool, typer.Option("--all", hidden=not whole, help="Check the inputs' stages too.")] = False,
        overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]")] = None,
    ) -> None:
        from gubs.pipeline import open_run

        chosen = whole if every and whole else work
        chosen(open_run(run), load_settings(preset, overrides or []), force)

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app()
    except GubsError as e:
        say(f"error: {e}")
        sys.exit(e.exit_code)


def named_cluster(address: str) -> str:
    """Dashboard address of the cluster that jobs go to; empty = a head node of our own on this machine."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS", "")


def submit(script: str, arguments: Sequence[str], address: str = "") -> int:
    """Submits `ray_jobs/<script>.py`, prints its log while it runs, and returns its exit code (0 or 1).

    Args:
        script: name of the script without `.py`.
        arguments: its command line.
        address: dashboard address of a cluster (http://host:8265); empty = RAY_API_SERVER_ADDRESS, else a local head.

    Raises:
        PlatformError: there is no such script, or no cluster to be reached or started.
    """
    root = Path(gubs.__file__).resolve().parent.parent
    path = root / "ray_jobs" / f"{script}.py"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.py")))
        raise PlatformError(f"there is no job {script!r} in {path.parent} (there are: {known})")
    if address := named_cluster(address):
        return _follow(
            address, ["python", f"ray_jobs/{script}.py", *arguments], {"working_dir": str(root), "excludes": _EXCLUDES}
        )
    with local_head() as here:
        return _follow(here, [sys.executable, str(path), *arguments], {"env_vars": {"GUBS_HOME": str(Path.cwd())}})


@contextmanager
def local_head(num_cpus: int | None = None) -> Iterator[str]:
    """A Ray head node with dashboard on this machine, on ports and a folder of its own; yields the dashboard's address.

    The cluster asks for a token, which is put into this process's environment while the context lasts; where
    RAY_AUTH_MODE is set already, that holds.
    """
    port, agent = _free_port(), _free_port()
    address = f"http://127.0.0.1:{port}"
    before = {k: os.environ.get(k) for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="gubs-", ignore_cleanup_errors=True) as folder:
        head = _start_head(port, agent, folder, num_cpus)
        try:
            _wait_until_up(address, agent, head, Path(folder))
            yield address
        finally:
            _stop(head)
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _start_head(port: int, agent: int, folder: str, num_cpus: int | None) -> subprocess.Popen[bytes]:
    bin_dir = str(Path(sys.executable).parent)
    command = [
        f"{bin_dir}/ray",
        "start",
        "--head",
        "--block",
        "--port=0",
        "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1",
    ]
    command += [
        f"--dashboard-port={port}",
        f"--temp-dir={folder}",
        "--disable-usage-stats",
        f"--ray-client-server-port={_free_port()}",
    ]
    command += [f"--dashboard-agent-listen-port={agent}", f"--num-cpus={num_cpus or os.cpu_count()}"]
    # jobs run the `python` they find on the head's PATH: it has to be this one
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ.get('PATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    log = (Path(folder) / "head.log").open("wb")
    with log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=_die_with_parent
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed command leaves no cluster behind


def _wait_until_up(address: str, agent: int, head: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits for the dashboard and for the agent that starts jobs: it comes later, and is waited for by nobody else."""
    from ray.job_submission import JobSubmissionClient

    say("[ray]    starting a head node on this machine ...")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(OSError, RuntimeError):
            JobSubmissionClient(address).list_jobs()
            socket.create_connection(("127.0.0.1", agent), timeout=5).close()
            say(f"[ray]    up, dashboard at {address}")
            return
        time.sleep(0.5)
    log = (folder / "head.log").read_text(errors="replace")[-2000:]
    raise PlatformError(f"the Ray head node did not come up within {_START_TIMEOUT_S:g} s; its last words:\n{log}")


def _follow(address: str, entrypoint: Sequence[str], runtime_env: dict[str, object]) -> int:
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env=runtime_env)
    except (ConnectionError, RuntimeError) as e:
        raise PlatformError(f"cannot submit to {address}: {e}") from None
    say(f"[ray]    job {job} submitted: {shlex.join(entrypoint)}")

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stderr.write(lines)
            sys.stderr.flush()

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    info = client.get_job_info(job)
    if info.status != JobStatus.SUCCEEDED:
        reason = (info.message or "").split("\n")[0]
        say(f"[ray]    job {job} {info.status}: {reason}")
        return info.driver_exit_code or 1
    return 0


def _stop(head: subprocess.Popen[bytes]) -> None:
    import psutil

    try:
        family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    head.terminate()
    _, left = psutil.wait_procs(family, timeout=10)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=10)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
