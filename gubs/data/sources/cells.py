"""Turns raw table columns (text, bytes or typed values) into typed columns, with a mask of the cells that do not fit.

Everything is vectorised; only cells that do not fit cost more. Missing is null: an empty text always, and in columns
that are not free text also `nan`, `null`, `none`, `na` and a backslashed N, as data frames and databases write it.
"""

import json
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

Kind = Literal["id", "text", "integer", "number", "flag", "time", "texts"]
"""What a column holds. `time` becomes milliseconds since 1970, UTC; `texts` a list of strings."""

CAUSES: dict[Kind, str] = {
    "id": "not an identifier",
    "text": "not a text",
    "integer": "not a whole number",
    "number": "not a finite number",
    "flag": "neither true nor false",
    "time": "not a time between 1990 and 2100",
    "texts": "not a list of texts",
}
"""What is said of a cell that does not fit its kind."""

EXACT = 2**53
"""Whole numbers beyond this cannot be told apart once they were stored as floats."""

EARLIEST_MS, LATEST_MS = 631_152_000_000, 4_102_444_800_000
"""1990 and 2100: times outside are taken for a wrong unit or a wrong column."""

_MISSING = r"(?i)^\s*(nan|null|none|na|\\N)?\s*$"
_DECIMAL = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WHOLE = r"^-?(\d{1,18}|[1-8]\d{18})$"
_ROUNDED_ID = r"^\d+(\.\d+)?[eE]\+?\d+$"
_FLOAT_ID = r"^(-?\d+)\.0+$"
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "1.0"), ("0", "false", "f", "no", "n", "0.0")

Typed = tuple[pa.Array, np.ndarray | None]
"""Values, and a mask of the cells that did not fit (None: all fit). Cells that did not fit are null."""


def convert(column: pa.Array, kind: Kind) -> Typed:
    """Brings a column into a kind; see `CAUSES` for what a masked cell is called."""
    if kind == "texts":
        return _lists(column)
    if kind == "text":
        return _plain(column), None
    return {"id": _ids, "integer": _integers, "number": _numbers, "flag": _flags, "time": _times}[kind](column)


def decode(column: pa.Array) -> Typed:
    """Bytes as UTF-8 text; the mask marks cells that are not UTF-8. Other columns pass through."""
    if isinstance(column, pa.DictionaryArray):
        return decode(column.dictionary_decode())
    if not _is_bytes(column.type):
        return column, None
    try:
        return column.cast(pa.string()), None
    except pa.ArrowInvalid:
        bad = _undecodable(column)
        return pc.if_else(pa.array(bad), None, column).cast(pa.string()), bad


def _is_bytes(t: pa.DataType) -> bool:
    return bool(pa.types.is_binary(t) or pa.types.is_large_binary(t))


def _is_text(t: pa.DataType) -> bool:
    return bool(pa.types.is_string(t) or pa.types.is_large_string(t))


def _undecodable(column: pa.Array) -> np.ndarray:
    """Finds the cells that are not UTF-8 by halving: cheap where they are few."""
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


def _blank(column: pa.Array, bad: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(bad), None, column) if bad.any() else column


def _typed(values: pa.Array, bad: np.ndarray) -> Typed:
    return (_blank(values, bad), bad) if bad.any() else (values, None)


def _plain(column: pa.Array) -> pa.Array:
    if pa.types.is_nested(column.type):
        values = column.to_pylist(maps_as_pydicts="strict")
        return pa.array([None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in values])
    if not _is_text(column.type):
        return _nan_to_null(column).cast(pa.string())
    text = column.cast(pa.string())
    if _may_need_trimming(text):
        text = pc.utf8_trim_whitespace(text)
    return _blank(text, _mask(pc.equal(pc.binary_length(text), 0)))


def _may_need_trimming(text: pa.Array) -> bool:
    """Whether any byte could belong to white space: looking is far cheaper than trimming columns of bare numbers."""
    data = text.buffers()[2]
    if data is None:
        return False
    codes = np.frombuffer(data, np.uint8)
    return bool(((codes <= 32) | (codes >= 128)).any())


def _nan_to_null(column: pa.Array) -> pa.Array:
    if not pa.types.is_floating(column.type):
        return column
    return _blank(column, _mask(pc.is_nan(column)))


def _ids(column: pa.Array) -> Typed:
    if not _is_text(column.type):
        if pa.types.is_integer(column.type) or pa.types.is_boolean(column.type):
            return column.cast(pa.string()), None
        values, bad = _integers(column)
        return values.cast(pa.string()), bad
    values = _plain(column)
    values = _blank(values, _mask(pc.match_substring_regex(values, _MISSING)))
    if _mask(pc.ends_with(values, "0")).any():
        values = pc.replace_substring_regex(values, _FLOAT_ID, r"\1")
    return _typed(values, _mask(pc.match_substring_regex(values, _ROUNDED_ID)))


def _parse(column: pa.Array, pattern: str, target: pa.DataType) -> Typed:
    try:
        return column.cast(target), None
    except pa.ArrowInvalid:
        text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    text = _blank(text, _mask(pc.match_substring_regex(text, _MISSING)))
    fits = pc.match_substring_regex(text, pattern)
    values = pc.if_else(fits, text, None).cast(target)
    return values, _mask(pc.and_(pc.is_valid(text), pc.invert(fits)))


def _numbers(column: pa.Array) -> Typed:
    bad: np.ndarray | None = None
    if _is_text(column.type):
        values, bad = _parse(column, _DECIMAL, pa.float64())
    else:
        try:
            values = column.cast(pa.float64(), safe=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            return pa.nulls(len(column), pa.float64()), _mask(pc.is_valid(column))
    values = _nan_to_null(values)
    infinite = _mask(pc.is_inf(values))
    return _typed(values, infinite if bad is None else infinite | bad)


def _integers(column: pa.Array) -> Typed:
    """Whole numbers; `3.0` and `1.5e9` are whole numbers too, up to `EXACT`."""
    if pa.types.is_integer(column.type) and column.type != pa.uint64():
        return column.cast(pa.int64()), None
    if not _is_text(column.type):
        return _whole(*_numbers(column))
    values, bad = _parse(column, _WHOLE, pa.int64())
    if bad is None or not bad.any():
        return values, None
    rest, still = _whole(*_numbers(column.filter(pa.array(bad))))
    values = pc.replace_with_mask(values, pa.array(bad), rest)
    if still is not None:
        left = bad.copy()
        left[bad] = still
        return values, left
    return values, None


def _whole(values: pa.Array, bad: np.ndarray | None) -> Typed:
    broken = pc.or_(pc.not_equal(pc.round(values), values), pc.greater(pc.abs(values), EXACT))
    all_bad = _mask(broken) if bad is None else _mask(broken) | bad
    values, mask = _typed(values, all_bad)
    return values.cast(pa.int64()), mask


def _flags(column: pa.Array) -> Typed:
    if pa.types.is_boolean(column.type):
        return column, None
    if not _is_text(column.type):
        values, bad = _numbers(column)
        wrong = _mask(pc.invert(pc.is_in(values, pa.array([0.0, 1.0])))) & _mask(pc.is_valid(values))
        return _typed(pc.equal(values, 1.0), wrong if bad is None else wrong | bad)
    text = pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string())))
    text = _blank(text, _mask(pc.match_substring_regex(text, _MISSING)))
    true = pc.is_in(text, pa.array(_TRUE))
    known = _mask(pc.or_(true, pc.is_in(text, pa.array(_FALSE)))) | ~_mask(pc.is_valid(text))
    return _typed(_blank(true, ~_mask(pc.is_valid(text))), ~known)


def _times(column: pa.Array) -> Typed:
    """Milliseconds since 1970 from seconds, ms, us or ns (told apart by size) or from ISO 8601 text (UTC if naive)."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        return _plausible(column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()), None)
    if not _is_text(column.type):
        values, wrong = _numbers(column) if pa.types.is_floating(column.type) else _integers(column)
        return _plausible(_milliseconds(values), wrong)
    values, bad = _integers(column)
    times = _milliseconds(values)
    if bad is None:
        return _plausible(times, None)
    rest = column.filter(pa.array(bad))
    found = pc.coalesce(_milliseconds(_numbers(rest)[0]), _calendar(rest))
    still = bad.copy()
    still[bad] = ~_mask(pc.is_valid(found))
    return _plausible(pc.replace_with_mask(times, pa.array(bad), found), still)


def _milliseconds(values: pa.Array) -> pa.Array:
    missing = ~_mask(pc.is_valid(values))
    v = values.fill_null(0).to_numpy(zero_copy_only=False)
    size = np.abs(v)
    ms = np.select([size < 1e11, size < 1e14, size < 1e17], [v * 1000, v, v // 1000], v // 1_000_000)
    return _blank(pa.array(np.round(ms).astype(np.int64)), missing)


def _calendar(text: pa.Array) -> pa.Array:
    times = pd.to_datetime(text.to_pandas(), format="ISO8601", errors="coerce", utc=True)
    return pa.array(times, pa.timestamp("ms", "UTC"), safe=False).cast(pa.int64())


def _plausible(values: pa.Array, bad: np.ndarray | None) -> Typed:
    outside = _mask(pc.or_(pc.less(values, EARLIEST_MS), pc.greater(values, LATEST_MS)))
    return _typed(values, outside if bad is None else outside | bad)


def _lists(column: pa.Array) -> Typed:
    """Lists of texts: native lists, JSON lists, or texts separated by `|`."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.list_(pa.string())), None
    text = _plain(column)
    if not _mask(pc.starts_with(text, "[")).any():
        return pc.split_pattern(pc.replace_substring_regex(text, r"\s*\|\s*", "|"), "|"), None
    lists = [_list(t) for t in text.to_pylist()]
    bad = np.array([t is not None and found is None for t, found in zip(text.to_pylist(), lists, strict=True)], bool)
    return pa.array(lists, pa.list_(pa.string())), bad if bad.any() else None


def _list(text: str | None) -> list[str] | None:
    if text is None or not text.startswith("["):
        return text if text is None else [t.strip() for t in text.split("|")]
    try:
        found: Any = json.loads(text)
    except json.JSONDecodeError:
        return None
    return [str(t) for t in found] if isinstance(found, list) else None
