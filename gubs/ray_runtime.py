"""Ray, reached or started: joins a cluster, runs a local one or a local head node, and submits jobs to either."""

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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gubs.console import say
from gubs.errors import PlatformError
from gubs.section import Section

if TYPE_CHECKING:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_START_TIMEOUT_S = 180.0
_TRIES = 3
_PAUSE_S = 2.0
_STOP_S = 3.0
"""Ray would wait ten seconds for replicas of Serve. What those have to save is saved before (`jobs._write_log`)."""
_DASHBOARD_KEY = "webui:url"
_LATE = "timed out during startup"
"""Part of Ray's error when a node is not up within half a minute."""


Actor = Any
"""A Ray actor class or handle; to type checkers, Ray's `ActorHandle` has no methods."""


class RaySettings(Section):
    """How to reach or start Ray."""

    address: str = ""
    """Cluster to join; empty = RAY_ADDRESS if set, else a new local cluster."""
    num_cpus: int = Field(0, ge=0)
    """CPUs of a local cluster; 0 = all."""
    object_store_mb: int = Field(512, ge=80)
    """Object store of a local cluster, in MiB."""
    dashboard: bool = False
    """Start the dashboard with a local cluster."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Joins the cluster that the settings or RAY_ADDRESS name, or runs a local one until the context ends.

    In a process that is already connected (a Ray job's driver after `ray.init`, a test), nothing is started or stopped.

    Raises:
        PlatformError: the named cluster cannot be reached.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    _quiet()
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    try:
        if address:
            ray.init(address=address, log_to_driver=False)
        else:
            _start_local(settings)
    except ConnectionError as e:
        raise PlatformError(
            f"cannot join the Ray cluster at {address}: {e}\n"
            "Is it up, and do RAY_AUTH_MODE and RAY_AUTH_TOKEN match it? "
            "Without ray.address and RAY_ADDRESS, a local one is started."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(settings: RaySettings) -> None:
    # Anyone who reaches a cluster's ports can run code there, so Ray asks for a token even on local clusters and would
    # write one into the home folder. Ours gets a token for its lifetime only.
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = _token()
    init_patiently(
        address="local",
        num_cpus=settings.num_cpus or None,
        object_store_memory=settings.object_store_mb << 20,
        include_dashboard=settings.dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def dashboard_address() -> str:
    """The dashboard of the cluster that this process is connected to.

    Raises:
        PlatformError: it has none.
    """
    for _ in range(_TRIES):
        if url := _stored(_DASHBOARD_KEY) or _late_dashboard():
            return f"http://{url.removeprefix('http://')}"
        time.sleep(_PAUSE_S)
    raise PlatformError("this Ray cluster has no dashboard, which serving needs: start it with one")


def has_dashboard() -> bool:
    """Whether the cluster that this process is connected to was started with a dashboard."""
    return bool(_stored(_DASHBOARD_KEY))


def _late_dashboard() -> str:
    """The dashboard of a busy head whose node did not wait for it and stored an empty address. Clusters without a
    dashboard name one here too: so it has to answer, and for this cluster.
    """
    import ray
    from ray._private import ray_constants
    from ray.job_submission import JobSubmissionClient

    address = _stored(ray_constants.DASHBOARD_ADDRESS)
    try:
        client = JobSubmissionClient(f"http://{address}")
        session = client._do_request("GET", "/api/version").json().get("session_name")
    except (ConnectionError, RuntimeError, ValueError):
        return ""
    node = ray._private.worker.global_worker.node
    return address if node is not None and session == node.session_name else ""


def _stored(key: str) -> str:
    """A value that the cluster's head keeps about its dashboard; empty if there is none."""
    import ray
    from ray._private import ray_constants
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.experimental.internal_kv import _initialize_internal_kv, _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():  # another client of this process has closed it
        _initialize_internal_kv(GcsClient(address=ray.get_runtime_context().gcs_address))
    value = _internal_kv_get(key, namespace=ray_constants.KV_NAMESPACE_DASHBOARD)
    return value.decode() if value else ""


def init_patiently(**options: Any) -> None:
    """`ray.init` of a local cluster, tried again if a busy machine does not bring it up in Ray's fixed half minute.

    Raises:
        PlatformError: it failed three times.
    """
    import ray

    for _ in range(_TRIES):
        try:
            ray.init(**options)
        except Exception as e:
            if _LATE not in str(e):
                raise
            ray.shutdown()
        else:
            return
    raise PlatformError(f"Ray did not start within half a minute, {_TRIES} times: free some CPU and run again")


def beside_driver() -> "NodeAffinitySchedulingStrategy":
    """Places an actor on this process's node: one that a driver needs is then lost only together with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def quiet_ray_data() -> None:
    """Keeps Ray Data's messages and progress bars off the terminal, since commands show their own; log files stay."""
    import ray.data

    logger = logging.getLogger("ray.data")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _quiet() -> None:
    """Turns off Ray's usage reports and most of its messages, unless the environment asks for them."""
    for name in ("ray", "ray.data", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part prints warnings about Ray Data to stderr


@contextmanager
def local_head(num_cpus: int | None = None) -> Iterator[str]:
    """Runs a Ray head node with a dashboard on free ports of this machine; yields the dashboard's address.

    The cluster's token is in this process's environment until the context ends, unless RAY_AUTH_MODE is already set.
    """
    before = {k: os.environ.get(k) for k in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=_token())
    with tempfile.TemporaryDirectory(prefix="gubs-", ignore_cleanup_errors=True) as folder, ExitStack() as stack:
        for name, value in before.items():
            stack.callback(_restore, name, value)
        say("[ray]    starting a head node on this machine ...")
        for attempt in range(1, _TRIES + 1):
            dashboard, agent, client = free_ports(3)
            head = _start_head(dashboard, agent, client, folder, num_cpus)
            stack.callback(_stop, head)
            if _is_up(dashboard, agent, head):
                break
            if head.poll() is None or attempt == _TRIES:
                raise PlatformError(_never_up(head, Path(folder)))
            say("[ray]    it exited while starting (another program may have taken a port); starting another ...")
        address = f"http://127.0.0.1:{dashboard}"
        say(f"[ray]    up, dashboard at {address}")
        yield address


@cache
def _token() -> str:
    """One per process: Ray reads it once, so a second head node with another token would refuse this process."""
    return secrets.token_hex(32)


def _restore(name: str, value: str | None) -> None:
    os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _start_head(dashboard: int, agent: int, client: int, folder: str, num_cpus: int | None) -> subprocess.Popen[bytes]:
    bin_dir = Path(sys.executable).parent
    options = {
        "port": 0,
        "dashboard-host": "127.0.0.1",
        "node-ip-address": "127.0.0.1",
        "dashboard-port": dashboard,
        "temp-dir": folder,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "num-cpus": num_cpus or os.cpu_count(),
    }
    command = [f"{bin_dir}/ray", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    # Jobs run the first `python` on the head's PATH: it has to be this one.
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ.get('PATH', '')}", "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    with (Path(folder) / "head.log").open("wb") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=_die_with_parent
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed command leaves no cluster behind


def _is_up(dashboard: int, agent: int, head: subprocess.Popen[bytes]) -> bool:
    """Waits for the dashboard, and for the agent that starts jobs: it comes later, and Ray does not wait for it."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and head.poll() is None:
        with suppress(OSError, RuntimeError):
            JobSubmissionClient(f"http://127.0.0.1:{dashboard}").list_jobs()
            socket.create_connection(("127.0.0.1", agent), timeout=5).close()
            return True
        time.sleep(0.5)
    return False


def _never_up(head: subprocess.Popen[bytes], folder: Path) -> str:
    ended = head.poll() is not None
    what = "exited while starting" if ended else f"did not come up within {_START_TIMEOUT_S:g} s"
    log = (folder / "head.log").read_text(errors="replace")[-2000:]
    return f"the Ray head node {what}; the end of its log:\n{log}"


def follow_job(address: str, entrypoint: Sequence[str], runtime_env: dict[str, object]) -> int:
    """Submits a job to the dashboard at an address and prints its log while it runs; returns its exit code.

    Raises:
        PlatformError: it cannot be submitted.
    """
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
    if info.status == JobStatus.SUCCEEDED:
        return 0
    reason = (info.message or "").split("\n")[0]
    say(f"[ray]    job {job} {info.status}: {reason}")
    return info.driver_exit_code or 1


def _stop(head: subprocess.Popen[bytes]) -> None:
    import psutil

    try:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    head.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=10)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free at the moment."""
    return free_ports(1, host)[0]


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that are free at the moment: asked for one by one, the same could come twice."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((host, 0))
        return [int(s.getsockname()[1]) for s in sockets]
