"""Converts raw columns (text, bytes or typed values) to our types, with a mask of the cells that do not fit.

Everything is vectorised and works on one block at a time; only cells that do not fit, and lists in brackets, cost
more. Text stays text: an id is never read as a number. Missing is null: an empty text always, and except in free text
(titles) also the words of `CellRules.nulls`.
"""

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.settings import NULLS, SEPARATORS

Kind = Literal["id", "text", "word", "integer", "number", "flag", "time", "texts"]
"""What a column holds. `text` is free text, `word` a short one that says what something is; `time` becomes milliseconds
since 1970, UTC; `texts` a list of strings."""

KINDS: dict[Kind, tuple[pa.DataType, str]] = {
    "id": (pa.string(), "not an identifier"),
    "text": (pa.string(), "not a text"),
    "word": (pa.string(), "not a text"),
    "integer": (pa.int64(), "not a whole number"),
    "number": (pa.float64(), "not a finite number"),
    "flag": (pa.bool_(), "neither true nor false"),
    "time": (pa.int64(), "not a time between 1990 and 2100"),
    "texts": (pa.list_(pa.string()), "not a list of texts"),
}
"""Type of each kind, and why a cell that does not fit it is rejected."""

EXACT = 2**53
"""Larger whole numbers lose digits when they are stored as floats."""

EARLIEST_MS, LATEST_MS = 631_152_000_000, 4_102_444_800_000
"""1990 and 2100: times outside suggest a wrong unit or a wrong column."""

_DECIMAL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WHOLE = r"^-?(\d{1,18}|[1-8]\d{18})$"
_ROUNDED_ID = r"^(\d+(\.\d+)?[eE]\+\d+|\d\.\d+[eE]\d+)$"
"""A number that a spreadsheet or a data frame has rounded: `1.65E+12`, `1e+20`, `1.65E12`. No hexadecimal id looks like
that; `78e51061` may be one."""
_FLOAT_ID = r"^(-?\d+)\.0+$"
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "1.0"), ("0", "false", "f", "no", "n", "0.0")


@dataclass(frozen=True)
class CellRules:
    """What cells mean, beyond their type."""

    nulls: tuple[str, ...] = NULLS
    """Words that mean that a value is missing, in any case."""
    separators: str = SEPARATORS
    """Characters that separate the items of a list, strongest first."""

    @cached_property
    def missing(self) -> str:
        """Pattern of a missing cell."""
        return rf"(?i)^\s*({'|'.join(re.escape(word) for word in self.nulls)})?\s*$"

    def words(self, column: pa.Array) -> Counter[str]:
        """How often each word for a missing value occurs in a column of text."""
        if not _is_text(column):
            return Counter()
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
        matches = text.filter(pc.and_(pc.match_substring_regex(text, self.missing), pc.not_equal(text, "")))
        return Counter({count["values"].as_py(): count["counts"].as_py() for count in matches.value_counts()})


RULES = CellRules()

Converted = tuple[pa.Array, np.ndarray | None]
"""Values, and a mask of the cells that did not fit (None: all fit). Those cells are null."""


def convert(column: pa.Array, kind: Kind, rules: CellRules = RULES) -> Converted:
    """Converts a column to a kind; `KINDS` says why a masked cell does not fit."""
    if kind == "text":
        return _plain(column), None
    if kind == "word":
        return _without_missing(_plain(column), rules), None
    parsers = {"id": _ids, "integer": _integers, "number": _numbers, "flag": _flags, "time": _times, "texts": _lists}
    return parsers[kind](column, rules)


def decode(column: pa.Array) -> Converted:
    """Bytes as UTF-8 text, in a plain type; the mask marks cells that are not UTF-8."""
    column = _plain_type(column)
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return column, None
    try:
        return column.cast(pa.string()), None
    except pa.ArrowInvalid:
        bad = _undecodable(column)
        return _without(column, bad).cast(pa.string()), bad


def _plain_type(column: pa.Array) -> pa.Array:
    """A column of a rare type (a view, an encoding, an extension) in the plain one."""
    kind = column.type
    if isinstance(kind, pa.UuidType):
        return pa.array([None if v is None else str(v) for v in column.to_pylist()], pa.string())
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_type(column.storage)
    if isinstance(column, pa.DictionaryArray):
        return _plain_type(column.dictionary_decode())
    if pa.types.is_run_end_encoded(kind):
        return _plain_type(pc.run_end_decode(column))
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.string())
    if pa.types.is_binary_view(kind) or pa.types.is_fixed_size_binary(kind):
        return column.cast(pa.binary())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return pa.array(column.to_pylist(), pa.list_(kind.value_type))  # the cast gives an invalid array
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return column.cast(pa.list_(kind.value_type))
    return column


def _is_text(column: pa.Array) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _undecodable(column: pa.Array) -> np.ndarray:
    """Finds the cells that are not UTF-8 by bisection: cheap if they are few."""
    try:
        column.cast(pa.string())
    except pa.ArrowInvalid:
        if len(column) == 1:
            return np.ones(1, bool)
        half = len(column) // 2
        return np.concatenate([_undecodable(column.slice(0, half)), _undecodable(column.slice(half))])
    return np.zeros(len(column), bool)


def _mask(values: pa.Array) -> np.ndarray:
    """A boolean column as numpy; null counts as False."""
    return np.asarray(values.fill_null(False).to_numpy(zero_copy_only=False), bool)


def _without(column: pa.Array, bad: np.ndarray) -> pa.Array:
    """The column with null in the masked cells."""
    return pc.if_else(pa.array(bad), None, column) if bad.any() else column


def _checked(values: pa.Array, *masks: np.ndarray | None) -> Converted:
    """The values without the cells of any mask, and the union of the masks."""
    bad = np.logical_or.reduce([m for m in masks if m is not None] or [np.zeros(1, bool)])
    return (_without(values, bad), bad) if bad.any() else (values, None)


def _within(cells: np.ndarray, bad: np.ndarray | None) -> np.ndarray | None:
    """A mask of the column from one of a part: `bad` has an entry for each cell that `cells` masks."""
    if bad is None:
        return None
    mask = cells.copy()
    mask[cells] = bad
    return mask


def _without_missing(text: pa.Array, rules: CellRules) -> pa.Array:
    return _without(text, _mask(pc.match_substring_regex(text, rules.missing)))


def _plain(column: pa.Array) -> pa.Array:
    if pa.types.is_nested(column.type):
        values = column.to_pylist(maps_as_pydicts="strict")
        return pa.array([None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values])
    if not _is_text(column):
        return _nan_to_null(column).cast(pa.string())
    text = column.cast(pa.string())
    if _may_need_trimming(text):
        text = pc.utf8_trim_whitespace(text)
    return _without(text, _mask(pc.equal(pc.binary_length(text), 0)))


def _may_need_trimming(text: pa.Array) -> bool:
    """Whether any byte could belong to white space: far cheaper to find out than to trim columns of bare numbers."""
    data = text.buffers()[2]
    if data is None:
        return False
    codes = np.frombuffer(data, np.uint8)
    return bool(((codes <= 32) | (codes >= 128)).any())


def _nan_to_null(column: pa.Array) -> pa.Array:
    return _without(column, _mask(pc.is_nan(column))) if pa.types.is_floating(column.type) else column


def _ids(column: pa.Array, rules: CellRules) -> Converted:
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.string()), None
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())
    if not _is_text(column):
        values, bad = _integers(column, rules)
        return values.cast(pa.string()), bad
    values = _without_missing(_plain(column), rules)
    if _mask(pc.ends_with(values, "0")).any():
        values = pc.replace_substring_regex(values, _FLOAT_ID, r"\1")
    return _checked(values, _mask(pc.match_substring_regex(values, _ROUNDED_ID)))


def _parse(column: pa.Array, pattern: str, target: pa.DataType, rules: CellRules) -> Converted:
    try:
        return column.cast(target), None
    except pa.ArrowInvalid:
        text = _without_missing(pc.utf8_trim_whitespace(column.cast(pa.string())), rules)
    fits = pc.match_substring_regex(text, pattern)
    return pc.if_else(fits, text, None).cast(target), _mask(pc.and_(pc.is_valid(text), pc.invert(fits)))


def _numbers(column: pa.Array, rules: CellRules) -> Converted:
    bad: np.ndarray | None = None
    if _is_text(column):
        values, bad = _parse(column, _DECIMAL, pa.float64(), rules)
    else:
        try:
            values = column.cast(pa.float64(), safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return pa.nulls(len(column), pa.float64()), _mask(pc.is_valid(column))
    values = _nan_to_null(values)
    return _checked(values, bad, _mask(pc.is_inf(values)))


def _integers(column: pa.Array, rules: CellRules) -> Converted:
    """Whole numbers; `3.0` and `1.5e9` are whole numbers too, up to `EXACT`."""
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64()), None
    if not _is_text(column):
        return _whole(*_numbers(column, rules))
    values, unparsed = _parse(column, _WHOLE, pa.int64(), rules)
    if unparsed is None or not unparsed.any():
        return values, None
    rest, bad = _whole(*_numbers(column.filter(pa.array(unparsed)), rules))
    return pc.replace_with_mask(values, pa.array(unparsed), rest), _within(unparsed, bad)


def _whole(values: pa.Array, bad: np.ndarray | None) -> Converted:
    inexact = _mask(pc.or_(pc.not_equal(pc.round(values), values), pc.greater(pc.abs(values), EXACT)))
    values, mask = _checked(values, bad, inexact)
    return values.cast(pa.int64()), mask


def _flags(column: pa.Array, rules: CellRules) -> Converted:
    if pa.types.is_boolean(column.type):
        return column, None
    if not _is_text(column):
        values, bad = _numbers(column, rules)
        neither = _mask(pc.invert(pc.is_in(values, pa.array([0.0, 1.0])))) & _mask(pc.is_valid(values))
        return _checked(pc.equal(values, 1.0), bad, neither)
    text = _without_missing(pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string()))), rules)
    true, false, missing = pc.is_in(text, pa.array(_TRUE)), pc.is_in(text, pa.array(_FALSE)), _mask(pc.is_null(text))
    return _checked(_without(true, missing), ~(_mask(pc.or_(true, false)) | missing))


def _times(column: pa.Array, rules: CellRules) -> Converted:
    """Milliseconds since 1970 from seconds, ms, us or ns (told apart by size), which may have fractions, or from
    ISO 8601 text (UTC if naive).
    """
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return _plausible(column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), None)
    if _is_text(column):
        return _times_of_text(column, rules)
    if pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        values, bad = _numbers(column, rules)
    else:
        values, bad = _integers(column, rules)
    return _plausible(_milliseconds(values), bad)


def _times_of_text(column: pa.Array, rules: CellRules) -> Converted:
    try:
        return _plausible(_milliseconds(column.cast(pa.int64())), None)
    except pa.ArrowInvalid:
        encoded = column.dictionary_encode()  # dates are costly to read, and a log has few of them
    values, bad = _times_of_texts(encoded.dictionary, rules)
    rows = encoded.indices
    return values.take(rows), None if bad is None else _mask(pa.array(bad).take(rows))


def _times_of_texts(column: pa.Array, rules: CellRules) -> Converted:
    values, bad = _integers(column, rules)
    times = _milliseconds(values)
    if bad is None:
        return _plausible(times, bad)
    rest = column.filter(pa.array(bad))
    parsed = pc.coalesce(_milliseconds(_numbers(rest, rules)[0]), _dates(rest))
    return _plausible(pc.replace_with_mask(times, pa.array(bad), parsed), _within(bad, _mask(pc.is_null(parsed))))


_TIME_SPELLINGS = (
    (r"\[[^\]]*\]$", ""),  # 2024-03-01T10:00:00Z[UTC], as Java writes it
    (r"^(\d{4})/(\d\d)/(\d\d)", r"\1-\2-\3"),
    (r"^(\d{4}-\d\d-\d\d)\s*(UTC|GMT|Z)$", r"\1"),
    (r"(:\d\d),(\d+)", r"\1.\2"),
    (r"(\.\d{9})\d+", r"\1"),
    (r"([+-]\d\d:?\d\d)\s+[A-Z]{1,5}$", r"\1"),  # 2024-03-01 10:00:00 +0000 UTC, as Go writes it
    (r"\s*(UTC|GMT|Z)$", "Z"),
    (r"\s*(UTC|GMT)\s*([+-])", r"\2"),
    (r"(:\d\d(?:\.\d+)?)\s*([+-])(\d(?::\d\d)?)$", r"\1\20\3"),
)
"""Spellings of times beyond ISO 8601, and what they become."""


def _dates(text: pa.Array) -> pa.Array:
    """Milliseconds since 1970 from dates and times as text; null where a text is neither."""
    text = pc.utf8_upper(pc.utf8_trim_whitespace(text.cast(pa.string())))
    for pattern, replacement in _TIME_SPELLINGS:
        text = pc.replace_substring_regex(text, pattern, replacement)
    dates = pd.to_datetime(text.to_pandas(), format="ISO8601", errors="coerce", utc=True)
    return pa.array(dates, pa.timestamp("ms", "UTC"), safe=False).cast(pa.int64())


def _milliseconds(values: pa.Array) -> pa.Array:
    v = values.fill_null(0).to_numpy(zero_copy_only=False)
    size = np.abs(v)
    ms = np.select([size < 1e11, size < 1e14, size < 1e17], [v * 1000, v, v // 1000], v // 1_000_000)
    return _without(pa.array(np.round(ms).astype(np.int64)), _mask(pc.is_null(values)))


def _plausible(values: pa.Array, bad: np.ndarray | None) -> Converted:
    return _checked(values, bad, _mask(pc.or_(pc.less(values, EARLIEST_MS), pc.greater(values, LATEST_MS))))


def _lists(column: pa.Array, rules: CellRules) -> Converted:
    return convert_lists(column, rules)[0]


def convert_lists(column: pa.Array, rules: CellRules = RULES) -> tuple[Converted, Counter[str]]:
    """Converts a column to `texts`, lists of texts; also returns how often each word for a missing value was an item of
    a list, and dropped.

    A cell is a native list; a list in brackets, as JSON, Python, NumPy or PostgreSQL write it; or items with a
    separator between them: the strongest that the cell has.
    """
    if pa.types.is_list(column.type):
        return _tidied(column, rules)
    text = _without_missing(_plain(column), rules)
    if not _mask(pc.match_substring_regex(text, _OPENING)).any():
        return _tidied(_separated(text, rules.separators), rules)
    plain = _separated(text, rules.separators).to_pylist()
    opened = _mask(pc.match_substring_regex(text, _OPENING))
    lists = [_listed(t) if o else p for t, o, p in zip(text.to_pylist(), opened, plain, strict=True)]
    (values, _), words = _tidied(pa.array(lists, pa.list_(pa.string())), rules)
    return _checked(values, _mask(pc.and_(pc.is_valid(text), pc.is_null(values)))), words


_OPENING = r"""^(\[|\{|\(\s*['"])"""
"""The start of a list in brackets; `(live)` is a text."""
_BRACKETS = {"[": "]", "{": "}", "(": ")"}
_ITEM = re.compile(
    r"""\s*(?:[ub]?('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|([^'",\[\]{}]+?))\s*(?:,|(?=['"])|$)""", re.DOTALL
)
"""A quoted or bare item; NumPy writes no commas between quoted ones."""
_NUMBERS = re.compile(r"[\d.eE+-]+(\s+[\d.eE+-]+)+")


def _listed(text: str) -> list[str | None] | None:
    """The items of a list in brackets; None if it is not a list."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return _items(text[1:-1].strip()) if len(text) > 1 and text.endswith(_BRACKETS[text[0]]) else None
    return [_item(v) for v in values] if isinstance(values, list) or values == {} else None


def _item(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)


def _items(inner: str) -> list[str | None] | None:
    """The items between the brackets of a list that is not JSON; None if they cannot be told apart."""
    if _NUMBERS.fullmatch(inner):
        return list(inner.split())
    items: list[str | None] = []
    position = 0
    while position < len(inner):
        item = _ITEM.match(inner, position)
        if item is None:
            return None
        quoted, bare = item.groups()
        try:
            items.append(bare if quoted is None else str(ast.literal_eval(quoted)))
        except (SyntaxError, ValueError):
            return None
        position = item.end()
    return items


_MARK = "\x1f"


def _separated(text: pa.Array, separators: str) -> pa.Array:
    """Splits each text at the first of the separators that it has."""
    marked = text
    for separator in reversed(separators):
        has = pc.match_substring(text, separator)
        marked = pc.if_else(has, pc.replace_substring(text, separator, _MARK), marked)
    return pc.split_pattern(marked, _MARK)


def _tidied(lists: pa.Array, rules: CellRules) -> tuple[Converted, Counter[str]]:
    """Lists of trimmed texts without missing items, and the words of those; the mask marks lists with an item that is
    not UTF-8.
    """
    row_of = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False).astype(np.int64)
    decoded, undecodable = decode(pc.list_flatten(lists))
    bad = None
    if undecodable is not None:
        bad = np.zeros(len(lists), bool)
        bad[row_of[undecodable]] = True
    plain = _plain(decoded)
    items = _without_missing(plain, rules)
    words = rules.words(plain) if items.null_count > plain.null_count else Counter[str]()
    kept = np.asarray(items.is_valid())
    sizes = np.bincount(row_of[kept], minlength=len(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))
    values = pa.ListArray.from_arrays(offsets, items.filter(pa.array(kept)), mask=pc.is_null(lists))
    return _checked(values, bad), words
