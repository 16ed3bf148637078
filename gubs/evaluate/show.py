"""Prints the evaluation's tables on stdout."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gubs import console
from gubs.artifacts import Artifact
from gubs.evaluate.public import METRIC
from gubs.evaluate.published import PUBLISHED, TABLE_2, TABLE_3
from gubs.evaluate.ranking import STATISTICS, WAYS
from gubs.evaluate.table import COLUMNS, Table
from gubs.records import Task

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_WIDTH = 170
_SHORT = {
    "person_play_rate": "person\nplay",
    "total_play_rate": "total\nplay",
    "finish_rate": "finish",
    "play_rate_above_30": "play\n>30 %",
    "judge_f1": "judge\nF1",
    "judge_acc": "judge\nacc",
    "judge_balanced_acc": "balanced\nacc",
    "click_rate": "click\nrate",
    "click_f1": "click\nF1",
    "click_acc": "click\nacc",
    "click_balanced_acc": "balanced\nacc",
    "auc": "AUC",
    "reason_f1": "reason\nF1",
    "reason_acc": "reason\nacc",
    "share_kept": "kept",
    "share_watched_lost": "watched\nlost",
    "share_clicked_lost": "clicked\nlost",
}


def print_ifvr(tables: Sequence[Table]) -> None:
    """The paper's Table 2, measured, with the published rows below."""
    for table in tables:
        columns = COLUMNS[Task(table.task)]
        what = "skips" if table.task == Task.SEQUENTIAL else "clicks"
        base = f"{100 * table.base_rate:.1f} % {what}"
        shown = _table(f"{table.task}: {table.items:,} targets of {table.users:,} test users, {base}", columns)
        for row in table.rows:
            shown.add_row(row.name, *(_figure(row.values.get(c)) for c in columns))
            if row.kind != "baseline" and row.random_drop:
                shown.add_row("  random drop, same share", *(_number(row.random_drop.get(c)) for c in columns))
        for name, figures in TABLE_2.items():
            shown.add_row(f"{name} ({PUBLISHED})", *(_number(figures.get(c)) for c in columns), style="dim")
        _screen().print(shown)
        for line in (*table.notes, *(v.text for v in table.verdicts)):
            console.print_line(f"  {line}")


def print_public(artifacts: Sequence[Artifact]) -> None:
    """Accuracy of every baseline and model in every protocol, side by side, and what is left unanswered by cause.

    Args:
        artifacts: `public`, and `simulated` if there is one.
    """
    metrics = [m for a in artifacts for m in a.table("metrics").to_pylist()]
    protocols = list(dict.fromkeys(m["protocol"] for m in metrics))
    found = {(m["protocol"], m["method"], m["name"]): m for m in metrics}
    users = {p: found[p, "coin", "user_acc"]["n"] for p in protocols}
    columns = [f"{p}\n{users[p]:,} users" for p in protocols]
    shown = _table("10 + 10: accuracy, pooled (95 % interval over users); positive = chosen or liked", columns)
    for method in dict.fromkeys(m["method"] for m in metrics):
        shown.add_row(method, *(_figure(found.get((p, method, METRIC))) for p in protocols))
    for data, rows in TABLE_3.items():
        for name, (accuracy, _, _) in rows.items():
            shown.add_row(f"{name}, {data} ({PUBLISHED})", _number(accuracy), style="dim")
    _screen().print(shown)
    for artifact in artifacts:
        info = artifact.manifest.info
        for row, causes in info.get("causes", {}).items():
            console.print_line(f"  unanswered, {row}: {causes or 'none'}")
        if "probed" in info:
            console.print_line(
                f"  {info['model']} recalls {info['recalled']} of {info['probed']} titles from ids alone"
            )


def print_ranking(artifact: Artifact) -> None:
    """Hit rates and gains of every method in every way, with what decides them."""
    metrics, info = artifact.table("metrics").to_pylist(), artifact.manifest.info
    found = {(m["method"], m["way"], m["name"]): m for m in metrics}
    columns = [f"{way}\n{name}" for way in WAYS for name in STATISTICS]
    shown = _table(f"leave one out: {info['users']:,} users, {info['items']:,} items", columns)
    for method in dict.fromkeys(m["method"] for m in metrics):
        shown.add_row(method, *(_figure(found[method, way, name]) for way in WAYS for name in STATISTICS))
    _screen().print(shown)
    tied = f"{info['users_with_tied_last_times']:,} users share their last time with another record"
    console.print_line(f"  ties: {info['ties']} ({tied}); negatives: {info['negatives']}")
    for verdict in artifact.table("verdicts").to_pylist():
        console.print_line(
            f"  {verdict['first']} against {verdict['second']}, {verdict['metric']}: {verdict['difference']:+.3f} "
            f"(detectable {verdict['detectable']:.3f}): {verdict['word']}"
        )


def _screen() -> Any:
    from rich.console import Console

    return console.out if console.out.is_terminal else Console(width=_WIDTH, highlight=False)


def _table(title: str, columns: Sequence[str]) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable

    table = RichTable(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(_SHORT.get(column, column.replace(", ", "\n")), justify="right")
    return table


def _figure(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] != metric["value"]:
        return "–"
    low, high = metric["low"], metric["high"]
    half = "" if low is None or low != low else f" ±{100 * (high - low) / 2:.1f}"
    return f"{100 * metric['value']:.1f}{half}"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"
