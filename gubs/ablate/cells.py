"""Making cells: each has a run folder of its own, in which stages that another cell has made already are links.

Two cells share a stage exactly if its recipe is the same: the same inputs, settings, prompts. So data, frames, groups
and SFT are made once for all arms that do not touch them, and a policy that two ablations have in common is trained
once. What is finished is never made again; a training that was killed resumes. Only baselines that an earlier version
of gubs made are made anew, since they cost little; evaluations of an earlier version count if their answers still do.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from gubs import prompts, stages
from gubs.ablate.grid import Cell
from gubs.artifacts import Run, fingerprint, write_atomically
from gubs.errors import InputError, MissingArtifactError, SettingsError
from gubs.evaluate.bars import BARS
from gubs.evaluate.judge import SAME_ANSWERS_SINCE
from gubs.stages import Graph, State, Status

CELLS = "cells"
_TIMES = "seconds.json"
"""In a cell's folder: stage -> the seconds that it took here."""

Made = tuple[str, str]
"""Kind of a stage, and the fingerprint of its recipe."""


class Store:
    """The stages that the cells of a folder have, by their recipe."""

    def __init__(self, folder: Run):
        """Looks at all cells of the folder, and at the folder itself, which may be a run.

        Raises:
            SettingsError: it is not a local path.
        """
        if "://" in folder.uri and not folder.uri.startswith("file://"):
            raise SettingsError(f"--run {folder.uri}: ablations need a path that all workers see, not a URI")
        self.folder = folder
        self._places: dict[Made, Path] = {}
        for run in (folder, *self._runs()):
            self.add(run)

    def run(self, cell: Cell) -> Run:
        """The run folder of a cell."""
        return Run(self.folder.path(CELLS, cell.name))

    def add(self, run: Run) -> None:
        """Notes the finished stages of a run."""
        for name in run.stages():
            manifest = run.artifact(name).manifest
            self._places.setdefault((manifest.kind, manifest.fingerprint), Path(run.path(name)).resolve())

    def link(self, run: Run, graph: Graph) -> None:
        """Puts links for missing stages that were made elsewhere from the same recipe."""
        for name in graph.order:
            node = graph.stages[name]
            if run.has(name):
                continue
            try:
                recipe = graph.recipe(node)
            except (MissingArtifactError, InputError):
                continue  # an input is to be made first
            kind = node.kind or node.name
            place = self._places.get((kind, recipe.fingerprint(kind)))
            if place and place.name == name:
                Path(run.root).mkdir(parents=True, exist_ok=True)
                Path(run.path(name)).symlink_to(os.path.relpath(place, Path(run.root).resolve()))

    def seconds(self) -> dict[str, float]:
        """Stage -> mean of the seconds that it took in the cells of the folder."""
        taken = defaultdict[str, list[float]](list)
        for run in self._runs():
            for name, value in _times(run).items():
                taken[name].append(value)
        return {name: fmean(values) for name, values in taken.items()}

    def _runs(self) -> Iterator[Run]:
        for path in sorted(Path(self.folder.path(CELLS)).glob("*/*")):
            if path.is_dir():
                yield Run(path)


def make_cell(cell: Cell, store: Store, make: Callable[..., None] = stages.make) -> None:
    """Makes what a cell still lacks.

    Args:
        cell: the cell.
        store: of the folder.
        make: see `stages.make`.

    Raises:
        StaleError: the cell was made with other settings. Others: see `stages.make`.
    """
    make_in_cell(cell.target, cell, store, make)


def has_bars(cell: Cell, store: Store) -> bool:
    """Whether a cell has the baselines of its world, made from what is there now."""
    return Graph([BARS], store.run(cell), cell.settings).state(BARS).status is Status.CURRENT


def make_bars(cell: Cell, store: Store, make: Callable[..., None] = stages.make) -> None:
    """Makes the baselines of a cell's world in the cell, those of an earlier version anew; see `make_cell`."""
    run = store.run(cell)
    graph = Graph([BARS], run, cell.settings)
    again = _is_of_earlier_version(graph, graph.state(BARS))
    if again and Path(run.path(BARS)).is_symlink():
        Path(run.path(BARS)).unlink()  # what it leads to is another cell's
        again = False
    make_in_cell(BARS, cell, store, make, force=again)


def make_in_cell(
    target: str, cell: Cell, store: Store, make: Callable[..., None] = stages.make, *, force: bool = False
) -> None:
    """Makes a stage in the folder of a cell, with links to what other cells have made; see `make_cell`."""
    run = store.run(cell)
    store.link(run, Graph([target], run, cell.settings))
    times = _times(run)

    def note(name: str, seconds: float) -> None:
        data = json.dumps(times | {name: round(seconds, 1)}).encode()
        write_atomically(run.fs, run.path(_TIMES), data)
        times[name] = round(seconds, 1)

    make([target], run, cell.settings, on_made=note, force=force)
    store.add(run)


def _is_of_earlier_version(graph: Graph, state: State) -> bool:
    """Whether a stage is stale for no other reason than that an earlier version of gubs made it."""
    if state.status is not Status.STALE or state.manifest is None:
        return False
    before = state.manifest.recipe
    return not before.model_copy(update={"version": state.stage.version}).changes(graph.recipe(state.stage, before))


def _counts(graph: Graph, state: State) -> bool:
    """Whether a stage that is stale can be used as it is: an evaluation whose answers are those of today."""
    return (
        state.manifest is not None
        and state.manifest.kind == stages.ABOUT_POLICY[stages.EVALUATION]
        and state.manifest.recipe.version >= SAME_ANSWERS_SINCE
        and _is_of_earlier_version(graph, state)
    )


@dataclass(frozen=True)
class Standing:
    """How far a cell is."""

    cell: Cell
    status: Status
    reason: str = ""
    """Why it is stale."""
    missing: tuple[str, ...] = ()
    """Stages that it lacks, in order."""


def standing(cell: Cell, store: Store) -> Standing:
    """Looks at a cell; makes nothing, links nothing."""
    run = store.run(cell)
    graph = Graph([cell.target], run, cell.settings)
    states = [graph.state(name) for name in graph.order]
    stale = next((s for s in states if s.status is Status.STALE and not _counts(graph, s)), None)
    if stale:
        return Standing(cell, Status.STALE, f"{stale.stage.name}: {stale.reason}")
    missing = tuple(s.stage.name for s in states if s.status is Status.MISSING)
    return Standing(cell, Status.MISSING if missing else Status.CURRENT, missing=missing)


def to_make(standings: Sequence[Standing], store: Store) -> dict[str, int]:
    """How often each stage is still to be made, with what cells share counted once.

    What a cell of *another* ablation in the folder has is counted too, since only making shows that it fits.
    """
    had: set[str] = set()
    lacking: dict[str, str] = {}
    for s in standings:
        graph = Graph([s.cell.target], store.run(s.cell), s.cell.settings)
        keys: dict[str, str] = {}
        for name in graph.order:
            keys[name] = _key(graph, name, keys)
            if name in s.missing:
                lacking[keys[name]] = name
            else:
                had.add(keys[name])
    counts: dict[str, int] = {}
    for key, name in lacking.items():
        if key not in had:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _key(graph: Graph, name: str, before: Mapping[str, str]) -> str:
    """What decides a stage, as far as settings tell: two stages with one key will have one recipe."""
    node = graph.stages[name]
    inputs = [before[n] for n in graph.inputs(node)]
    asked = prompts.hashes(node.prompts) if node.asks(graph.settings) else {}
    return fingerprint(name, [stages.settings_of(node, graph.settings), inputs, asked, node.version])


def estimate(counts: Mapping[str, int], seconds: Mapping[str, float]) -> tuple[float, list[str]]:
    """Seconds that so many stages will take by what they took before, and the stages of which nothing is known."""
    foreseen = sum(n * seconds[name] for name, n in counts.items() if name in seconds)
    return foreseen, [name for name in counts if name not in seconds]


def _times(run: Run) -> dict[str, float]:
    path = run.path(_TIMES)
    return dict(json.loads(run.fs.cat_file(path))) if run.fs.exists(path) else {}


def unfinished(standings: Iterable[Standing]) -> list[Standing]:
    """Those that are not finished."""
    return [s for s in standings if s.status is not Status.CURRENT]
