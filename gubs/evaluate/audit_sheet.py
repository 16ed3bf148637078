"""What `gubs audit` says: a published table row by row, what cannot hold together, and what others reach."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gubs.artifacts import Artifact, JsonObject
from gubs.errors import InputError
from gubs.evaluate.audit import (
    OVERALL,
    Averaging,
    Bar,
    Bars,
    Cells,
    Conflict,
    Exchange,
    Place,
    Quantity,
    Range,
    RowAudit,
    audit_row,
    constants,
    detectable,
    exchanges,
    noise,
    place,
    reading,
)
from gubs.evaluate.baselines.choices import CONSTANTS, THRESHOLD, TOP_HALF
from gubs.evaluate.printed import Printed
from gubs.evaluate.sheets import Sheet, SheetRow

_MEASURED = {
    Averaging.POOLED: {
        Quantity.ACCURACY: "click_acc",
        Quantity.BALANCED: "click_balanced_acc",
        Quantity.F1: "click_f1",
        Quantity.RECALL: "click_recall",
        Quantity.PRECISION: "click_precision",
    },
    Averaging.USERS: {Quantity.ACCURACY: "user_acc", Quantity.F1: "user_f1", Quantity.RECALL: "user_recall"},
}
"""Metrics of the artifact `public`, by averaging."""
_IN_WORDS = {Averaging.POOLED: "pooled", Averaging.USERS: "means over users"}
_SHORT = {
    Quantity.F1: "F1",
    Quantity.NPV: "NPV",
    Quantity.BALANCED: "balanced accuracy",
}
_IMPLIED = (Quantity.BALANCED, Quantity.PRECISION)
"""Quantities shown where they follow from what is printed."""


@dataclass(frozen=True)
class Audit:
    """A published table, checked."""

    printed: Printed
    rows: Sequence[RowAudit]
    exchanges: Sequence[Exchange]
    constants: Bars
    bars: Bars

    @property
    def all_bars(self) -> Bars:
        """Constants and bars."""
        return {**self.constants, **self.bars}

    def to_json(self) -> JsonObject:
        """As plain JSON; figures are 0-1."""
        return {
            "table": self.printed.label,
            "title": self.printed.columns.title,
            "rows": [_row_json(row, self._places(row.cells)) for row in self.rows],
            "exchanges": [asdict(e) for e in self.exchanges],
            "bars": {n: {str(q): asdict(figure) for q, figure in bar.items()} for n, bar in self.all_bars.items()},
        }

    def _places(self, cells: Cells) -> dict[str, dict[Quantity, Place]]:
        """Where a row stands against each bar, in what more of is better."""
        return {
            name: {q: place(cells[q], bar[q], self._noise(q, cells[q])) for q in OVERALL if q in bar and q in cells}
            for name, bar in self.all_bars.items()
        }

    def _noise(self, quantity: Quantity, cell: Range) -> float:
        """Half the interval of a printed accuracy; 0 for other quantities, and for an unknown number of answers."""
        if quantity is not Quantity.ACCURACY or not self._answers or not 0 <= cell.low <= cell.high <= 1:
            return 0.0
        return noise((cell.low + cell.high) / 2, self._answers)

    @property
    def _answers(self) -> int:
        """Answers that a figure is about, at least; 0 if unknown."""
        c = self.printed.columns
        if c.positives is None or c.negatives is None:
            return 0
        return c.users * sum(v if isinstance(v, int) else v[0] for v in (c.positives, c.negatives))

    def sheet(self) -> Sheet:
        """As a table with notes."""
        printed = list(dict.fromkeys(q for row in self.rows for q in row.cells))
        implied = [q for q in _IMPLIED if q not in printed]
        readings = self.printed.columns.averagings
        columns = [_short(q) for q in printed] + [_IN_WORDS[a] for a in readings]
        columns += [f"{_short(q)}, implied" for q in implied]
        rows = [self._row(row, printed, implied) for row in self.rows]
        for name, bar in self.all_bars.items():
            cells = [_figure(bar[q]) if q in bar else "" for q in printed]
            rows.append(SheetRow(name, cells + [""] * (len(columns) - len(printed)), faint=True))
        unit = "%" if self.printed.columns.unit == "percent" else "%, but for what is printed"
        title = f"{self.printed.label}: {self.printed.columns.title or 'published table'}; {self._classes()}; {unit}"
        return Sheet(title, columns, rows, self._notes())

    def _row(self, row: RowAudit, printed: Sequence[Quantity], implied: Sequence[Quantity]) -> SheetRow:
        texts = self.printed.texts[row.name]
        cells = [texts.get(q, "–") for q in printed]
        cells += ["impossible" if conflicts else "possible" for conflicts in row.conflicts.values()]
        cells += [_span(row.implied[q]) if q in row.implied else "–" for q in implied]
        return SheetRow(row.name, cells)

    def _classes(self) -> str:
        c = self.printed.columns
        if c.positives is not None:
            return f"{_counts(c.positives)} + {_counts(c.negatives)} items per user"
        return f"{_span(c.classes.share)} % positive"

    def _notes(self) -> list[str]:
        notes = []
        for row in self.rows:
            for averaging, conflicts in row.conflicts.items():
                notes += [self._cannot(row, averaging, conflict) for conflict in conflicts]
            if row.shares:
                notes.append(f"{row.name}: pooled, it would hold with {_span(row.shares)} % positive")
        notes += [
            f"with {_short(e.first)} and {_short(e.second)} exchanged, {e.after} rows are impossible, not {e.before}"
            for e in self.exchanges
        ]
        notes += [note for row in self.rows if (note := self._against_bars(row))]
        notes += [note] if (note := self.printed.columns.note) else []
        return [*notes, *self._resolution(), _caution(self.printed.columns.averagings)]

    def _cannot(self, row: RowAudit, averaging: Averaging, conflict: Conflict) -> str:
        texts = self.printed.texts[row.name]
        names = [_short(q) for q in conflict.allowed]
        left = (
            f"{_short(q)} {texts[q]}, the others allow {_span(allowed) if allowed else 'nothing'}"
            for q, allowed in conflict.allowed.items()
        )
        if len(names) == 1:
            return f"{row.name}: {names[0]} {texts[next(iter(conflict.allowed))]} is no such figure"
        together = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"{row.name}, {_IN_WORDS[averaging]}: {together} cannot hold together ({'; '.join(left)})"

    def _against_bars(self, row: RowAudit) -> str:
        """Which bars the row does not reach, and which it cannot be told from."""
        places, parts = self._places(row.cells), []
        for q in (q for q in OVERALL if q in row.cells):
            for where in (Place.BELOW, Place.ALIKE):
                bars = [name for name, of in places.items() if of.get(q) is where]
                named = [f"{name} ({100 * self.all_bars[name][q].value:.1f})" for name in bars]
                parts += [f"{_short(q)} {where} {', '.join(named)}"] if named else []
        return f"{row.name}: {'; '.join(parts)}" if parts else ""

    def _resolution(self) -> list[str]:
        accuracies = [r.cells[Quantity.ACCURACY] for r in self.rows if Quantity.ACCURACY in r.cells]
        best = max(((a.low + a.high) / 2 for a in accuracies), default=0.0)
        if not self._answers or not 0 < best < 1:
            return []
        least = 100 * detectable(best, self._answers)
        return [
            f"{self.printed.columns.users:,} users: two samples of {self._answers:,} independent answers show a "
            f"difference in accuracy of {least:.1f} points in 80 % of cases"
        ]


def audit(printed: Printed, public: Artifact | None = None) -> Audit:
    """Checks a published table.

    Args:
        printed: the table.
        public: `gubs evaluate public` on the same files, whose baselines replace the bars that the table comes with.

    Raises:
        InputError: the table's readings cannot be checked, or the run has not answered its protocol.
    """
    classes = printed.columns.classes
    try:
        readings = {a: reading(classes, a) for a in printed.columns.averagings}
    except ValueError as e:
        raise InputError(f"{printed.label}: {e}") from None
    return Audit(
        printed,
        [audit_row(name, cells, readings) for name, cells in printed.rows.items()],
        exchanges(list(printed.rows.values()), readings),
        constants(classes),
        printed.bars if public is None else measured_bars(public, printed),
    )


def measured_bars(public: Artifact, printed: Printed) -> Bars:
    """The baselines of a run on the table's protocol, each with the better of its two rules, the best first.

    Raises:
        InputError: the run has no such protocol.
    """
    metrics = public.table("metrics").to_pylist()
    protocols = list(dict.fromkeys(m["protocol"] for m in metrics))
    wanted = printed.columns.protocol or protocols[0]
    if wanted not in protocols:
        raise InputError(
            f"{public.stage}: no protocol {wanted!r}, which {printed.label} asks for, among {', '.join(protocols)}"
        )
    names = _metric_names(printed.columns.averagings)
    bars: dict[str, dict[Quantity, Bar]] = {}
    values: dict[str, float] = {}
    for method in dict.fromkeys(m["method"] for m in metrics if m["method"] not in CONSTANTS):
        own = {m["name"]: m for m in metrics if m["method"] == method and m["protocol"] == wanted}
        short = method.removesuffix(f", {TOP_HALF}").removesuffix(f", {THRESHOLD}")
        accuracy = own[names[Quantity.ACCURACY]]["value"]
        if accuracy > values.get(short, -1.0):
            values[short] = accuracy
            bars[short] = {q: _bar(own[n]) for q, n in names.items()}
    return {name: bars[name] for name in sorted(bars, key=lambda n: -values[n])}


def _metric_names(averagings: Sequence[Averaging]) -> dict[Quantity, str]:
    """Where the averaging is unknown, what is the same in both."""
    if len(averagings) == 1:
        return _MEASURED[averagings[0]]
    return {q: n for q, n in _MEASURED[Averaging.POOLED].items() if q not in (Quantity.F1, Quantity.PRECISION)}


def _caution(averagings: Sequence[Averaging]) -> str:
    text = "impossible is proven, for that reading; possible only means that rounding and class sizes do not exclude it"
    if Averaging.USERS in averagings:
        text += "; means over users are bound far more loosely than pooled figures"
    return text


def _short(quantity: Quantity) -> str:
    return _SHORT.get(quantity, str(quantity))


def _counts(counts: int | tuple[int, int] | None) -> str:
    return f"{counts[0]}-{counts[1]}" if isinstance(counts, tuple) else str(counts)


def _span(span: Range) -> str:
    low, high = f"{100 * span.low:.1f}", f"{100 * span.high:.1f}"
    return low if low == high else f"{low}–{high}"


def _bar(metric: Mapping[str, Any]) -> Bar:
    half = (metric["high"] - metric["low"]) / 2
    return Bar(metric["value"], 0.0 if math.isnan(half) else half)


def _figure(bar: Bar) -> str:
    half = f" ±{100 * bar.half:.1f}" if bar.half >= 0.001 else ""
    return f"{100 * bar.value:.1f}{half}"


def _ranges_json(ranges: Mapping[Quantity, Range | None]) -> dict[str, list[float] | None]:
    return {str(q): None if r is None else [r.low, r.high] for q, r in ranges.items()}


def _row_json(row: RowAudit, places: Mapping[str, Mapping[Quantity, Place]]) -> JsonObject:
    return {
        "row": row.name,
        "cells": _ranges_json(row.cells),
        "possible": [str(a) for a in row.possible],
        "conflicts": {str(a): [_ranges_json(c.allowed) for c in conflicts] for a, conflicts in row.conflicts.items()},
        "implied": _ranges_json(row.implied),
        "share_needed": [row.shares.low, row.shares.high] if row.shares else None,
        "against": {bar: {str(q): str(at) for q, at in of.items()} for bar, of in places.items() if of},
    }
