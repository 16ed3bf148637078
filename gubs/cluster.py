"""Ray, reached or started: one place that knows how to join a cluster or run a local one, quietly and safely."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gubs.config import RaySettings
from gubs.errors import PlatformError

_TRIES = 3
_LATE = "timed out during startup"
"""What Ray says of a node that is not up within half a minute."""


@contextmanager
def ray_session(settings: RaySettings) -> Iterator[None]:
    """Joins the cluster that the settings or RAY_ADDRESS name; else runs a local one until the context is left.

    Inside a process that is connected already (a Ray job's driver after `ray.init`, a test), nothing is started or
    stopped.

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
    # Whoever reaches a cluster's ports can run code there. Ray therefore asks for a token on local clusters, and would
    # write one into the home folder: ours gets one of its own, for its life only.
    if not os.environ.keys() & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    init_patiently(
        address="local",
        num_cpus=settings.num_cpus or None,
        object_store_memory=settings.object_store_mb << 20,
        include_dashboard=settings.dashboard,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def init_patiently(**options: Any) -> None:
    """`ray.init` of a local cluster, tried again where a busy machine does not bring it up in Ray's fixed half minute.

    Raises:
        PlatformError: three times in vain.
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
    raise PlatformError(f"Ray could not be started here, {_TRIES} times: each time it was not up within half a minute")


def quiet_ray_data() -> None:
    """Keeps Ray Data's start messages and bars off the terminal (its log files stay): the commands show their own."""
    import ray.data

    logger = logging.getLogger("ray.data")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _quiet() -> None:
    """Ray reports usage to its makers and prints much by default; both are off unless asked for."""
    for name in ("ray", "ray.data", "ray.train", "ray._private"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its C++ part warns on stderr of what Ray Data does itself
