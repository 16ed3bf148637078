"""The page about the evaluation: the paper's tables with every baseline beside them, curves, verdicts, the manifest.

`write_page` puts `evaluation.html` into the run's folder. It reads stored predictions and figures only, so it can be
made again offline, from the artifacts alone.
"""

from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from gubs.artifacts import Run
from gubs.errors import ArtifactError
from gubs.evaluate.sheets import Sheet, ifvr_sheets, public_sheets, ranking_sheet
from gubs.evaluate.table import Table
from gubs.records import Task
from gubs.report import pages
from gubs.report.charts import SERIES, drawing, legend_above

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "evaluation.html"
_CURVES, _POLICIES = 6, 4
"""Most curves in a chart, and most of them that are of policies."""


def write_page(run: Run, tables: list[Table]) -> str:
    """Writes the page and returns its path.

    Args:
        run: with any of the artifacts `public`, `simulated`, `ranking`.
        tables: of IF-VR, if there are any.

    Raises:
        ArtifactError: there is nothing to show.
    """
    sheets = sheets_of(run, tables)
    if not sheets:
        raise ArtifactError(f"{run.uri} has nothing evaluated yet: run `gubs evaluate ifvr` or `gubs evaluate public`")
    manifest: dict[str, Any] = run.artifact("candidates").manifest.info if run.has("candidates") else {}
    curves = [(t.task, kept_chart(t)) for t in tables if t.curves]
    page = pages.render("evaluation", run=run.name, sheets=sheets, curves=curves, drawn=manifest)
    return pages.write(run, PAGE, page)


def sheets_of(run: Run, tables: list[Table]) -> list[Sheet]:
    """Every table that the run has."""
    sheets = [sheet for t in tables for sheet in ifvr_sheets(t)]
    if run.has("public"):
        sheets += public_sheets([run.artifact(n) for n in ("public", "simulated") if run.has(n)])
    if run.has("ranking"):
        sheets.append(ranking_sheet(run.artifact("ranking")))
    return sheets


def kept_chart(table: Table) -> Markup:
    """What is kept at each share of videos kept: some policies, then the best baselines; equal curves once."""
    rate = "click_rate" if table.task == Task.CLICK else "play_rate_above_30"
    baselines = {r.name for r in table.rows if r.kind == "baseline"}
    half = {name: next(p[rate] for p in points if p["share_kept"] >= 0.49) for name, points in table.curves.items()}
    distinct = {str(points): name for name, points in reversed(list(table.curves.items()))}
    names = sorted(distinct.values(), key=lambda n: (n in baselines, -half[n]))
    policies = [n for n in names if n not in baselines][:_POLICIES]
    shown = (policies + [n for n in names if n in baselines])[:_CURVES]
    with drawing(f"curve-{table.task}", (5.2, 3.2)) as chart:
        _draw(chart.axes, table, rate, shown)
    return chart.svg


def _draw(axes: "Axes", table: Table, rate: str, shown: list[str]) -> None:
    for name, colour in zip(shown, SERIES, strict=False):
        points = table.curves[name]
        line = [100 * p["share_kept"] for p in points], [100 * p[rate] for p in points]
        axes.plot(*line, color=colour, label=name.replace("$", ""))
    axes.set_xlabel("videos kept, %")
    axes.set_ylabel("clicked, %" if table.task == Task.CLICK else "not skipped, %")
    legend_above(axes)
