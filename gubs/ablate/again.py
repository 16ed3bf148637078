"""Finished policies of an ablation, asked again with changed prompts: `gubs ablate order`.

Nothing is trained. Each finished cell gets the stage `sensitivity` of its policy, in its own folder, and an arm's
figures pool the answers of its cells, as in every other ablation: each user with the answers of all trainings.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gubs import stages
from gubs.ablate.cells import Store, make_in_cell, standing
from gubs.ablate.grid import Cell, find_grid
from gubs.ablate.sheet import store_tables
from gubs.artifacts import Artifact, JsonObject
from gubs.console import say
from gubs.errors import ArtifactError
from gubs.evaluate.conditions import Condition
from gubs.evaluate.sensitivity import STAGE_PREFIX, figures, verdicts
from gubs.evaluate.sheets import SENSITIVITY_COLUMNS, Sheet, SheetRow, sensitivity_cells
from gubs.ray_runtime import ray_session
from gubs.stages import Status

Row = dict[str, Any]
_COLUMNS = (*("interaction_id", "task", "condition", "user_id", "gold", "play_rate", "clicked", "predicted", "skip"),)


@dataclass(frozen=True)
class Asked:
    """What came of it."""

    figures: list[Row]
    """As those of `gubs.evaluate.sensitivity`, with the arm and the number of its policies."""
    verdicts: list[Row]
    """The same; Holm's correction is over the conditions of an arm and task."""
    cells: list[Cell]

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return {"figures": self.figures, "verdicts": self.verdicts, "cells": [c.name for c in self.cells]}


def finished(name: str, chosen: Sequence[Cell], store: Store) -> list[Cell]:
    """The cells whose policies are there; says how many are not.

    Raises:
        ArtifactError: none is.
    """
    cells, of = [c for c in chosen if standing(c, store).status is Status.CURRENT], find_grid(name).of
    if not cells:
        raise ArtifactError(f"{store.folder.uri} has no finished policy to ask again: `gubs ablate {of}` trains them")
    if left := len(chosen) - len(cells):
        say(f"[ablate] {left} of {len(chosen)} policies are left out: they are not finished (`gubs ablate {of}`)")
    return cells


def ask_again(name: str, cells: Sequence[Cell], store: Store, make: Callable[..., None] = stages.make) -> Asked:
    """Asks finished policies under the conditions of an ablation.

    Args:
        name: of the ablation.
        cells: finished ones.
        store: of the folder.
        make: see `stages.make`.

    Raises:
        StaleError: they were asked with other settings, or their data have changed. Others: see `stages.make`.
    """
    with ray_session(cells[0].settings.ray):
        for number, cell in enumerate(cells, 1):
            say(f"[ablate] {number} of {len(cells)}: {cell.name} ...")
            make_in_cell(stage_of(cell), cell, store, make)
    conditions = (Condition.OWN, *find_grid(name).conditions)
    fine = {"resamples": cells[0].settings.evaluate.bootstrap, "seed": 0}
    asked = Asked([], [], list(cells))
    for arm in dict.fromkeys(c.arm for c in cells):
        of_arm = [c for c in cells if c.arm == arm]
        rows = [row for cell in of_arm for row in _answers(cell, store) if row["condition"] in conditions]
        about = {"arm": arm, "policies": len(of_arm)}
        asked.figures.extend(about | f for f in figures(rows, **fine))
        asked.verdicts.extend(about | v for v in verdicts(rows, **fine))
    return asked


def stage_of(cell: Cell) -> str:
    """The stage with the answers to changed prompts."""
    return f"{STAGE_PREFIX}{cell.policy}"


def _answers(cell: Cell, store: Store) -> Iterator[Row]:
    """A cell's answers; users are told apart by world, targets by world and training."""
    for row in store.run(cell).artifact(stage_of(cell)).table("answers", list(_COLUMNS)).to_pylist():
        target, user = f"{cell.world} {cell.seed} {row['interaction_id']}", f"{cell.world} {row['user_id']}"
        yield row | {"interaction_id": target, "user_id": user}


def write_again(name: str, asked: Asked, store: Store) -> Artifact:
    """Stores the tables as `ablate-NAME` in the folder: figures and verdicts."""
    tables = {"figures": asked.figures, "verdicts": asked.verdicts}
    targets = [(cell, stage_of(cell)) for cell in asked.cells]
    return store_tables(name, targets, tables, f"{len(asked.cells)} policies asked again", store)


def sheets_again(name: str, asked: Asked) -> Iterator[Sheet]:
    """One sheet per task: every arm, as it is asked and under each condition."""
    grid = find_grid(name)
    for task in dict.fromkeys(f["task"] for f in asked.figures):
        of_task = [f for f in asked.figures if f["task"] == task]
        rows = []
        for arm, condition in dict.fromkeys((f["arm"], f["condition"]) for f in of_task):
            named = {f["name"]: f for f in of_task if (f["arm"], f["condition"]) == (arm, condition)}
            own = [v for v in asked.verdicts if (v["task"], v["arm"], v["first"]) == (task, arm, condition)]
            rows.append(SheetRow(f"{arm}, {condition}", sensitivity_cells(task, named, own[0] if own else None)))
        least = max((v["detectable"] for v in asked.verdicts if v["task"] == task), default=float("nan"))
        notes = [
            "against the own prompt: balanced accuracy in points on the same targets, paired by user; 5 %, Holm over "
            f"an arm's conditions; up to {100 * least:.1f} points go unnoticed",
            f"policies: {', '.join(c.name for c in asked.cells)}",
            grid.about,
        ]
        yield Sheet(f"{name}, {grid.title}: {task}; %", SENSITIVITY_COLUMNS, rows, notes)
