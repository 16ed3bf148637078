"""`gubs ablate`: makes the cells of an ablation one after another, and shows what the arms are worth."""

import time
from collections.abc import Sequence
from pathlib import Path

from gubs.ablate.again import ask_again, finished, sheets_again, write_again
from gubs.ablate.cells import Standing, Store, estimate, has_bars, make_bars, make_cell, standing, to_make, unfinished
from gubs.ablate.curves import draw_curves, draw_levels
from gubs.ablate.grid import Cell, Choice, cells, find_grid, first_cells, grids
from gubs.ablate.sheet import Table, sheets, tables, write
from gubs.artifacts import Run
from gubs.console import print_json, print_line, say
from gubs.evaluate.sheets import print_sheet
from gubs.ray_runtime import ray_session
from gubs.stages import GRPO, StaleError


def list_grids() -> None:
    """Prints the ablations and their arms."""
    for name, grid in grids().items():
        levels = f"; each at {', '.join(grid.levels)}" if any(grid.levels) else ""
        arms = f"the finished policies of {grid.of} are asked again" if grid.of else " | ".join(grid.arms)
        print_line(f"{name:<7} {grid.title}: {arms}{levels}")


def ablate(
    name: str,
    folder: Run,
    choice: Choice,
    preset: str,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    as_json: bool = False,
) -> None:
    """Makes what an ablation lacks, stores its tables and prints them.

    Args:
        name: of the ablation.
        folder: of all cells; what other ablations made there is used.
        choice: which cells.
        preset: see `load_settings`.
        overrides: of the user, as `key=value`.
        dry_run: only say which cells are finished, and what the others will take.
        as_json: print JSON.

    Raises:
        SettingsError: see `cells`. StaleError: a cell was made with other settings. Others: see `stages.make`.
    """
    chosen = cells(name, choice, preset, overrides)
    store = Store(folder)
    if find_grid(name).of:
        _ask_again(name, finished(name, chosen, store), store, dry_run=dry_run, as_json=as_json)
        return
    if dry_run:
        _foresee(chosen, store, as_json=as_json)
        return
    _make_all(chosen, store)
    made = tables(chosen, store)
    artifact = write(name, made, store)
    _draw(chosen, made, store, Path(folder.path(artifact.stage)))
    if as_json:
        print_json([t.to_json() for t in made])
    else:
        for sheet in sheets(name, made):
            print_sheet(sheet)
    say(f"[table]  {artifact.uri}: {artifact.manifest.summary}")


def _draw(chosen: Sequence[Cell], made: Sequence[Table], store: Store, folder: Path) -> None:
    if any(c.policy == GRPO for c in chosen):
        draw_curves(chosen, store, folder / "curves.svg")
    if len(made) > 1:
        draw_levels(made, folder / "levels.svg")


def _ask_again(name: str, chosen: Sequence[Cell], store: Store, *, dry_run: bool, as_json: bool) -> None:
    if dry_run:
        for cell in chosen:
            print_line(f"{cell.name:<44} is asked again")
        return
    asked = ask_again(name, chosen, store)
    artifact = write_again(name, asked, store)
    if as_json:
        print_json(asked.to_json())
    else:
        for sheet in sheets_again(name, asked):
            print_sheet(sheet)
    say(f"[table]  {artifact.uri}: {artifact.manifest.summary}")


def _make_all(chosen: Sequence[Cell], store: Store) -> None:
    """The cells one after another: two trainings side by side on few cores take many times as long."""
    standings = [standing(c, store) for c in chosen]
    for s in standings:
        if s.reason:
            raise StaleError(
                f"{store.run(s.cell).uri} was made with other settings: {s.reason}. Give those again, or use another "
                "--run"
            )
    left = unfinished(standings)
    say(f"[ablate] {len(chosen)} cells, {len(chosen) - len(left)} of them finished")
    without_bars = [c for c in first_cells(chosen) if not has_bars(c, store)]
    if not left and not without_bars:
        return
    with ray_session(chosen[0].settings.ray):
        for number, s in enumerate(left, 1):
            began = time.monotonic()
            say(f"[ablate] {number} of {len(left)}: {s.cell.name} ...")
            make_cell(s.cell, store)
            say(f"[ablate] {s.cell.name}: done in {time.monotonic() - began:.0f} s")
        for cell in without_bars:
            make_bars(cell, store)


def _foresee(chosen: Sequence[Cell], store: Store, *, as_json: bool) -> None:
    standings = [standing(c, store) for c in chosen]
    counts = to_make([s for s in standings if not s.reason], store)
    seconds, unknown = estimate(counts, store.seconds())
    if as_json:
        listed = [
            {"cell": s.cell.name, "status": str(s.status), "missing": s.missing, "why": s.reason} for s in standings
        ]
        print_json({"cells": listed, "to_make": counts, "seconds": seconds, "unknown": unknown})
        return
    for s in standings:
        print_line(f"{s.cell.name:<44} {_in_words(s)}")
    print_line(f"{len(unfinished(standings))} of {len(standings)} cells are unfinished")
    if counts:
        print_line("to make: " + ", ".join(f"{n} {stage}" for stage, n in counts.items()))
        print_line(
            f"about {seconds / 3600:.1f} h by what finished cells took" if seconds else "no cell has taken any time yet"
        )
        if unknown and seconds:
            print_line(f"not counted, since none was made here yet: {', '.join(unknown)}")


def _in_words(s: Standing) -> str:
    if s.reason:
        return f"stale    {s.reason}"
    return f"missing  {', '.join(s.missing[-3:])}" if s.missing else "finished"
