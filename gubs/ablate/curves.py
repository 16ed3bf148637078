"""The reward in training of each arm: one line an arm, the mean over its cells."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gubs.ablate.cells import Store
from gubs.ablate.grid import Cell
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
        mine = [rewards(store, c) for c in cells if (c.level, c.arm) == (level, arm)]
        shortest = min(map(len, mine))
        mean = np.mean([r[:shortest] for r in mine], axis=0)
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
