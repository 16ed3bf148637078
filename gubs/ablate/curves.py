"""The drawings of an ablation: the reward in training of each arm, and F1 against the level of noise."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gubs.ablate.cells import Store
from gubs.ablate.grid import Cell
from gubs.ablate.sheet import Table
from gubs.evaluate.arms import NATURAL, Result
from gubs.evaluate.judge import CALIBRATED
from gubs.records import Task
from gubs.report.training import smooth
from gubs.stages import GRPO

Floats = npt.NDArray[np.float64]


def draw_curves(cells: Sequence[Cell], store: Store, file: Path) -> None:
    """Draws the raw reward of the user's own samples against the step of the sequential task, as SVG; arms without a
    training have no line.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for level, arm in dict.fromkeys((c.level, c.arm) for c in cells if c.policy == GRPO):
        of_arm = [rewards(store, c) for c in cells if (c.level, c.arm) == (level, arm)]
        shortest = min(map(len, of_arm))
        mean = np.mean([r[:shortest] for r in of_arm], axis=0)
        label = f"{level}, {arm}" if level else arm
        axes.plot(np.arange(len(mean)) + 1, smooth(mean, max(1, len(mean) // 6)), label=label)
    axes.set_xlabel("step of the sequential task")
    axes.set_ylabel("raw reward of T")
    axes.legend(frameon=False, fontsize=8)
    with mpl.rc_context({"svg.hashsalt": "ablate"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def rewards(store: Store, cell: Cell) -> Floats:
    """Raw reward of T at the steps of the sequential task."""
    artifact = store.run(cell).artifact(GRPO)
    reward = artifact.table("steps", ["reward_raw/T"])["reward_raw/T"].to_numpy()
    tasks = np.resize(artifact.manifest.info["tasks"], len(reward))
    return np.asarray(reward[tasks == Task.SEQUENTIAL], dtype=float)


def draw_levels(tables: Sequence[Table], file: Path) -> None:
    """Draws judge F1 and reason F1 (natural mix, calibrated) of every arm against the level, as SVG, with the intervals
    over users; what needs no training is dashed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, 2), _F1.items(), strict=True):
        places = level_places([t.level for t in tables])
        for arm, results in f1_by_arm(tables, name).items():
            at = [places[level] for level in results]
            value, low, high = np.array([(100 * r.value, 100 * r.low, 100 * r.high) for r in results.values()]).T
            bar = next(iter(results.values())).bar
            style = {"linestyle": "--", "alpha": 0.6} if bar else {}
            axes.errorbar(at, value, np.nan_to_num([value - low, high - value]), label=arm, capsize=2, **style)
        axes.set_xticks(list(places.values()), list(places))
        axes.set_xlabel("level")
        axes.set_ylabel(f"{label}, %")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, loc="outside right upper")
    with mpl.rc_context({"svg.hashsalt": "ablate"}):
        figure.savefig(file, format="svg", metadata={"Date": None})


_F1 = {"judge_f1": "judge F1", "reason_f1": "reason F1"}


def level_places(levels: Sequence[str]) -> dict[str, float]:
    """Where each level stands on the axis: at the number it begins with, or one after the other."""
    numbers = [re.match(r"[\d.]+", level) for level in levels]
    return {
        level: float(n[0] if n and all(numbers) else k)
        for k, (level, n) in enumerate(zip(levels, numbers, strict=True))
    }


def f1_by_arm(tables: Sequence[Table], name: str) -> dict[str, dict[str, Result]]:
    """Arm -> level -> the result in one measure (natural mix, calibrated)."""
    results: dict[str, dict[str, Result]] = {}
    for table in tables:
        for result in table.comparison.results:
            measure = result.measure
            if (measure.name, measure.mix, measure.mode) == (name, NATURAL, CALIBRATED):
                results.setdefault(result.arm, {})[table.level] = result
    return results
