"""What all tests share: a quiet, hermetic Ray that is started once, and the folder of real data, where there is one."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "gubs.serving.guard:middlewares")
# Idle threads of OpenMP spin. With several processes on two cores that takes more CPU than all that is computed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Each node asks all of its processes for their figures every five seconds: a third of what an idle process costs.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each of hundreds of processes compiles gubs anew

REPO = Path(__file__).resolve().parent.parent


LONGEST = ("test_ufm_resume.py", "test_train_job.py", "test_serve_job.py", "test_build_job.py")
TOGETHER = {
    name: group
    for group, names in {
        "ufm_run": ("resume", "preflight", "questions", "sft", "stage"),
        "service": ("http", "console", "killed"),
    }.items()
    for name in (f"test_ufm_{n}.py" if group == "ufm_run" else f"test_{n}.py" for n in names)
}
"""Files that share a fixture which takes long: one process runs them all."""


class FilesTogether(LoadFileScheduling):
    """A file's tests are run by one process (pytest -n 2 --dist loadfile), and so are files that share a fixture."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return TOGETHER.get(Path(file).name, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    """Called by xdist."""
    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: of several processes none is left alone with one. Whatever needs Ray or is slow
    counts as `engine`, which `make check` leaves out.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if "ray_local" in getattr(item, "fixturenames", ()) or item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A small local Ray cluster, one for the whole test session."""
    import ray

    from gubs.ray_runtime import init_patiently

    with pytest.MonkeyPatch.context() as nobody_reads_it:
        nobody_reads_it.setattr("ray._private.node.Node.start_log_monitor", lambda _: None)
        init_patiently(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200 << 20,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data sets and videos; tests that need it are skipped where it is absent."""
    folder = REPO.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
