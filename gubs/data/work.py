"""Runs functions over the parts of a log: in this process if the log is small, else by Ray Data on the cluster.

The functions are the same in both cases. They read and write files in the run's folder and return something small. What
a finished call returned is kept there too, so that a killed command resumes.
"""

import functools
import hashlib
import operator
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from gubs.artifacts import write_atomically
from gubs.console import progress
from gubs.errors import GubsError, PlatformError
from gubs.ray_runtime import RaySettings, quiet_ray_data, ray_session

if TYPE_CHECKING:
    import ray

Item = TypeVar("Item")
Result = TypeVar("Result")

_GROUPS_PER_CPU = 4
_NO_PROGRESS_S = 3600
"""After this time without a finished call, Ray Data gives up."""


@dataclass(frozen=True)
class Work:
    """Where functions run, and where finished results are kept. Made by `work`."""

    fs: fsspec.AbstractFileSystem
    folder: str
    """Of the kept results (no scheme)."""
    on_ray: bool

    def run(self, phase: str, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Calls the function with each item and keeps the results; calls that an earlier attempt finished are not
        repeated.

        Args:
            phase: a name, for the person who waits and for the kept results.
            function: may be called twice with one item, if a worker dies; so it writes files under fixed names.
            items: in the order of the results.

        Raises:
            GubsError: the function raised it.
        """
        if not self.on_ray:
            return [function(item) for item in items]
        results = {i: kept for i in range(len(items)) if (kept := self._kept(phase, i)) is not None}
        missing = [i for i in range(len(items)) if i not in results]
        calls = [functools.partial(self._call, phase, i, function, items[i]) for i in missing]
        with progress(phase) as on_progress:
            for i, result in _on_ray(calls, missing):
                results[i] = (result,)
                on_progress(len(results), len(items))
        return [results[i][0] for i in range(len(items))]

    def total(self, phase: str, function: Callable[[Item], Result], items: Sequence[Item]) -> Result:
        """Adds up what the function returns for each item; for quick calls, whose results are not kept.

        Raises:
            GubsError: the function raised it.
        """
        if not self.on_ray:
            return functools.reduce(operator.add, map(function, items))
        import ray

        groups = min(len(items), int(_GROUPS_PER_CPU * max(1, ray.cluster_resources().get("CPU", 1))))
        sums = dict[int, Result]()
        with progress(phase) as on_progress:
            for i, result in _in_tasks(functools.partial(_sum, function), [items[i::groups] for i in range(groups)]):
                sums[i] = result
                on_progress(len(sums), groups)
        return functools.reduce(operator.add, (sums[i] for i in range(groups)))

    def _path(self, phase: str, number: int) -> str:
        return f"{self.folder}/{phase.replace(' ', '-')}-{number:06}.pickle"

    def _kept(self, phase: str, number: int) -> tuple[Any] | None:
        path = self._path(phase, number)
        return (pickle.loads(self.fs.cat_file(path)),) if self.fs.exists(path) else None

    def _call(self, phase: str, number: int, function: Callable[[Item], Result], item: Item) -> Result:
        result = function(item)
        self.fs.makedirs(self.folder, exist_ok=True)
        write_atomically(self.fs, self._path(phase, number), pickle.dumps(result))
        return result


def _sum(function: Callable[[Item], Result], items: Sequence[Item]) -> Result:
    return functools.reduce(operator.add, map(function, items))


def _in_tasks(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
    """Calls the function with each item in a task of its own; yields number and result of each as it ends. Quick calls
    take less than the quarter of a second that Ray Data needs to start and end.
    """
    import ray

    shared: Any = ray.put(function)  # one copy per node; the task gets the function itself
    task: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_outcome_of)
    numbers = {task.remote(shared, item): i for i, item in enumerate(items)}
    try:
        while numbers:
            [ended], _ = ray.wait(list(numbers))
            yield numbers.pop(ended), _result(ray.get(ended))
    finally:
        for left in numbers:
            ray.cancel(left)


def _on_ray(calls: Sequence[Callable[[], Result]], numbers: Sequence[int]) -> Iterator[tuple[int, Result]]:
    """Makes the calls on the cluster; yields number and result of each as it ends. A call whose worker dies is repeated
    by Ray.
    """
    import ray.data

    if not calls:
        return
    shared = ray.put(list(calls))  # one copy per node, however many calls there are

    def call(batch: pa.Table) -> pa.Table:
        own = ray.get(shared)
        rows = [(i, _outcome(own[i])) for i in batch["id"].to_pylist()]
        return pa.table({"id": [i for i, _ in rows], "outcome": pa.array([o for _, o in rows], pa.large_binary())})

    dataset = ray.data.range(len(calls), override_num_blocks=len(calls)).map_batches(
        call, batch_size=None, batch_format="pyarrow"
    )
    dataset.context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    # A pass is alone and need not reserve anything. To reserve, Ray Data first finds out what the cluster has; that
    # takes a second, in which it makes one call after the other.
    dataset.context.op_resource_reservation_enabled = False
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in cast(pa.Table, batch).to_pylist():
            yield numbers[row["id"]], _result(row["outcome"])


def _outcome_of(function: Callable[[Item], object], item: Item) -> bytes:
    return _outcome(functools.partial(function, item))


def _outcome(call: Callable[[], object]) -> bytes:
    """The pickled result, or the error that a person can fix; any other error is left to Ray."""
    pa.set_cpu_count(1)  # a call has one CPU; Arrow would start a thread for each of the node
    try:
        return pickle.dumps(call())
    except GubsError as e:
        return pickle.dumps(e)


def _result(outcome: bytes) -> Any:
    result = pickle.loads(outcome)
    if isinstance(result, GubsError):
        raise result
    return result


@contextmanager
def work(fs: fsspec.AbstractFileSystem, folder: str, on_ray: bool, settings: RaySettings) -> Iterator[Work]:
    """Joins or starts Ray, if it is to be used, until the context ends.

    Raises:
        PlatformError: a node does not see the folder.
    """
    with ExitStack() as stack:
        if on_ray:
            stack.enter_context(ray_session(settings))
            answers = _nodes_without(fs, folder)  # the nodes import Ray Data while this process does
            quiet_ray_data()
            if isinstance(fs, LocalFileSystem):
                _refuse_blind(answers, folder)
        yield Work(fs, folder, on_ray)


def _nodes_without(fs: fsspec.AbstractFileSystem, folder: str) -> "list[ray.ObjectRef[bool]]":
    """For each node with CPUs, whether it lacks the folder; nothing is asked if this is the only one. The answers come
    when the nodes' workers have imported what the first calls need.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
    if nodes == [ray.get_runtime_context().get_node_id()]:
        return []
    probe = ""
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(folder, exist_ok=True)
        fs.touch(probe := f"{folder}/probe")
    look = ray.remote(num_cpus=0)(_lacks)
    on = [look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)) for n in nodes]
    return [node.remote(probe) for node in on]


def _lacks(path: str) -> bool:
    import ray.data  # noqa: F401  # takes a second or two, while the driver does the same

    return bool(path) and not Path(path).exists()


def _refuse_blind(answers: "list[ray.ObjectRef[bool]]", folder: str) -> None:
    import ray

    if blind := sum(ray.get(answers)):
        raise PlatformError(
            f"{blind} of {len(answers)} nodes do not see {folder}: put --run on a file system that all nodes share, "
            "or at a URI"
        )


def attempt_key(*decided_by: str) -> str:
    """The key of a resumable attempt: what an attempt with another key left cannot be used."""
    return hashlib.sha256("\n".join(decided_by).encode()).hexdigest()[:16]
