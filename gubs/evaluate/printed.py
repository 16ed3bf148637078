"""A published table from files: a CSV as it was printed, and a YAML file that says what its columns mean.

The package ships a few, which `gubs audit` knows by name: `cases/NAME.csv` and `cases/NAME.yaml`. Figures of papers are
facts; nothing else of a paper is here.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from gubs.errors import InputError
from gubs.evaluate.audit import Averaging, Bar, Bars, Cells, Classes, Quantity, Range
from gubs.section import Section

_MISSING = frozenset({"", "-", "–", "—", "n/a", "nan"})
_FIGURE = re.compile(r"(?P<digits>[+-]?\d*\.?\d+)\s*(?P<percent>%?)\s*(?:±\s*(?P<half>\d*\.?\d+)\s*%?)?")
_MARKS = "*†‡ "
"""What papers put beside figures that they want to be looked at."""
_UNITS = {"percent": 100.0, "share": 1.0}
_Counts = int | tuple[int, int]


class Columns(Section):
    """What a published table's columns mean."""

    title: str = ""
    """What the table is, in a few words."""
    name: str = ""
    """Column with the names of the rows; default: the first."""
    columns: dict[str, Quantity] = Field(min_length=1)
    """Name of a column -> what it prints. Other columns are not looked at."""
    rows: tuple[str, ...] = ()
    """Names of the rows to check; default: all."""
    unit: Literal["percent", "share"] = "percent"
    """Of the figures without a % sign."""
    rounding: Literal["nearest", "down", "unknown"] = "nearest"
    """How figures were rounded to the digits that are printed; unknown: to either neighbour."""
    averaging: Literal["pooled", "users", "unknown"] = "unknown"
    """Whether figures are pooled over items or means over users; unknown: both are tried."""
    positives: _Counts | None = None
    """Positive items per user, or the fewest and the most."""
    negatives: _Counts | None = None
    """The same of negative items."""
    share: float | tuple[float, float] | None = None
    """Share of positive items among all (0-1), or its bounds, where numbers per user are not known."""
    users: int = Field(0, ge=0)
    """Users that the figures are about; 0 = unknown."""
    protocol: str = ""
    """Protocol of `gubs evaluate public` that asks the same; default: the first of the run."""
    bars: dict[str, dict[Quantity, str]] = Field(default_factory=dict)
    """What others reach on the same files: name -> quantity -> figure, as `77.2 ± 0.7`. A run's own bars replace
    them."""
    note: str = ""
    """What the meaning of the columns rests on; shown with the table."""

    @model_validator(mode="after")
    def _has_classes(self) -> "Columns":
        if (self.positives is None) != (self.negatives is None):
            raise ValueError("positives and negatives come together")
        if (self.positives is None) == (self.share is None):
            raise ValueError("say either positives and negatives per user, or the share of positives")
        if self.positives is None and self.averaging == "users":
            raise ValueError("means over users need positives and negatives per user")
        if len(set(self.columns.values())) < len(self.columns):
            raise ValueError("two columns print the same quantity; name one of them")
        return self

    @property
    def classes(self) -> Classes:
        """The sizes of the classes. Raises ValueError where they cannot be."""
        if self.positives is not None and self.negatives is not None:
            return Classes.per_user(_pair(self.positives), _pair(self.negatives))
        low, high = self.share if isinstance(self.share, tuple) else (self.share, self.share)
        return Classes(Range(float(low or 0), float(high or 0)))

    @property
    def averagings(self) -> list[Averaging]:
        """The readings to try."""
        if self.averaging != "unknown":
            return [Averaging(self.averaging)]
        return [Averaging.POOLED] if self.positives is None else list(Averaging)


@dataclass(frozen=True)
class Printed:
    """A published table."""

    label: str
    """Name of the case or of the file."""
    columns: Columns
    rows: Mapping[str, Cells]
    """Name of each row -> its cells."""
    texts: Mapping[str, Mapping[Quantity, str]]
    """The same as printed."""
    bars: Bars


def case_names() -> list[str]:
    """Tables that the package has."""
    return sorted(f.name.removesuffix(".yaml") for f in _cases().iterdir() if f.name.endswith(".yaml"))


def _cases() -> Traversable:
    return resources.files("gubs.evaluate") / "cases"


def case_figures(name: str) -> dict[str, dict[str, float | None]]:
    """All figures of a case, 0-1, by row and column, whatever they print; None where there is none."""
    return {
        record.pop("method"): {column: float(Decimal(text) / 100) if text else None for column, text in record.items()}
        for _, record in read_records(_cases() / f"{name}.csv")
    }


def read_printed(table: str, columns: Path | None = None) -> Printed:
    """A table: the name of a case, or a CSV file with the file that describes it.

    Raises:
        InputError: a file is missing or cannot be read; names the file, the row, the column and the remedy.
    """
    names = case_names()
    if table in names:
        described = _cases() / f"{table}.yaml" if columns is None else columns
        return _printed(table, _cases() / f"{table}.csv", described)
    if not Path(table).is_file():
        raise InputError(f"{table}: neither a file nor one of the known tables ({', '.join(names)})")
    if columns is None:
        raise InputError(f"{table}: say what its columns mean with --columns FILE.yaml (see docs/results.md)")
    return _printed(Path(table).name, Path(table), columns)


def _printed(label: str, table: Path | Traversable, described: Path | Traversable) -> Printed:
    columns, records = _read_columns(described), read_records(table)
    header = list(records[0][1])
    name = columns.name or header[0]
    for wanted in (name, *columns.columns):
        if wanted not in header:
            raise InputError(f"{table.name}: row 1: no column {wanted!r}; the file has {', '.join(map(repr, header))}")
    rows: dict[str, Cells] = {}
    texts: dict[str, Mapping[Quantity, str]] = {}
    for line, record in records:
        if columns.rows and record[name] not in columns.rows:
            continue
        where = f"{table.name}: row {line}"
        if record[name] in rows:
            raise InputError(f"{where}, column {name!r}: {record[name]!r} occurs twice; give each row its own name")
        shown = {q: record[c].strip() for c, q in columns.columns.items() if record[c].strip().lower() not in _MISSING}
        rows[record[name]] = {q: _cell(text, columns, f"{where}: {q}") for q, text in shown.items()}
        texts[record[name]] = shown
    if absent := set(columns.rows) - set(rows):
        raise InputError(f"{table.name}: no row {sorted(absent)[0]!r}, which {described.name} names in `rows`")
    _check_unit(label, columns, rows.values())
    bars = {
        bar: {q: _bar(text, columns, f"{described.name}: bars.{bar}.{q}") for q, text in figures.items()}
        for bar, figures in columns.bars.items()
    }
    return Printed(label, columns, rows, texts, bars)


def read_records(table: Path | Traversable) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header, as texts, each with the line on which it ends.

    Raises:
        InputError: it is missing, is no text, has no rows, or a row is shorter or longer than the header.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{table.name}: cannot be read ({e}); give a CSV file in UTF-8") from None
    reader = csv.reader(io.StringIO(text))
    lines = [(reader.line_num, row) for row in reader if row]
    if len(lines) < 2:
        raise InputError(f"{table.name}: a header and at least one row are needed")
    header = [name.strip() for name in lines[0][1]]
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise InputError(f"{table.name}: row {line}: {len(row)} values, and the header has {len(header)}")
    return [(line, dict(zip(header, row, strict=True))) for line, row in lines[1:]]


def _read_columns(described: Path | Traversable) -> Columns:
    try:
        values = yaml.safe_load(described.read_text(encoding="utf-8"))
        columns = Columns.model_validate(values)
        _ = columns.classes
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise InputError(f"{described.name}: cannot be read ({e}); give a YAML file in UTF-8") from None
    except ValidationError as e:
        faults = "; ".join(f"{'.'.join(map(str, f['loc'])) or 'file'}: {f['msg']}" for f in e.errors())
        raise InputError(f"{described.name}: {faults}") from None
    except ValueError as e:
        raise InputError(f"{described.name}: {e}") from None
    return columns


def _cell(text: str, columns: Columns, where: str) -> Range:
    """The values that a printed figure can stand for."""
    value, step, _ = _parsed(text, columns, where)
    below, above = {"nearest": (0.5, 0.5), "down": (0.0, 1.0), "unknown": (1.0, 1.0)}[columns.rounding]
    return Range(value - below * step, value + above * step)


def _bar(text: str, columns: Columns, where: str) -> Bar:
    """A bar's figure, with what stands behind its ±."""
    value, _, half = _parsed(text, columns, where)
    return Bar(value, half)


def _parsed(text: str, columns: Columns, where: str) -> tuple[float, float, float]:
    """Value, step of its last digit, and half its interval, all 0-1."""
    match = _FIGURE.fullmatch(text.strip(_MARKS))
    if not match:
        raise InputError(f"{where}: {text!r} is not a number; write one, or nothing where the table has none")
    scale = 100.0 if match["percent"] else _UNITS[columns.unit]
    digits = len(match["digits"].partition(".")[2])
    return float(match["digits"]) / scale, 10.0**-digits / scale, float(match["half"] or 0) / scale


def _check_unit(label: str, columns: Columns, rows: Iterable[Cells]) -> None:
    """Refuses a table that is in the other unit."""
    cells = [cell for row in rows for cell in row.values()]
    if cells and columns.unit == "share" and min(c.low for c in cells) > 1:
        raise InputError(f"{label}: every figure is above 1; say `unit: percent`")
    if len(cells) > 1 and columns.unit == "percent" and max(c.high for c in cells) < 0.0101:
        raise InputError(f"{label}: no figure is above 1 %; say `unit: share`")


def _pair(counts: _Counts) -> tuple[int, int]:
    return counts if isinstance(counts, tuple) else (counts, counts)
