"""The page about training: curves of SFT and GA-GRPO, judged policies before and after training, sample answers.

`write_page` puts `training.html` into the run's folder.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from gubs.artifacts import Artifact, Manifest, Run
from gubs.evaluate.compare import CONSTANTS, DROP, Block
from gubs.evaluate.judge import MODES
from gubs.prompts.answers import Failure
from gubs.records import Task
from gubs.report import pages
from gubs.report.charts import INK, SERIES, drawing, legend_above, whole_ticks
from gubs.ufm.advantage import MEASURED
from gubs.ufm.monitor import SAMPLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "training.html"
_SAMPLE_STEPS = (0.0, 0.5, 1.0)
"""Which of the steps with samples are shown: the first, the middle, the last."""
_SMOOTH = 20
"""The moving mean of a curve spans about one part in this many of all steps; single steps are pale behind it."""

Floats = npt.NDArray[np.float64]
Columns = dict[str, Floats]


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    column: str
    label: str
    whole: bool = False
    """In a stack: the total of the layers, drawn as a line."""


@dataclass(frozen=True)
class Panel:
    """One chart: columns of the table `steps` against the step."""

    title: str
    caption: str
    curves: tuple[Curve, ...]
    unit: str = ""
    draw: str = "lines"
    """`lines` or `stack`."""
    sparse: bool = False
    """Leave out curves that are always 0."""


@dataclass(frozen=True)
class Training:
    """One training as the page shows it."""

    manifest: Manifest
    kind: str
    figures: list[tuple[Panel, Markup]]
    samples: list[dict[str, Any]]
    seconds: float
    """Duration of all steps."""


def _roles(name: str) -> tuple[Curve, ...]:
    words = {"T": "the user (T)", "S": "a similar user (S)", "G": "the group (G)"}
    return tuple(Curve(f"{name}/{r}", words[r]) for r in words)


_PHASES = ("rollout", "reward", "reference", "check", "train", "sync", "checkpoint", "waiting_for_data")
_SECONDS = Panel(
    "Seconds per step, by phase",
    "stacked; the line is the whole step; a checkpoint's seconds count towards the step after it",
    (*(Curve(f"seconds/{p}", p.replace("_", " ")) for p in _PHASES), Curve("seconds/step", "step", whole=True)),
    "s",
    "stack",
    sparse=True,
)
_TOKENS = Panel(
    "Tokens per second",
    "of all workers: answer tokens during rollout; all tokens, padding included, during training",
    (Curve("tokens_per_second/rollout", "rollout"), Curve("tokens_per_second/train", "train")),
)
_GRAD = Panel("Gradient norm", "before clipping", (Curve("grad_norm", "norm"),))
_SFT_PANELS = (
    Panel("Loss", "mean negative log-likelihood of the teacher's tokens", (Curve("loss", "loss"),)),
    Panel(
        "Tokens predicted",
        "share of the teacher's tokens with a probability above one half",
        (Curve("accuracy", "share"),),
    ),
    _GRAD,
    _SECONDS,
    _TOKENS,
)
_GRPO_PANELS = (
    Panel(
        "Raw reward by role", "R = format + skip + choice, 0 to 3, by whose prompt is answered", _roles("reward_raw")
    ),
    Panel(
        "Parts of the reward",
        "share of answers that earn each",
        (Curve("reward/format", "format"), Curve("reward/skip", "skip or not"), Curve("reward/choice", "right option")),
    ),
    Panel("KL to the start", "per token, k3 estimator, on the policy's own answers", (Curve("health/kl", "KL"),)),
    Panel(
        "Engine against trainer",
        "mean exp|log p of vLLM - log p of the trainer|; 1 = they agree; below 1.02 (bfloat16: 1.12) is healthy",
        (Curve("health/mismatch", "mismatch"),),
    ),
    Panel("Response length", "tokens per answer", (Curve("response_tokens", "tokens"),)),
    Panel(
        "Unreadable answers",
        "share by cause; causes that never occurred are left out",
        tuple(Curve(f"unparsed/{c}", c.replace("_", " ")) for c in Failure),
        sparse=True,
    ),
    Panel("Advantage by role", "mean per step", _roles("advantage")),
    Panel(
        "What the advantage does",
        "right answers made less likely, wrong ones made more likely, groups with equal rewards",
        (
            Curve("frac_right_pushed_down", "right, pushed down"),
            Curve("frac_wrong_pushed_up", "wrong, pushed up"),
            Curve("frac_zero_variance", "equal rewards"),
        ),
    ),
    _GRAD,
    _SECONDS,
    _TOKENS,
    Panel(
        "GPU memory",
        "of the trainer: peak per step, allocated and reserved by torch; of all processes: after each step",
        tuple(Curve(f"gpu_gib/{n}", n) for n in ("peak", "reserved", "all")),
        "GiB",
    ),
)


def write_page(run: Run, blocks: Sequence[Block] = ()) -> str:
    """Writes the page into the run's folder and returns its path."""
    return pages.write(run, PAGE, render(run, blocks))


def render(run: Run, blocks: Sequence[Block] = ()) -> str:
    """The page as HTML.

    Args:
        run: its artifacts with a table `steps` are the trainings shown.
        blocks: the judged policies, from `gubs.evaluate.compare.compare`.
    """
    trainings = [training(run.artifact(s)) for s in run.stages() if "steps" in run.artifact(s).manifest.tables]
    trainings.sort(key=lambda t: t.manifest.created)
    return pages.render(
        "training",
        run=run.name,
        trainings=trainings,
        blocks=blocks,
        modes=MODES,
        constants={str(t): (*c, DROP) for t, c in CONSTANTS.items()},
        tasks={str(t): t for t in Task},
        measured=MEASURED,
    )


def training(artifact: Artifact) -> Training:
    """The curves and samples of one training."""
    table = artifact.table("steps")
    columns = {n: table[n].cast("float64").to_numpy(zero_copy_only=False) for n in table.column_names}
    grpo = "reward" in columns
    turns = len(artifact.manifest.info.get("tasks", "1"))
    figures = [(p, drawn) for p in (_GRPO_PANELS if grpo else _SFT_PANELS) if (drawn := draw(p, columns, turns))]
    seconds = float(np.nansum(columns.get("seconds/step", np.zeros(1))))
    return Training(artifact.manifest, "GA-GRPO" if grpo else "SFT", figures, samples(artifact), seconds)


def samples(artifact: Artifact) -> list[dict[str, Any]]:
    """Answers of the first, the middle and the last step with samples, one per role."""
    path = artifact.run.path(artifact.stage, SAMPLES)
    if not artifact.run.fs.exists(path):
        return []
    lines = artifact.run.fs.cat_file(path).decode(errors="replace").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    steps = sorted({r["step"] for r in rows})
    chosen = {steps[round(at * (len(steps) - 1))] for at in _SAMPLE_STEPS} if steps else set()
    return sorted((r for r in rows if r["step"] in chosen), key=lambda r: (r["step"], "TSG".find(r["role"])))


def draw(panel: Panel, columns: Columns, turns: int = 1) -> Markup | None:
    """A panel as SVG; None if there is nothing to draw.

    Args:
        panel: what to draw.
        columns: columns of the table `steps`.
        turns: number of tasks that take turns; means span whole rounds, since tasks differ.
    """
    curves = [c for c in panel.curves if c.column in columns and not np.isnan(columns[c.column]).all()]
    curves = [c for c in curves if not panel.sparse or np.nansum(columns[c.column]) > 0]
    if not curves:
        return None
    window = turns * max(1, len(columns["step"]) // _SMOOTH // turns)
    with drawing(panel.title, (5.2, 3.1)) as chart:
        _DRAW[panel.draw](chart.axes, curves, columns, window)
        _label(chart.axes, panel, len(curves))
    return chart.svg


def _lines(axes: "Axes", curves: Sequence[Curve], columns: Columns, window: int) -> None:
    for i, curve in enumerate(curves):
        steps, values = columns["step"] + 1, columns[curve.column]
        defined = ~np.isnan(values)
        steps, values = steps[defined], values[defined]
        colour, dash = SERIES[i % len(SERIES)], "-" if i < len(SERIES) else "--"
        if window > 1:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        axes.plot(steps, smooth(values, window), dash, color=colour, linewidth=1.8, label=curve.label)


def _stack(axes: "Axes", curves: Sequence[Curve], columns: Columns, window: int) -> None:
    steps = columns["step"] + 1
    drawn = [(c, smooth(np.nan_to_num(columns[c.column]), window)) for c in curves]
    layers = [(c.label, values) for c, values in drawn if not c.whole]
    colours = [SERIES[i % len(SERIES)] for i in range(len(layers))]
    labels = [label for label, _ in layers]
    axes.stackplot(steps, *(values for _, values in layers), labels=labels, colors=colours, alpha=0.8, linewidth=0)
    for curve, values in drawn:
        if curve.whole:
            axes.plot(steps, values, color=INK, linewidth=1.2, label=curve.label)


_DRAW: dict[str, Callable[["Axes", Sequence[Curve], Columns, int], None]] = {"lines": _lines, "stack": _stack}


def smooth(values: Floats, window: int) -> Floats:
    """Moving mean over `window` values around each; fewer at the ends."""
    kernel = np.ones(min(window, len(values)))
    if len(kernel) < 2:
        return values
    counts = np.convolve(np.ones(len(values)), kernel, "same")
    means: Floats = np.convolve(values, kernel, "same") / counts
    return means


def _label(axes: "Axes", panel: Panel, curves: int) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    whole_ticks(axes.xaxis, 6)
    axes.margins(x=0.01)
    if curves > 1:
        legend_above(axes)
