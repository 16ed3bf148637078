"""Units of times and play rates: what a setting or a column's name says, and whether the values are plausible.

A wrong unit gives wrong labels without a word: milliseconds taken for seconds make every view a repeated one, and
percentages make every view a finished one. So the values are checked against what videos are like. The evidence is a
few small histograms, which are made block by block and added up (`Sizes`, `Evidence`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
"""Seconds in each unit of time."""
RATE_UNITS = {"share": 1.0, "percent": 0.01}
"""Watched share of the video in each unit of play rates."""
_WORDS = {
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "min": "minutes",
    "h": "hours",
}
_SUFFIXES = {
    "ms": re.compile(r"(_(ms|msec|msecs|millis|milliseconds)|(?<=[a-z])(Ms|Msec|Millis|Milliseconds))$"),
    "us": re.compile(r"(_(us|usec|micros|microseconds)|(?<=[a-z])(Micros|Microseconds))$"),
    "ns": re.compile(r"(_(ns|nsec|nanos|nanoseconds)|(?<=[a-z])(Nanos|Nanoseconds))$"),
    "min": re.compile(r"(_(mins|minutes)|(?<=[a-z])Minutes)$"),
    "percent": re.compile(r"(_(percent|pct|percentage)|(?<=[a-z])(Percent|Pct|Percentage))$"),
}
"""Ends of columns' names that tell a unit."""

LONGEST_TYPICAL_S = 1800.0
"""Half of the videos of a feed are shorter than this, unless a setting says that they are in seconds."""
SHORTEST_TYPICAL_S = 1.0
LONGEST_GAP_S = 3600.0
"""As for `LONGEST_TYPICAL_S`: times between two operations in an app."""
SHORTEST_TIMES_WATCHED, SHORTEST_GAP_S, SHORT_SHARE = 3.0, 60.0, 0.1
"""A share of the gaps is shorter than so many typical views (by watch time, else by duration), or than so many seconds
where that is more: who watches on operates the app again at the end of a view. Where more than half of the gaps are 0,
the others may be pauses between sessions, and nothing is said."""
STATED_S = (0.1, 86_400.0)
"""Shortest and longest typical video where a setting states the unit."""
HIGHEST_TYPICAL_RATE = 1.5
"""If half of the play rates above 0 are above this, they are not shares of a video."""
REPEATED_OFTEN, OFTEN_SHARE = 10.0, 0.05
"""A share of the views above which nobody watches a video this many times over."""
LOWEST_TOP_RATE = 0.02
"""In a log of any size, somebody watches more than this of a video."""
LOWEST_TYPICAL_RATE = 0.01
"""Half of the play rates above 0 are above this."""
LEAST_RATE, CONTRADICTION = 0.05, 1.5
"""A given play rate and the watch time by duration contradict each other if they differ more than this many times; both
count as at least the first and at most 1, since times in whole seconds are inexact where little was watched."""
CONTRADICTING_SHARE = 0.5
"""Share of the views above which contradictions are not exceptions."""
LONGEST_S, LONG_SHARE = 14_400.0, 0.01
"""A share of the videos above which none of a feed is this long, unless a setting says that they are in seconds."""
ENOUGH = 20
"""Values from which low ones count as evidence."""


def converted(values: pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    """Values of a unit in seconds, or as shares."""
    factor = (TIME_UNITS | RATE_UNITS)[unit]
    return pc.multiply(values, factor) if factor >= 1 else pc.divide(values, float(round(1 / factor)))


def named_unit(name: str) -> str | None:
    """The unit that a column's name tells, if any: `play_time_ms`, `durationMillis`, `rate_percent`."""
    return next((unit for unit, suffix in _SUFFIXES.items() if suffix.search(name)), None)


_BINS_PER_DOUBLING, _DOUBLINGS = 16, (-40, 60)
_BINS = _BINS_PER_DOUBLING * (_DOUBLINGS[1] - _DOUBLINGS[0])


@dataclass(frozen=True)
class Sizes:
    """How large positive values are: a histogram with bins of 4 %, to which others can be added."""

    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    zeros: int = 0
    """How many values are 0; the histogram is of the others."""

    @classmethod
    def of(cls, values: pa.ChunkedArray) -> Self:
        """The sizes of the values above 0; those below and nulls are left out."""
        array = np.asarray(values.to_numpy(), float)
        logs = np.log2(array[array > 0])  # false for null, which is nan
        bins = np.floor((logs - _DOUBLINGS[0]) * _BINS_PER_DOUBLING).astype(np.int64)
        return cls(np.bincount(np.clip(bins, 0, _BINS - 1), minlength=_BINS), int((array == 0).sum()))

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(self.counts + other.counts, self.zeros + other.zeros)

    @property
    def n(self) -> int:
        """How many values above 0 there are."""
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """A value that is larger than this share of the values, within 5 %; nan if there are none."""
        if not self.n:
            return math.nan
        position = int(np.searchsorted(np.cumsum(self.counts), max(1.0, share * self.n)))
        return float(2.0 ** ((position + 0.5) / _BINS_PER_DOUBLING + _DOUBLINGS[0]))

    @property
    def median(self) -> float:
        """The median; nan if there are no values."""
        return self.quantile(0.5)

    def share_above(self, value: float) -> float:
        """Share of the values above this one."""
        first = math.floor((math.log2(value) - _DOUBLINGS[0]) * _BINS_PER_DOUBLING)
        return float(self.counts[first:].sum() / self.n) if self.n else 0.0


@dataclass(frozen=True)
class Evidence:
    """What the values of a log, in seconds and shares as they were understood, say about their units."""

    watch: Sizes = field(default_factory=Sizes)
    duration: Sizes = field(default_factory=Sizes)
    """Durations in `interactions`."""
    video_duration: Sizes = field(default_factory=Sizes)
    """Durations in `videos`."""
    prev_op_gap: Sizes = field(default_factory=Sizes)
    next_op_gap: Sizes = field(default_factory=Sizes)
    given_rate: Sizes = field(default_factory=Sizes)
    """The column `play_rate`."""
    rate: Sizes = field(default_factory=Sizes)
    """Watch time by duration."""
    implied_duration: Sizes = field(default_factory=Sizes)
    """Watch time by given play rate."""
    agreement: Sizes = field(default_factory=Sizes)
    """Duration in `interactions` by that in `videos`."""
    rate_agreement: Sizes = field(default_factory=Sizes)
    """Given play rate by watch time / duration, both from `LEAST_RATE` to 1."""

    @classmethod
    def of(cls, block: pa.Table, durations: pa.ChunkedArray) -> Self:
        """The evidence of one block of interactions.

        Args:
            block: watch_s, duration_s, play_rate, and the gaps if they are the log's own.
            durations: of the rows' videos by the table `videos`; null where it has none.
        """
        positive = [_positive(c) for c in (block["duration_s"], durations)]
        duration = pc.coalesce(*positive)
        rate = pc.divide(block["watch_s"], duration)
        own = {f"{name}_op_gap": Sizes.of(block[f"{name}_op_gap_s"]) for name in ("prev", "next") if _has(block, name)}
        return cls(
            watch=Sizes.of(block["watch_s"]),
            duration=Sizes.of(block["duration_s"]),
            given_rate=Sizes.of(block["play_rate"]),
            rate=Sizes.of(rate),
            implied_duration=Sizes.of(pc.divide(block["watch_s"], _positive(block["play_rate"]))),
            agreement=Sizes.of(pc.divide(*positive)),
            rate_agreement=Sizes.of(pc.divide(*(_bounded(r) for r in (block["play_rate"], rate)))),
            **own,
        )

    def __add__(self, other: "Evidence") -> "Evidence":
        return Evidence(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def _has(block: pa.Table, gap: str) -> bool:
    return f"{gap}_op_gap_s" in block.column_names


def _bounded(rates: pa.ChunkedArray) -> pa.ChunkedArray:
    """Play rates from `LEAST_RATE` to 1; null stays null."""
    least = pc.max_element_wise(rates, LEAST_RATE, skip_nulls=False)
    return pc.min_element_wise(least, 1.0, skip_nulls=False)


def _positive(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.greater(values, 0), values, None)


@dataclass(frozen=True)
class Example:
    """The first value above 0 of a column."""

    file: int
    line: int
    label: str
    name: str
    value: float


@dataclass(frozen=True)
class UnitEvidence:
    """What the values say about their units, with an example of each column; adds up over parts."""

    sizes: Evidence = field(default_factory=Evidence)
    examples: dict[str, Example] = field(default_factory=dict)
    """By column."""

    def __add__(self, other: "UnitEvidence") -> "UnitEvidence":
        both = [(c, e) for examples in (self.examples, other.examples) for c, e in examples.items()]
        ordered = sorted(both, key=lambda item: (item[1].file, item[1].line), reverse=True)
        return UnitEvidence(self.sizes + other.sizes, dict(ordered))


def total(parts: Iterator[Evidence]) -> Evidence:
    """The evidence of all blocks."""
    return reduce(Evidence.__add__, parts, Evidence())


@dataclass(frozen=True)
class Objection:
    """Why the values of a column cannot have the unit that they were taken to have."""

    table: str
    column: str
    """Our name."""
    reason: str
    remedy: str


Stated = Mapping[tuple[str, str], str]
"""(table, our column) -> the unit that a setting states."""


def objections(evidence: Evidence, stated: Stated) -> list[Objection]:
    """What speaks against the units of a log; empty if nothing does."""
    lengths = [
        *_implausible_length(evidence.watch, "interactions", "watch_s", stated),
        *_implausible_length(evidence.duration, "interactions", "duration_s", stated),
        *_implausible_length(evidence.video_duration, "videos", "duration_s", stated),
        *_implausible_gap(evidence.prev_op_gap, evidence, "prev_op_gap_s", stated),
        *_implausible_gap(evidence.next_op_gap, evidence, "next_op_gap_s", stated),
    ]
    results = [*lengths, *_implausible_given(evidence, stated)]
    results = results or [*_disagreement(evidence), *_implausible_rate(evidence, stated)]
    return results or [*_contradiction(evidence, stated)]


def key(table: str, column: str) -> str:
    """The setting that states a column's unit."""
    name = column.removesuffix("_s")
    return f"source.units.{table}.{name}" if name == "duration" else f"source.units.{name}"


def _implausible_length(sizes: Sizes, table: str, column: str, stated: Stated) -> Iterator[Objection]:
    unit = stated.get((table, column))
    shortest, longest = STATED_S if unit else (SHORTEST_TYPICAL_S, LONGEST_TYPICAL_S)
    setting = key(table, column)
    if sizes.median > longest:
        likely = _finer_unit(sizes.median)
        yield Objection(
            table,
            column,
            f"half of the values above 0 are over {sizes.median:,.0f} s, longer than the videos of a feed; they look "
            f"like {_WORDS[likely]}",
            f"{setting}={likely} (or {setting}=s if they are seconds)",
        )
    elif column == "duration_s" and not unit and sizes.n >= ENOUGH and sizes.share_above(LONGEST_S) > LONG_SHARE:
        yield Objection(
            table,
            column,
            f"{sizes.share_above(LONGEST_S):.0%} of the values are over {LONGEST_S / 3600:g} hours; some look like "
            f"{_WORDS[_finer_unit(LONGEST_S)]}, perhaps those of one file",
            f"{setting}=s if all are seconds; else convert the others before",
        )
    elif column == "duration_s" and sizes.n >= (1 if unit else ENOUGH) and sizes.median < shortest:
        yield Objection(
            table,
            column,
            f"half of the values are under {sizes.median:.2g} s, shorter than any video",
            f"{setting} to their unit ({', '.join(TIME_UNITS)})",
        )


def _finer_unit(seconds: float) -> str:
    """The coarsest unit below seconds in which the value is no longer too long."""
    return next((u for u in ("ms", "us", "ns") if seconds * TIME_UNITS[u] <= LONGEST_TYPICAL_S), "ns")


def _implausible_gap(sizes: Sizes, evidence: Evidence, column: str, stated: Stated) -> Iterator[Objection]:
    if ("interactions", column) in stated:
        return
    shortest = _shortest_gap(evidence)
    if sizes.median > LONGEST_GAP_S:
        reason = f"half of the values above 0 are over {sizes.median:,.0f} s"
    elif sizes.n >= max(ENOUGH, sizes.zeros) and sizes.quantile(SHORT_SHARE) > shortest:
        reason = f"{1 - SHORT_SHARE:.0%} of the values above 0 are over {shortest:,.0f} s"
    else:
        return
    setting, likely = key("interactions", column), _finer_unit(sizes.median)
    yield Objection(
        "interactions",
        column,
        f"{reason}, longer than users wait between two operations; they look like {_WORDS[likely]}",
        f"{setting}={likely} (or {setting}=s if they are seconds)",
    )


def _shortest_gap(evidence: Evidence) -> float:
    """Some gaps of any log are shorter than this many seconds."""
    lengths = (evidence.watch, evidence.duration, evidence.video_duration)
    typical = next((sizes.median for sizes in lengths if sizes.n), 0.0)
    return max(SHORTEST_GAP_S, SHORTEST_TIMES_WATCHED * typical)


def _implausible_given(evidence: Evidence, stated: Stated) -> Iterator[Objection]:
    rates, unit = evidence.given_rate, stated.get(("interactions", "play_rate"))
    if unit == "percent" and rates.n >= ENOUGH and rates.quantile(0.99) < LOWEST_TOP_RATE:
        yield Objection(
            "interactions",
            "play_rate",
            f"as percentages, 99 of 100 are below {rates.quantile(0.99):.2g} of the video",
            "source.units.play_rate=share",
        )
    if unit:
        return
    if rates.median > HIGHEST_TYPICAL_RATE or rates.share_above(REPEATED_OFTEN) > OFTEN_SHARE:
        yield Objection(
            "interactions",
            "play_rate",
            f"of the values above 0, half are over {rates.median:.3g} and {rates.share_above(1):.0%} are above 1; they "
            f"are to be the watched share of the video, 0 to 1",
            "source.units.play_rate=percent (or source.units.play_rate=share if videos are repeated that often)",
        )
    elif evidence.implied_duration.n and not evidence.duration.n and not evidence.video_duration.n:
        for objection in _implausible_length(evidence.implied_duration, "interactions", "watch_s", stated):
            yield Objection(
                objection.table, objection.column, f"by the play rates, {objection.reason}", objection.remedy
            )


def _disagreement(evidence: Evidence) -> Iterator[Objection]:
    ratio = evidence.agreement.median
    if ratio > 5 or ratio < 0.2:
        yield Objection(
            "interactions",
            "duration_s",
            f"half of the values are over {ratio:.3g} times those of the same videos in the table 'videos'",
            "the unit of the wrong one, source.units.interactions.duration or source.units.videos.duration",
        )


def _contradiction(evidence: Evidence, stated: Stated) -> Iterator[Objection]:
    ratio = evidence.rate_agreement
    apart = ratio.share_above(CONTRADICTION) + 1 - ratio.share_above(1 / CONTRADICTION)
    if ("interactions", "play_rate") in stated or ratio.n < ENOUGH or apart <= CONTRADICTING_SHARE:
        return
    yield Objection(
        "interactions",
        "play_rate" if evidence.given_rate.n else "watch_s",
        f"of the rows with a play rate, a watch time and a duration, {apart:.0%} have a play rate that is over "
        f"{CONTRADICTION:g} times the watch time / duration, or as far below it",
        "source.units.play_rate to its unit (share or percent) if the play rates are right; if the times are, rename "
        "or remove the column of play rates",
    )


def _implausible_rate(evidence: Evidence, stated: Stated) -> Iterator[Objection]:
    rates = evidence.rate
    both = ("interactions", "watch_s") in stated and any(column == "duration_s" for _, column in stated)
    if both:
        return
    if rates.median > HIGHEST_TYPICAL_RATE or rates.share_above(REPEATED_OFTEN) > OFTEN_SHARE:
        reason = (
            f"of the views with a watch time, {rates.share_above(1):.0%} are longer than the video, and half are over "
            f"{rates.median:.3g} times its duration"
        )
    elif rates.n >= ENOUGH and rates.quantile(0.99) < LOWEST_TOP_RATE:
        reason = f"99 of 100 views watch less than {rates.quantile(0.99):.2g} of the video"
    elif rates.n >= ENOUGH and rates.median < LOWEST_TYPICAL_RATE:
        reason = f"half of the views watch less than {rates.median:.2g} of the video"
    else:
        return
    table = "interactions" if evidence.duration.n else "videos"
    yield Objection(
        "interactions",
        "watch_s",
        f"{reason}; watch times and durations have different units",
        f"{key('interactions', 'watch_s')} and {key(table, 'duration_s')}, for example source.units.watch=ms; both, if "
        f"they are right",
    )
