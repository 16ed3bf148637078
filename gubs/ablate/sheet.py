"""The tables of an ablation: as an artifact of the folder, and as sheets of text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gubs.ablate.cells import Store
from gubs.ablate.grid import Cell, find_grid, first_cells
from gubs.artifacts import Artifact, JsonObject, Recipe, writing
from gubs.evaluate.arms import (
    REWARD,
    Answers,
    Comparison,
    Difference,
    Key,
    Result,
    bar_answers,
    compare_arms,
    constant_answers,
    read_answers,
)
from gubs.evaluate.bars import BARS
from gubs.evaluate.judge import PREDICTIONS, Row
from gubs.evaluate.sheets import Sheet, SheetRow
from gubs.evaluate.verdicts import Word

_COLUMNS = [name for name in PREDICTIONS.names if name != "answer"]


@dataclass(frozen=True)
class Table:
    """The comparison of all arms at one level."""

    level: str
    comparison: Comparison
    cells: Sequence[Cell]

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        found = self.comparison
        return {
            "level": self.level,
            "figures": [{**r.to_row(), "cells": _by_cell(r)} for r in found.results],
            "differences": [d.to_row() for d in found.differences],
        }


def tables(cells: Sequence[Cell], store: Store) -> list[Table]:
    """One table per level, from the cells' evaluations and the bars of their worlds.

    Raises:
        MissingArtifactError: a cell is not finished. ArtifactError: see `compare_arms`.
    """
    found = []
    for level in dict.fromkeys(c.level for c in cells):
        mine = [c for c in cells if c.level == level]
        first = first_cells(mine)
        arms: dict[str, dict[Key, Answers]] = {}
        bars: dict[str, dict[Key, Answers]] = {}
        for cell in mine:
            rows = _rows(cell, store)
            arms.setdefault(cell.arm, {})[cell.world, cell.seed] = read_answers(rows)
            if cell in first:
                for name, said in (constant_answers(rows) | bar_answers(rows, _bars(cell, store))).items():
                    bars.setdefault(name, {})[cell.world, cell.seed] = read_answers(said)
        resamples = mine[0].settings.evaluate.bootstrap
        found.append(Table(level, compare_arms(arms, bars, resamples=resamples, seed=0), mine))
    return found


def _bars(cell: Cell, store: Store) -> dict[str, dict[str, Row]]:
    """Bar that chooses options -> interaction -> what it said."""
    artifact, found = store.run(cell).artifact(BARS), dict[str, dict[str, Row]]()
    wanted = {name for facts in artifact.manifest.info.values() for name in facts["by_reward"]}
    for row in artifact.table("predictions", ["method", "interaction_id", "predicted", "score"]).to_pylist():
        if row["method"] in wanted:
            found.setdefault(row["method"], {})[row["interaction_id"]] = row
    return found


def _rows(cell: Cell, store: Store) -> list[Row]:
    rows: list[Row] = store.run(cell).artifact(cell.target).table("predictions", _COLUMNS).to_pylist()
    return rows


def write(name: str, found: Sequence[Table], store: Store) -> Artifact:
    """Stores the tables as `ablate-NAME` in the folder: figures, their cells, and differences."""
    figures, by_cell, differences = [], [], []
    for table in found:
        level = {"level": table.level}
        figures += [level | r.to_row() for r in table.comparison.results]
        by_cell += [level | row for r in table.comparison.results for row in _by_cell(r)]
        differences += [level | d.to_row() for d in table.comparison.differences]
    cells = [c for t in found for c in t.cells]
    inputs = {f"{c.name}/{c.target}": store.run(c).artifact(c.target).content for c in cells}
    stage, grid = f"ablate-{name}", find_grid(name)
    settings = cells[0].settings.model_dump(mode="json")
    with writing(store.folder, stage, recipe=Recipe(inputs=inputs), settings=settings, kind="ablate") as out:
        for kind, rows in (("figures", figures), ("cells", by_cell), ("differences", differences)):
            out.write_table(
                kind, pa.Table.from_pylist(rows) if rows else pa.table({"level": pa.array([], pa.string())})
            )
        out.info = {"title": grid.title, "grid": grid.model_dump(mode="json"), "cells": [c.name for c in cells]}
        out.summary = f"{len(cells)} policies, {len(differences)} comparisons"
    return store.folder.artifact(stage)


def _by_cell(result: Result) -> list[JsonObject]:
    about = {"measure": result.measure.key, "arm": result.arm}
    return [{**about, "world": w, "seed": s, "value": v} for (w, s), v in result.cells.items()]


def sheets(name: str, found: Sequence[Table]) -> Iterator[Sheet]:
    """Two sheets per level: figures with intervals over users and what was compared; and the spread over seeds."""
    for table in found:
        yield _figures(name, table)
        if any(len(r.cells) > 1 for r in table.comparison.results):
            yield _spread(table)


def _figures(name: str, table: Table) -> Sheet:
    grid, results = find_grid(name), table.comparison.results
    worlds, seeds = (sorted({getattr(c, what) for c in table.cells}) for what in ("world", "seed"))
    title = f"{name}, {grid.title}{f', {table.level}' if table.level else ''}: "
    title += f"worlds {_list(worlds)}, trainings {_list(seeds)} each, {results[0].users:,} test users in all"
    notes = ["± half the width of the 95 % interval over users, each with the answers of all trainings"]
    notes += _verdicts(table.comparison.differences)
    notes += [grid.about] if grid.about else []
    return Sheet(title, _labels(results), list(_rows_of(results, _figure)), notes)


def _spread(table: Table) -> Sheet:
    results = [r for r in table.comparison.results if not r.bar]
    title = "The same: standard deviation over the trainings of a world / over the worlds' means"
    return Sheet(title, _labels(results), list(_rows_of(results, _deviations)), [])


def _rows_of(results: Sequence[Result], show: Any) -> Iterator[SheetRow]:
    measures = list(dict.fromkeys(r.measure for r in results))
    by_place = {(r.arm, r.measure): r for r in results}
    for arm, bar in dict.fromkeys((r.arm, r.bar) for r in results):
        cells = [show(by_place[arm, m]) if (arm, m) in by_place else "–" for m in measures]
        yield SheetRow(arm, cells, faint=bar)


def _labels(results: Sequence[Result]) -> list[str]:
    return [m.label for m in dict.fromkeys(r.measure for r in results)]


def _figure(result: Result) -> str:
    half = (result.high - result.low) / 2
    return _number(result, result.value) + ("" if math.isnan(half) else f" ±{_number(result, half)}")


def _deviations(result: Result) -> str:
    return f"{_number(result, result.seeds)} / {_number(result, result.worlds)}"


def _number(result: Result, value: float) -> str:
    """Rewards as they are, all else in per cent."""
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if result.measure.name == REWARD else f"{100 * value:.1f}"


def _verdicts(differences: Sequence[Difference]) -> Iterator[str]:
    """One line per measure: which arms are better and worse than the first one, and of which nothing can be told."""
    words: Mapping[Word, str] = {Word.BETTER: "better", Word.WORSE: "worse", Word.UNKNOWN: "cannot tell"}
    for measure in dict.fromkeys(d.measure for d in differences):
        mine = [d for d in differences if d.measure == measure]
        parts = []
        for word, said in words.items():
            named = [d for d in mine if d.verdict.word is word]
            listed = ", ".join(f"{d.verdict.first} {d.verdict.difference:+.3f} ({d.agree}/{d.cells})" for d in named)
            parts += [f"{said}: {listed}"] if named else []
        least = max(d.verdict.detectable for d in mine)
        about = f"{measure.label}, against {mine[0].verdict.second}"
        yield f"{about}: {'; '.join(parts)} (sign flips by user, Holm; detectable {least:.3f})"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
