"""The evaluation's tables as sheets of text, for the terminal and for the page alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gubs import console
from gubs.artifacts import Artifact
from gubs.evaluate.conditions import Condition
from gubs.evaluate.protocols import HeldOut
from gubs.evaluate.public import METRIC
from gubs.evaluate.published import PUBLISHED, TABLE_2, TABLE_3
from gubs.evaluate.ranking import STATISTICS, WAYS
from gubs.evaluate.sensitivity import AUC, CHANGED, TURNED
from gubs.evaluate.table import COLUMNS, REWARD, VERDICT_METRIC, Table
from gubs.evaluate.verdicts import Word, by_predictor
from gubs.records import Task

_WIDTH = 170
_PUBLISHED_ON = {"movielens": "MovieLens", "agent4rec": "MovieLens", "amazon": "Amazon Books"}
"""Data set of the paper's Table 3, by kind of source."""
_SHORT = {
    "person_play_rate": "person play",
    "total_play_rate": "total play",
    "finish_rate": "finish",
    "play_rate_above_30": "play >30 %",
    "judge_f1": "judge F1",
    "judge_acc": "judge acc",
    "judge_balanced_acc": "balanced acc",
    "click_rate": "click rate",
    "click_f1": "click F1",
    "click_acc": "click acc",
    "click_balanced_acc": "balanced acc",
    "auc": "AUC",
    "reason_f1": "reason F1",
    "reason_acc": "reason acc",
    REWARD: "reward",
    "share_kept": "kept",
    "share_watched_lost": "watched lost",
    "share_clicked_lost": "clicked lost",
}


@dataclass(frozen=True)
class SheetRow:
    """One row of a sheet."""

    name: str
    cells: Sequence[str]
    faint: bool = False
    """Not measured here, or only for comparison."""


@dataclass(frozen=True)
class Sheet:
    """One table."""

    title: str
    columns: Sequence[str]
    rows: Sequence[SheetRow]
    notes: Sequence[str]


def ifvr_sheet(table: Table) -> Sheet:
    """The paper's Table 2, measured, with the published rows below."""
    columns, rows = COLUMNS[Task(table.task)], []
    for row in table.rows:
        rows.append(SheetRow(row.name, [_cell(c, row.values.get(c)) for c in columns]))
        if row.kind != "baseline" and row.random_drop:
            same = [_number(row.random_drop.get(c)) for c in columns]
            rows.append(SheetRow(f"random drop of as many as {row.name}", same, faint=True))
    rows += [
        SheetRow(f"{name} ({PUBLISHED})", [_number(figures.get(c)) for c in columns], faint=True)
        for name, figures in TABLE_2.items()
    ]
    what = "skips" if table.task == Task.SEQUENTIAL else "clicks"
    title = f"{table.task}: {table.items:,} targets of {table.users:,} test users, {100 * table.base_rate:.1f} % {what}"
    return Sheet(title, [_SHORT[c] for c in columns], rows, [*table.notes, *by_predictor(table.verdicts)])


def public_sheet(artifacts: Sequence[Artifact]) -> Sheet:
    """Accuracy of every baseline and model in every protocol, and what is left unanswered by cause.

    Args:
        artifacts: `public`, and `simulated` if there is one.
    """
    metrics = [m for a in artifacts for m in a.table("metrics").to_pylist()]
    protocols = list(dict.fromkeys(m["protocol"] for m in metrics))
    found = {(m["protocol"], m["method"], m["name"]): m for m in metrics}
    users = {p: found[p, "coin", "user_acc"]["n"] for p in protocols}
    rows = [
        SheetRow(method, [per_cent(found.get((p, method, METRIC))) for p in protocols])
        for method in dict.fromkeys(m["method"] for m in metrics)
    ]
    literature = [p.startswith("interacted / unseen, ") and not p.endswith(HeldOut.LAST) for p in protocols]
    data = _PUBLISHED_ON.get(artifacts[0].manifest.settings["source"]["kind"], "")
    for name, figures in TABLE_3.get(data, {}).items():
        cells = [_number(figures["accuracy"]) if same else "–" for same in literature]
        rows.append(SheetRow(f"{name}, {data} ({PUBLISHED})", cells, faint=True))
    notes = [_like_the_best(p, artifacts[0].table("verdicts").to_pylist()) for p in protocols]
    for artifact in artifacts[1:]:
        notes += [_in_words(v) for v in artifact.table("verdicts").to_pylist()]
    for info in (a.manifest.info for a in artifacts):
        notes += [f"unanswered, {row}: {causes or 'none'}" for row, causes in info.get("causes", {}).items()]
        if "probed" in info:
            notes.append(f"{info['model']} recalls {info['recalled']} of {info['probed']} titles from ids alone")
    title = "10 + 10 items per user: accuracy in %, pooled, positive = chosen or liked, 95 % interval over users"
    return Sheet(title, [f"{p} ({users[p]:,} users)" for p in protocols], rows, notes)


def ranking_sheet(artifact: Artifact) -> Sheet:
    """Hit rates and gains of every method in every way, with what decides them."""
    metrics, info = artifact.table("metrics").to_pylist(), artifact.manifest.info
    found = {(m["method"], m["way"], m["name"]): m for m in metrics}
    rows = [
        SheetRow(method, [per_cent(found[method, way, name]) for way in WAYS for name in STATISTICS])
        for method in dict.fromkeys(m["method"] for m in metrics)
    ]
    tied = f"{info['users_with_tied_last_times']:,} users share their last time with another record"
    notes = [f"ties: {info['ties']} ({tied})", f"negatives: {info['negatives']}"]
    if aside := info["records_without_a_place"]:
        notes.append(f"{aside:,} records without a time are set aside: other records of their users have one")
    notes += [_in_words(v) for v in artifact.table("verdicts").to_pylist()]
    columns = [f"{name}, {way}" for way in WAYS for name in STATISTICS]
    return Sheet(f"leave one out: {info['users']:,} users, {info['items']:,} items; %", columns, rows, notes)


def sensitivity_sheets(artifact: Artifact) -> list[Sheet]:
    """What a policy's answers depend on, one sheet per task: each condition beside the own prompt."""
    figures, verdicts = artifact.table("figures").to_pylist(), artifact.table("verdicts").to_pylist()
    info, sheets = artifact.manifest.info, []
    for task in dict.fromkeys(f["task"] for f in figures):
        found = {(f["condition"], f["name"]): f for f in figures if f["task"] == task}
        against = {v["first"]: v for v in verdicts if v["task"] == task}
        names = (VERDICT_METRIC[Task(task)], AUC, CHANGED, TURNED)
        rows = [
            SheetRow(
                c, [f"{found[c, AUC]['n']:,}", *(per_cent(found.get((c, n))) for n in names), _beside(against.get(c))]
            )
            for c in dict.fromkeys(c for c, _ in found)
        ]
        n, users = found[Condition.OWN, AUC]["n"], found[Condition.OWN, AUC]["users"]
        title = f"{task}: what the answers of {info['policy']} depend on, {n:,} targets of {users:,} test users; %"
        columns = ["targets", "balanced acc", "AUC", "answers changed", "decisions turned", "against the own prompt"]
        sheets.append(Sheet(title, columns, rows, _sensitivity_notes(task, info, list(against.values()))))
    return sheets


def _sensitivity_notes(task: str, info: Mapping[str, Any], against: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [f"left out, {why}: {condition}" for condition, why in info["left_out"].get(task, {}).items()]
    if info["style"] == "brief":
        notes.append(f"{Condition.LETTERS}: brief prompts show no texts of options, so only the letters change places")
    else:
        notes.append(f"{Condition.LETTERS}: the options' texts change letters, and answers are read accordingly")
    least = max((v["detectable"] for v in against), default=float("nan"))
    notes.append(
        f"against the own prompt: balanced accuracy in points on the same targets (a condition has only those whose "
        f"prompt it changes); 5 %, Holm over {len(against)} conditions; up to {100 * least:.1f} points go unnoticed"
    )
    return notes


def _beside(verdict: Mapping[str, Any] | None) -> str:
    return f"{100 * verdict['difference']:+.1f}: {verdict['word']}" if verdict else "–"


def _like_the_best(protocol: str, verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The best baseline of a protocol, and those that this many users cannot tell from it."""
    own = [v for v in verdicts if v["protocol"] == protocol]
    alike = [v["second"] for v in own if v["word"] == Word.UNKNOWN]
    least = max((v["detectable"] for v in own), default=float("nan"))
    return (
        f"{protocol}: best is {own[0]['first']}; not to be told from it (up to {least:.3f}): {', '.join(alike) or '-'}"
    )


def _in_words(verdict: Mapping[str, Any]) -> str:
    return (
        f"{verdict.get('protocol', '')} {verdict['first']} against {verdict['second']}, {verdict['metric']}: "
        f"{verdict['difference']:+.3f} (detectable {verdict['detectable']:.3f}, p {verdict['p_holm']:.3f}): "
        f"{verdict['word']}"
    ).strip()


def print_sheet(sheet: Sheet) -> None:
    """Prints a sheet on stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    title = {"title": sheet.title, "title_justify": "left", "title_style": "bold"}
    table = RichTable(**title, box=box.SIMPLE_HEAD, pad_edge=False)  # type: ignore[arg-type]
    table.add_column("", no_wrap=True)
    for column in sheet.columns:
        table.add_column(column, justify="right")
    for row in sheet.rows:
        table.add_row(row.name, *row.cells, style="dim" if row.faint else "")
    screen = console.out if console.out.is_terminal else Console(width=_WIDTH, highlight=False)
    screen.print(table)
    for note in sheet.notes:
        console.print_line(f"  {note}")


def _cell(column: str, metric: Mapping[str, Any] | None) -> str:
    return _shown(metric, 1, 2) if column == REWARD else per_cent(metric)


def per_cent(metric: Mapping[str, Any] | None) -> str:
    """In per cent, with half the width of the interval."""
    return _shown(metric, 100, 1)


def _shown(metric: Mapping[str, Any] | None, scale: float, digits: int) -> str:
    if metric is None or metric["value"] is None or metric["value"] != metric["value"]:
        return "–"
    low, high = metric["low"], metric["high"]
    half = "" if low is None or low != low else f" ±{scale * (high - low) / 2:.{digits}f}"
    return f"{scale * metric['value']:.{digits}f}{half}"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"
