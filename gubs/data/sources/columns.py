"""Converts raw columns (text, bytes or typed values) to our types, with a mask of the cells that do not fit.

Everything is vectorised; only cells that do not fit cost more. Missing is null: an empty text always, and in columns
that are not free text also `nan`, `null`, `none`, `na` and a backslashed N, as data frames and databases write it.
"""

import json
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

Kind = Literal["id", "text", "integer", "number", "flag", "time", "texts"]
"""What a column holds. `time` becomes milliseconds since 1970, UTC; `texts` a list of strings."""

KINDS: dict[Kind, tuple[pa.DataType, str]] = {
    "id": (pa.string(), "not an identifier"),
    "text": (pa.string(), "not a text"),
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

_MISSING = r"(?i)^\s*(nan|null|none|na|\\N)?\s*$"
_DECIMAL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WHOLE = r"^-?(\d{1,18}|[1-8]\d{18})$"
_ROUNDED_ID = r"^\d+(\.\d+)?[eE]\+?\d+$"
_FLOAT_ID = r"^(-?\d+)\.0+$"
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "1.0"), ("0", "false", "f", "no", "n", "0.0")

Converted = tuple[pa.Array, np.ndarray | None]
"""Values, and a mask of the cells that did not fit (None: all fit). Those cells are null."""


def convert(column: pa.Array, kind: Kind) -> Converted:
    """Converts a column to a kind; `KINDS` says why a masked cell does not fit."""
    if kind == "texts":
        return _lists(column)
    if kind == "text":
        return _plain(column), None
    return {"id": _ids, "integer": _integers, "number": _numbers, "flag": _flags, "time": _times}[kind](column)


def decode(column: pa.Array) -> Converted:
    """Bytes as UTF-8 text; the mask marks cells that are not UTF-8. Other columns pass through."""
    if isinstance(column, pa.DictionaryArray):
        return decode(column.dictionary_decode())
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        return column, None
    try:
        return column.cast(pa.string()), None
    except pa.ArrowInvalid:
        bad = _undecodable(column)
        return _without(column, bad).cast(pa.string()), bad


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


def _without_missing(text: pa.Array) -> pa.Array:
    return _without(text, _mask(pc.match_substring_regex(text, _MISSING)))


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


def _ids(column: pa.Array) -> Converted:
    if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
        return column.cast(pa.string()), None
    if not _is_text(column):
        values, bad = _integers(column)
        return values.cast(pa.string()), bad
    values = _without_missing(_plain(column))
    if _mask(pc.ends_with(values, "0")).any():
        values = pc.replace_substring_regex(values, _FLOAT_ID, r"\1")
    return _checked(values, _mask(pc.match_substring_regex(values, _ROUNDED_ID)))


def _parse(column: pa.Array, pattern: str, target: pa.DataType) -> Converted:
    try:
        return column.cast(target), None
    except pa.ArrowInvalid:
        text = _without_missing(pc.utf8_trim_whitespace(column.cast(pa.string())))
    fits = pc.match_substring_regex(text, pattern)
    return pc.if_else(fits, text, None).cast(target), _mask(pc.and_(pc.is_valid(text), pc.invert(fits)))


def _numbers(column: pa.Array) -> Converted:
    bad: np.ndarray | None = None
    if _is_text(column):
        values, bad = _parse(column, _DECIMAL, pa.float64())
    else:
        try:
            values = column.cast(pa.float64(), safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return pa.nulls(len(column), pa.float64()), _mask(pc.is_valid(column))
    values = _nan_to_null(values)
    return _checked(values, bad, _mask(pc.is_inf(values)))


def _integers(column: pa.Array) -> Converted:
    """Whole numbers; `3.0` and `1.5e9` are whole numbers too, up to `EXACT`."""
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64()), None
    if not _is_text(column):
        return _whole(*_numbers(column))
    values, unparsed = _parse(column, _WHOLE, pa.int64())
    if unparsed is None or not unparsed.any():
        return values, None
    rest, bad = _whole(*_numbers(column.filter(pa.array(unparsed))))
    return pc.replace_with_mask(values, pa.array(unparsed), rest), _within(unparsed, bad)


def _whole(values: pa.Array, bad: np.ndarray | None) -> Converted:
    inexact = _mask(pc.or_(pc.not_equal(pc.round(values), values), pc.greater(pc.abs(values), EXACT)))
    values, mask = _checked(values, bad, inexact)
    return values.cast(pa.int64()), mask


def _flags(column: pa.Array) -> Converted:
    if pa.types.is_boolean(column.type):
        return column, None
    if not _is_text(column):
        values, bad = _numbers(column)
        neither = _mask(pc.invert(pc.is_in(values, pa.array([0.0, 1.0])))) & _mask(pc.is_valid(values))
        return _checked(pc.equal(values, 1.0), bad, neither)
    text = _without_missing(pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string()))))
    true, false, missing = pc.is_in(text, pa.array(_TRUE)), pc.is_in(text, pa.array(_FALSE)), _mask(pc.is_null(text))
    return _checked(_without(true, missing), ~(_mask(pc.or_(true, false)) | missing))


def _times(column: pa.Array) -> Converted:
    """Milliseconds since 1970 from seconds, ms, us or ns (told apart by size) or from ISO 8601 text (UTC if naive)."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return _plausible(column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), None)
    values, bad = _numbers(column) if pa.types.is_floating(column.type) else _integers(column)
    times = _milliseconds(values)
    if bad is None or not _is_text(column):
        return _plausible(times, bad)
    rest = column.filter(pa.array(bad))
    dates = pd.to_datetime(rest.to_pandas(), format="ISO8601", errors="coerce", utc=True)
    from_dates = pa.array(dates, pa.timestamp("ms", "UTC"), safe=False).cast(pa.int64())
    parsed = pc.coalesce(_milliseconds(_numbers(rest)[0]), from_dates)
    return _plausible(pc.replace_with_mask(times, pa.array(bad), parsed), _within(bad, _mask(pc.is_null(parsed))))


def _milliseconds(values: pa.Array) -> pa.Array:
    v = values.fill_null(0).to_numpy(zero_copy_only=False)
    size = np.abs(v)
    ms = np.select([size < 1e11, size < 1e14, size < 1e17], [v * 1000, v, v // 1000], v // 1_000_000)
    return _without(pa.array(np.round(ms).astype(np.int64)), _mask(pc.is_null(values)))


def _plausible(values: pa.Array, bad: np.ndarray | None) -> Converted:
    return _checked(values, bad, _mask(pc.or_(pc.less(values, EARLIEST_MS), pc.greater(values, LATEST_MS))))


def _lists(column: pa.Array) -> Converted:
    """Lists of texts: native lists, JSON lists, or texts separated by `|`."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.list_(pa.string())), None
    text = _plain(column)
    if not _mask(pc.starts_with(text, "[")).any():
        return pc.split_pattern(pc.replace_substring_regex(text, r"\s*\|\s*", "|"), "|"), None
    lists = pa.array([_list(t) for t in text.to_pylist()], pa.list_(pa.string()))
    return _checked(lists, _mask(pc.and_(pc.is_valid(text), pc.is_null(lists))))


def _list(text: str | None) -> list[str] | None:
    if text is None or not text.startswith("["):
        return text if text is None else [t.strip() for t in text.split("|")]
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return None
    return [str(v) for v in values] if isinstance(values, list) else None
