"""The tables of an ablation: as an artifact of the folder, and as sheets of text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from gubs import stages
from gubs.ablate.cells import Store
from gubs.ablate.grid import Cell, Pair, find_grid, first_cells
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
from gubs.evaluate.judge import PREDICTIONS, Row, decided_again
from gubs.evaluate.sheets import Sheet, SheetRow
from gubs.evaluate.verdicts import Word
from gubs.ufm.advantage import MEASURED

_COLUMNS = [name for name in PREDICTIONS.names if name != "answer"]


@dataclass(frozen=True)
class Table:
    """The comparison of all arms at one level."""

    level: str
    comparison: Comparison
    cells: Sequence[Cell]

    def to_json(self) -> JsonObject:
        """As plain JSON."""
        return {
            "level": self.level,
            "figures": [{**r.to_row(), "cells": _by_cell(r)} for r in self.comparison.results],
            "differences": [d.to_row() for d in self.comparison.differences],
        }


def tables(cells: Sequence[Cell], store: Store) -> list[Table]:
    """One table per level, from the cells' evaluations and the bars of their worlds.

    Raises:
        MissingArtifactError: a cell is not finished. ArtifactError: see `compare_arms`.
    """
    return [
        _level(level, [c for c in cells if c.level == level], store) for level in dict.fromkeys(c.level for c in cells)
    ]


def _level(level: str, cells: Sequence[Cell], store: Store) -> Table:
    first, pairs = first_cells(cells), find_grid(cells[0].grid).pairs
    arms: dict[str, dict[Key, Answers]] = {}
    bars: dict[str, dict[Key, Answers]] = {}
    for cell in cells:
        rows = _rows(cell, store)
        arms.setdefault(cell.arm, {})[cell.world, cell.seed] = read_answers(rows)
        if cell in first:
            for name, answers in (constant_answers(rows) | bar_answers(rows, _bars(cell, store))).items():
                bars.setdefault(name, {})[cell.world, cell.seed] = read_answers(answers)
    resamples = cells[0].settings.evaluate.bootstrap
    chosen = [(p.first, p.second) for p in pairs if {p.first, p.second} <= set(arms)]
    return Table(level, compare_arms(arms, bars, resamples=resamples, seed=0, pairs=chosen), cells)


def _bars(cell: Cell, store: Store) -> dict[str, dict[str, Row]]:
    """Bar that chooses options -> interaction -> what it answered."""
    artifact, answers = store.run(cell).artifact(BARS), dict[str, dict[str, Row]]()
    wanted = {name for facts in artifact.manifest.info.values() for name in facts["by_reward"]}
    for row in artifact.table("predictions", ["method", "interaction_id", "predicted", "score"]).to_pylist():
        if row["method"] in wanted:
            answers.setdefault(row["method"], {})[row["interaction_id"]] = row
    return answers


def _rows(cell: Cell, store: Store) -> list[Row]:
    """A cell's answers; the filter's as it decides today."""
    artifact = store.run(cell).artifact(cell.target)
    rows: list[Row] = artifact.table("predictions", _COLUMNS).to_pylist()
    if artifact.manifest.recipe.version < stages.stage(cell.target, cell.settings).version:
        rows = decided_again(rows, artifact.table("held_out").to_pylist(), cell.settings.evaluate.decision)
    return rows


def write(name: str, made: Sequence[Table], store: Store) -> Artifact:
    """Stores the tables as `ablate-NAME` in the folder: figures, their cells, and differences."""
    figures, by_cell, differences = [], [], []
    for table in made:
        level = {"level": table.level}
        figures += [level | r.to_row() for r in table.comparison.results]
        by_cell += [level | row for r in table.comparison.results for row in _by_cell(r)]
        differences += [level | d.to_row() for d in table.comparison.differences]
    cells = [c for t in made for c in t.cells]
    summary = f"{len(cells)} policies, {len(differences)} comparisons"
    tables = {"figures": figures, "cells": by_cell, "differences": differences}
    return store_tables(name, [(c, c.target) for c in cells], tables, summary, store)


def store_tables(
    name: str, targets: Sequence[tuple[Cell, str]], tables: Mapping[str, Sequence[Row]], summary: str, store: Store
) -> Artifact:
    """Stores an ablation's tables as `ablate-NAME` in the folder.

    Args:
        name: of the ablation.
        targets: cells, each with the stage of it that the tables are made from.
        tables: rows by name.
        summary: in one line.
        store: of the folder.
    """
    inputs = {f"{c.name}/{target}": store.run(c).artifact(target).content for c, target in targets}
    stage, grid, cells = f"ablate-{name}", find_grid(name), [c for c, _ in targets]
    settings = cells[0].settings.model_dump(mode="json")
    with writing(store.folder, stage, recipe=Recipe(inputs=inputs), settings=settings, kind="ablate") as out:
        for kind, rows in tables.items():
            empty = pa.table({"level": pa.array([], pa.string())})
            out.write_table(kind, pa.Table.from_pylist(list(rows)) if rows else empty)
        out.info = {"title": grid.title, "grid": grid.model_dump(mode="json"), "cells": [c.name for c in cells]}
        out.summary = summary
    return store.folder.artifact(stage)


def _by_cell(result: Result) -> list[JsonObject]:
    about = {"measure": result.measure.key, "arm": result.arm}
    return [{**about, "world": w, "seed": s, "value": v} for (w, s), v in result.cells.items()]


def sheets(name: str, made: Sequence[Table]) -> Iterator[Sheet]:
    """Two sheets per level: figures with intervals over users and what was compared; and the spread over seeds."""
    for table in made:
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
    notes += _of_pairs(grid.pairs, table.comparison.differences)
    notes += [f"rule `{rule}`: {MEASURED[rule]}" for rule in _rules(table.cells) if rule in MEASURED]
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
    """One line per measure and arm that others are compared with: which are better and worse, and of which nothing can
    be told.
    """
    words: Mapping[Word, str] = {Word.BETTER: "better", Word.WORSE: "worse", Word.UNKNOWN: "cannot tell"}
    for measure, second in dict.fromkeys((d.measure, d.verdict.second) for d in differences):
        own = [d for d in differences if (d.measure, d.verdict.second) == (measure, second)]
        parts = []
        for word, phrase in words.items():
            named = [d for d in own if d.verdict.word is word]
            listed = ", ".join(f"{d.verdict.first} {d.verdict.difference:+.3f} ({d.agree}/{d.cells})" for d in named)
            parts += [f"{phrase}: {listed}"] if named else []
        least = max(d.verdict.detectable for d in own)
        about = f"{measure.label}, against {second}"
        yield f"{about}: {'; '.join(parts)} (sign flips by user, Holm; detectable {least:.3f})"


def _of_pairs(pairs: Sequence[Pair], differences: Sequence[Difference]) -> Iterator[str]:
    """What follows from each pair: in which measures the first is better, else what its grid says `otherwise`."""
    for pair in (p for p in pairs if p.otherwise):
        own = [d for d in differences if (d.verdict.first, d.verdict.second) == (pair.first, pair.second)]
        better = [f"{d.measure.label} {d.verdict.difference:+.3f}" for d in own if d.verdict.word is Word.BETTER]
        if better:
            yield f"{pair.first} is better than {pair.second} in {', '.join(better)}"
        elif own:
            least = ", ".join(f"{d.measure.label} {d.verdict.detectable:.3f}" for d in own)
            yield f"{pair.first} is better than {pair.second} in no measure (detectable: {least}): {pair.otherwise}"


def _rules(cells: Sequence[Cell]) -> list[str]:
    """The advantage rules by which cells were trained with groups."""
    grouped = [c.settings.ufm.grpo for c in cells if c.policy == stages.GRPO and c.settings.ufm.grpo.groups]
    return list(dict.fromkeys(grpo.advantage.rule for grpo in grouped))


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
