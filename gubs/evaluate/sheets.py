"""The evaluation's tables as sheets of text, for the terminal and for the page alike."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gubs import console
from gubs.artifacts import Artifact
from gubs.evaluate.baselines.choices import USERS_RATE
from gubs.evaluate.conditions import Condition
from gubs.evaluate.predictors import REWARD
from gubs.evaluate.protocols import HeldOut
from gubs.evaluate.public import METRIC
from gubs.evaluate.published import PUBLISHED, TABLE_2, TABLE_3
from gubs.evaluate.ranking import STATISTICS, WAYS
from gubs.evaluate.scores import SHARE, compared_by, statistics_at
from gubs.evaluate.sensitivity import AUC, CHANGED, TURNED
from gubs.evaluate.table import COLUMNS, COUNTS, VERDICT_METRIC, Table
from gubs.evaluate.verdicts import Verdict, Word, by_pair, by_predictor
from gubs.records import Task

_WIDTH = 240
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
    "judge_mcc": "MCC",
    "click_rate": "click rate",
    "click_f1": "click F1",
    "click_acc": "click acc",
    "click_balanced_acc": "balanced acc",
    "click_mcc": "MCC",
    "auc": "AUC",
    "reason_f1": "reason F1",
    "reason_acc": "reason acc",
    REWARD: "reward",
    "share_kept": "kept",
    "share_watched_lost": "watched lost",
    "share_clicked_lost": "clicked lost",
    "users_without_video": "users with none",
}
_AT_SHARE = {"total_play_rate": "play rate", "play_rate_above_30": "not skipped", "click_rate": "click rate"}
_CHOICES = {
    METRIC: "accuracy",
    "click_recall": "recall",
    "click_f1": "F1",
    "click_mcc": "MCC",
    "user_f1": "F1, mean over users",
}
"""Columns of the "10 + 10" sheets."""


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


def ifvr_sheets(table: Table) -> list[Sheet]:
    """The paper's Table 2, measured; and what predictors with a score keep at the same share of videos kept."""
    return [ifvr_sheet(table), share_sheet(table)] if table.curves else [ifvr_sheet(table)]


def ifvr_sheet(table: Table) -> Sheet:
    """The paper's Table 2, measured, with the published rows below."""
    columns, rows = COLUMNS[Task(table.task)], []
    for row in table.rows:
        rows.append(SheetRow(row.name, [_cell(c, row.values.get(c)) for c in columns]))
        if row.kind != "baseline" and row.random_drop:
            same = [_plain(c, row.random_drop.get(c)) for c in columns]
            rows.append(SheetRow(f"random drop of as many as {row.name}", same, faint=True))
    rows += [
        SheetRow(f"{name} ({PUBLISHED})", [_plain(c, figures.get(c)) for c in columns], faint=True)
        for name, figures in TABLE_2.items()
    ]
    what = "skips" if table.task == Task.SEQUENTIAL else "clicks"
    title = f"{table.task}: {table.items:,} targets of {table.users:,} test users, {100 * table.base_rate:.1f} % {what}"
    at_share = compared_by(Task(table.task))
    others = [v for v in table.verdicts if v.second not in table.policies and v.metric not in at_share]
    notes = [*table.notes, *gains(table), *by_predictor(others), *contract_notes(table.contracts, _SHORT)]
    return Sheet(title, [_SHORT[c] for c in columns], rows, notes)


def gains(table: Table) -> list[str]:
    """What each policy gained over the policies that it is compared with, in all metrics: one line per pair."""
    return by_pair([v for v in table.verdicts if v.second in table.policies])


def share_sheet(table: Table) -> Sheet:
    """What every predictor with a score keeps if all keep the same share of the videos."""
    task, good = Task(table.task), "clicked" if table.task == Task.CLICK else "watched"
    figures = list(statistics_at(task))
    rows = [SheetRow(name, [per_cent(at[f]) for f in figures]) for name, at in table.at_share.items()]
    named = [_AT_SHARE.get(f, f"{good} lost") for f in figures]
    notes = [
        "the videos with the lowest scores are kept; of those with equal scores at the border, as much as has room",
        *by_predictor(_at_share(table)),
    ]
    return Sheet(f"{task}: every predictor keeps {100 * SHARE:.0f} % of the videos; %", named, rows, notes)


def _at_share(table: Table) -> list[Verdict]:
    metrics = compared_by(Task(table.task))
    return [v for v in table.verdicts if v.metric in metrics and v.second not in table.policies]


def contract_notes(contracts: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[str]:
    """What columns mean, one line per group of columns with the same rules for 0/0 and for no answer."""
    rules = dict.fromkeys((c["empty"], c["unanswered"]) for c in contracts)
    return [
        f"{empty}, no answer counts as {unanswered}: "
        + "; ".join(_contract(c, labels) for c in contracts if (c["empty"], c["unanswered"]) == (empty, unanswered))
        for empty, unanswered in rules
    ]


def _contract(contract: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    base = contract["base_rate"]
    shown = "" if base is None or base != base else f", base rate {_plain(contract['name'], base)}"
    unit = "" if not shown or contract["name"] in COUNTS else " %"
    return f"{labels[contract['name']]} (positive: {contract['positive']}, {contract['averaging']}{shown}{unit})"


def public_sheets(artifacts: Sequence[Artifact]) -> list[Sheet]:
    """One sheet per protocol: every baseline and model, what is left unanswered by cause, and what was published.

    Args:
        artifacts: `public`, and `simulated` if there is one.
    """
    metrics = [m for a in artifacts for m in a.table("metrics").to_pylist()]
    return [_protocol_sheet(p, metrics, artifacts) for p in dict.fromkeys(m["protocol"] for m in metrics)]


def _protocol_sheet(protocol: str, metrics: Sequence[Mapping[str, Any]], artifacts: Sequence[Artifact]) -> Sheet:
    of_protocol = {(m["method"], m["name"]): m for m in metrics if m["protocol"] == protocol}
    rows = [
        SheetRow(method, [per_cent(of_protocol.get((method, c))) for c in _CHOICES])
        for method in dict.fromkeys(method for method, _ in of_protocol)
    ]
    if protocol.startswith("interacted / unseen, ") and not protocol.endswith(HeldOut.LAST):
        rows += _published_choices(artifacts[0])
    contracts = [of_protocol["coin", c] for c in _CHOICES]
    notes = [*_public_notes(protocol, artifacts), *contract_notes(contracts, _CHOICES)]
    notes.append(
        f"{USERS_RATE}: the share of the user's other items that were liked; without stars, how many there are"
    )
    title = f"10 + 10, {protocol}: {of_protocol['coin', 'user_acc']['n']:,} users; %, positive = chosen or liked"
    return Sheet(title, list(_CHOICES.values()), rows, notes)


def _published_choices(public: Artifact) -> Iterator[SheetRow]:
    """What the paper's Table 3 prints. Its F1 is none that is pooled over items (`gubs audit agent4rec`)."""
    data = _PUBLISHED_ON.get(public.manifest.settings["source"]["kind"], "")
    for name, figures in TABLE_3.get(data, {}).items():
        printed = {METRIC: figures["accuracy"], "click_recall": figures["recall"], "user_f1": figures["f1"]}
        cells = [_number(printed.get(c)) for c in _CHOICES]
        yield SheetRow(f"{name}, {data} ({PUBLISHED})", cells, faint=True)


def _public_notes(protocol: str, artifacts: Sequence[Artifact]) -> Iterator[str]:
    yield _like_the_best(protocol, artifacts[0].table("verdicts").to_pylist())
    for artifact in artifacts[1:]:
        yield from (_in_words(v) for v in artifact.table("verdicts").to_pylist() if v["protocol"] == protocol)
    for info in (a.manifest.info for a in artifacts):
        for row, causes in info.get("causes", {}).items():
            if row.startswith(f"{protocol}: "):
                yield f"without a readable answer, {row.removeprefix(f'{protocol}: ')}: {causes or 'none'}"
        if "probed" in info:
            yield f"{info['model']} recalls {info['recalled']} of {info['probed']} titles from ids alone"


def ranking_sheet(artifact: Artifact) -> Sheet:
    """Hit rates and gains of every method in every way, with what decides them."""
    metrics, info = artifact.table("metrics").to_pylist(), artifact.manifest.info
    figures = {(m["method"], m["way"], m["name"]): m for m in metrics}
    rows = [
        SheetRow(method, [per_cent(figures[method, way, name]) for way in WAYS for name in STATISTICS])
        for method in dict.fromkeys(m["method"] for m in metrics)
    ]
    tied = f"{info['users_with_tied_last_times']:,} users share their last time with another record"
    notes = [f"ties: {info['ties']} ({tied})", f"negatives: {info['negatives']}"]
    if aside := info["records_without_a_place"]:
        notes.append(f"{aside:,} records without a time are set aside: other records of their users have one")
    notes += [_in_words(v) for v in artifact.table("verdicts").to_pylist()]
    columns = [f"{name}, {way}" for way in WAYS for name in STATISTICS]
    return Sheet(f"leave one out: {info['users']:,} users, {info['items']:,} items; %", columns, rows, notes)


SENSITIVITY_COLUMNS = (
    *("targets", "balanced acc", "AUC", "answers changed", "decisions turned", "against the own prompt"),
)


def sensitivity_sheets(artifact: Artifact) -> list[Sheet]:
    """What a policy's answers depend on, one sheet per task: each condition beside the own prompt."""
    figures, verdicts = artifact.table("figures").to_pylist(), artifact.table("verdicts").to_pylist()
    info, sheets = artifact.manifest.info, []
    for task in dict.fromkeys(f["task"] for f in figures):
        of_condition: dict[str, dict[str, Any]] = {}
        for f in (f for f in figures if f["task"] == task):
            of_condition.setdefault(f["condition"], {})[f["name"]] = f
        against = {v["first"]: v for v in verdicts if v["task"] == task}
        rows = [SheetRow(c, sensitivity_cells(task, named, against.get(c))) for c, named in of_condition.items()]
        n, users = (of_condition[Condition.OWN][AUC][name] for name in ("n", "users"))
        title = f"{task}: what the answers of {info['policy']} depend on, {n:,} targets of {users:,} test users; %"
        sheets.append(Sheet(title, SENSITIVITY_COLUMNS, rows, _sensitivity_notes(task, info, list(against.values()))))
    return sheets


def sensitivity_cells(
    task: str, figures: Mapping[str, Mapping[str, Any]], against: Mapping[str, Any] | None
) -> list[str]:
    """The cells of `SENSITIVITY_COLUMNS` of one condition.

    Args:
        task: of the targets.
        figures: of the condition, by name.
        against: its verdict against the own prompt; None = it is that.
    """
    names = (VERDICT_METRIC[Task(task)], AUC, CHANGED, TURNED)
    return [f"{figures[AUC]['n']:,}", *(per_cent(figures.get(n)) for n in names), _beside(against)]


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
    if column in COUNTS:
        return _shown(metric, 1, 0)
    return _shown(metric, 1, 2) if column == REWARD else per_cent(metric)


def _plain(column: str, value: float | None) -> str:
    """A value without an interval."""
    if column in COUNTS and value is not None:
        return f"{value:,.0f}"
    return _number(value)


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
