"""What the records of users say, by plain code: the table that every group's profile is checked against.

Each section counts one kind of thing (users who list a tag, views of a topic played to the end, ...) per user, once for
all users; a group's findings are sums over its members. Nothing here asks a language model.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from gubs.prompts.complaints import COMPLAINTS
from gubs.prompts.people import Person
from gubs.records import FAST_SKIP_BELOW, FINISH_ABOVE, Finding, User, Video
from gubs.ugm.words import words

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

RECORD_COLUMNS = (
    *("user_id", "video_id", "timestamp", "play_rate", "clicked", "rating", "liked", "disliked", "dislike_reason"),
)
"""Columns of the log that the evidence is counted from."""

SECTIONS: dict[str, str] = {
    "interest": "members who list the tag",
    "finished": "views of the topic played to the end",
    "skipped": "views of the topic that are fast skips",
    "clicked": "exposures of the topic that were clicked",
    "liked": "rated items of the topic that are liked",
    "length": "mean play rate of views by length",
    "skipped by length": "views of the length that are fast skips",
    "word": "views with the word in the title that were disliked",
    "complaint": "views disliked with such a remark",
    "person": "members of whom it is known",
    "activity": "all records",
}
"""What each section counts, for people and prompts."""

LENGTHS_S: tuple[float, ...] = (15, 30, 60, 90)
"""Bounds between lengths, in seconds."""
LENGTHS = ("under 15 s", "15-30 s", "30-60 s", "60-90 s", "over 90 s")
VIEWS_EACH = "records per member"
"""Item of the section `activity` that is a mean number, not a share."""

_KEPT = 12
"""Findings per section: those farthest from everybody's."""
_FEWEST = 3
"""Records below which nothing is said about an item."""
_Z = 1.96
_MOST_WORDS = 400
_PRIOR = 4.0
"""Records by which a rate is drawn to everybody's, so that few records say little."""


@dataclass(frozen=True)
class Counts:
    """One section over all users: per user and item, how many records there are and the sum of their values."""

    section: str
    items: list[str]
    n: sparse.csr_matrix
    """(users, items)"""
    total: sparse.csr_matrix
    squares: sparse.csr_matrix | None = None
    """Sums of squares, for means; None for shares."""

    def findings(self, members: Ints) -> list[Finding]:
        """About the items of which the members have records, those farthest from everybody's first."""
        n, total, squares = (_sums(m, members) for m in (self.n, self.total, self.squares))
        all_n, all_total, _ = (_sums(m, None) for m in (self.n, self.total, self.squares))
        ranked = []
        for i in np.flatnonzero(n >= min(_FEWEST, max(len(members), 1))):
            value, overall = total[i] / n[i], all_total[i] / all_n[i]
            low, high = interval(total[i], n[i], None if self.squares is None else squares[i])
            finding = Finding(self.section, self.items[i], value, overall, low, high, int(n[i]))
            ranked.append((-abs(value - overall) / (high - low + 1e-9), finding))
        return [f for _, f in sorted(ranked, key=lambda pair: (pair[0], pair[1].item))[:_KEPT]]

    def rates(self, members: Ints | None, weight: float = 0.0, prior: Floats | None = None) -> Floats:
        """Value of each item for these users (None: all), as if `weight` further records had the value `prior`."""
        n, total = _sums(self.n, members), _sums(self.total, members)
        towards = np.zeros_like(n) if prior is None else prior
        return np.where(n + weight > 0, (total + weight * towards) / np.maximum(n + weight, 1e-9), towards)


@dataclass(frozen=True)
class Records:
    """The people whom groups are made from, and their whole histories as counts."""

    user_ids: list[str]
    counts: dict[str, Counts]
    """By section."""

    def findings(self, user_ids: Iterable[str], sections: Sequence[str] = tuple(SECTIONS)) -> list[Finding]:
        """The evidence about a group, section by section."""
        place = {u: i for i, u in enumerate(self.user_ids)}
        members = np.array(sorted(place[u] for u in user_ids), np.int64)
        return [f for s in sections if s in self.counts for f in self.counts[s].findings(members)]

    def items(self, *sections: str) -> list[str]:
        """All items of some sections, without repetitions."""
        return list(dict.fromkeys(i for s in sections if s in self.counts for i in self.counts[s].items))


def odds(records: Records, members: Sequence[str]) -> dict[str, float]:
    """How much better the other members' records explain each member's own than everybody's do: the logarithm of the
    odds, from the outcomes of views by topic and length. 0 for members without records.
    """
    place = {u: i for i, u in enumerate(records.user_ids)}
    group = np.array([place[u] for u in members], np.int64)
    sums = np.zeros(len(group))
    for section in ("skipped", "clicked", "liked"):
        if section in records.counts:
            sums += _log_odds(records.counts[section], group)
    return dict(zip(members, map(float, sums), strict=True))


def _log_odds(counts: Counts, group: Ints) -> Floats:
    n, total = (m[group].toarray() for m in (counts.n, counts.total))
    rest_n, rest_total = counts.n.sum(axis=0) - n.sum(axis=0), counts.total.sum(axis=0) - total.sum(axis=0)
    everybody = np.asarray((rest_total + 0.5) / (rest_n + 1)).ravel()
    own_n, own_total = n.sum(axis=0) - n, total.sum(axis=0) - total  # without the member's own
    rate = (own_total + _PRIOR * everybody) / (own_n + _PRIOR)
    gain = total * np.log(rate / everybody) + (n - total) * np.log((1 - rate) / (1 - everybody))
    return np.asarray(gain.sum(axis=1)).ravel()


PROFILE_SECTIONS = ("interest", "person")
"""What is known without histories."""


def read_records(people: Sequence[Person], log: pa.Table, videos: Mapping[str, Video]) -> Records:
    """Counts everything once.

    Args:
        people: the users.
        log: their views (`RECORD_COLUMNS`), only those that a model may see.
        videos: all videos by id.
    """
    place = {p.user.user_id: i for i, p in enumerate(people)}
    users = np.array([place[u] for u in log["user_id"].to_pylist()], np.int64)
    shown = [videos[v] for v in log["video_id"].to_pylist()]
    column = {name: _numbers(log[name]) for name in ("play_rate", "clicked", "liked", "disliked")}
    remarks = log["dislike_reason"].to_pylist()
    sections = [
        *_people_counts([p.with_tags for p in people]),
        *_topic_counts(users, shown, column, len(people)),
        *_length_counts(users, shown, column["play_rate"], len(people)),
        *_dislike_counts(users, shown, column["disliked"], remarks, len(people)),
        *_activity_counts(users, column, len(people)),
    ]
    return Records(list(place), {c.section: c for c in sections if c.items})


def person_items(user: User) -> dict[str, str]:
    """The known facts about a person, by name; ages as decades."""
    age = {"age": f"{user.age // 10 * 10}s"} if user.age is not None else {}
    facts = {"gender": user.gender, "occupation": user.occupation, **user.other}
    return age | {name: value.casefold() for name, value in facts.items() if value}


def length_of(video: Video) -> str | None:
    """The class of a video's length."""
    if video.duration_s is None:
        return None
    return LENGTHS[int(np.searchsorted(LENGTHS_S, video.duration_s, side="right"))]


def complaint_of(remark: str | None) -> str | None:
    """The kind of complaint that a remark about a dislike is."""
    text = (remark or "").casefold()
    return next((name for name, pattern in COMPLAINTS.items() if re.search(pattern, text)), None) if text else None


def interval(total: float, n: float, squares: float | None = None) -> tuple[float, float]:
    """95 % interval of a share (Wilson), or with the sum of squares of a mean (normal). Records count as independent,
    so it is somewhat too narrow where few users have many.
    """
    if n <= 0:
        return 0.0, 1.0
    mean = total / n
    if squares is not None:
        half = _Z * float(np.sqrt(max(squares / n - mean**2, 0.0) / n)) + 0.5 / n  # equal values are not certain
        return mean - half, mean + half
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * float(np.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))) / (1 + _Z**2 / n)
    return (centre - half if total else 0.0), (centre + half if total < n else 1.0)


def in_words(findings: Iterable[Finding], limit: int = 5) -> list[str]:
    """The evidence as lines for a prompt, one per section, with at most `limit` items each: those in which the group
    differs from everybody by more than chance.
    """
    by_section: dict[str, list[Finding]] = {}
    for f in findings:
        if f.above or f.below:
            by_section.setdefault(f.section, []).append(f)
    lines = []
    for section, rows in by_section.items():
        items = "; ".join(f"{f.item} {number(f, f.value)} (all users {number(f, f.overall)})" for f in rows[:limit])
        lines.append(f"{section} ({SECTIONS[section]}): {items}")
    return lines


def overview(records: Records, limit: int = 10) -> list[str]:
    """What is known of all users without their histories, as lines for a prompt: the commonest interests and facts."""
    lines = []
    for section in PROFILE_SECTIONS:
        if counts := records.counts.get(section):
            common = sorted(zip(counts.rates(None), counts.items, strict=True), key=lambda pair: (-pair[0], pair[1]))
            lines.append(f"{section}: {'; '.join(f'{item} {rate:.0%}' for rate, item in common[:limit])}")
    return lines


def number(finding: Finding, value: float) -> str:
    """A value as text: a percentage, or a mean number."""
    return f"{value:.1f}" if finding.item == VIEWS_EACH else f"{value:.0%}"


def _people_counts(users: Sequence[User]) -> list[Counts]:
    tags = [[t.casefold() for t in u.tags] for u in users]
    interest = [(i, tag) for i, listed in enumerate(tags) for tag in set(listed)]
    items = _common(tag for _, tag in interest)
    with_tags = np.array([i for i, listed in enumerate(tags) if listed], np.int64)
    facts = [person_items(u) for u in users]
    all_facts = sorted({(name, value) for f in facts for name, value in f.items()})
    pairs = [(i, f"{name}: {value}") for i, f in enumerate(facts) for name, value in f.items()]
    asked = [(i, f"{name}: {value}") for i, f in enumerate(facts) for name, value in all_facts if name in f]
    return [
        _counts("interest", _crossed(with_tags, items), interest, items, len(users)),
        _counts("person", asked, pairs, [f"{name}: {value}" for name, value in all_facts], len(users)),
    ]


def _topic_counts(users: Ints, shown: Sequence[Video], column: Mapping[str, Floats], size: int) -> list[Counts]:
    topics = [[t.casefold() for t in v.tags] for v in shown]
    items = _common(t for listed in topics for t in listed)
    rows = np.repeat(np.arange(len(shown)), [len(t) for t in topics]).astype(np.int64)
    names = [t for listed in topics for t in listed]
    rate = column["play_rate"]
    outcomes = {
        "finished": _flag(rate > FINISH_ABOVE, rate),
        "skipped": _flag(rate < FAST_SKIP_BELOW, rate),
        "clicked": column["clicked"],
        "liked": column["liked"],
    }
    return [_outcome(s, users, rows, names, values, items, size) for s, values in outcomes.items()]


def _length_counts(users: Ints, shown: Sequence[Video], rate: Floats, size: int) -> list[Counts]:
    classes = [length_of(v) for v in shown]
    rows = np.array([i for i, c in enumerate(classes) if c], np.int64)
    names = [c for c in classes if c]
    skipped = _flag(rate < FAST_SKIP_BELOW, rate)
    return [
        _outcome("length", users, rows, names, rate, list(LENGTHS), size, mean=True),
        _outcome("skipped by length", users, rows, names, skipped, list(LENGTHS), size),
    ]


def _dislike_counts(
    users: Ints, shown: Sequence[Video], disliked: Floats, remarks: Sequence[str | None], size: int
) -> list[Counts]:
    titles = {v.video_id: (set(words(v.title or "")) - set(map(str.casefold, v.tags))) for v in shown}
    bad = [titles[v.video_id] for v, d in zip(shown, disliked, strict=True) if d == 1.0]
    items = [w for w, n in Counter(w for t in bad for w in t).most_common(_MOST_WORDS) if n >= _FEWEST]
    wanted = set(items)
    pairs = [(i, w) for i, v in enumerate(shown) for w in titles[v.video_id] & wanted]
    rows, names = np.array([i for i, _ in pairs], np.int64), [w for _, w in pairs]
    kinds = [complaint_of(r) for r in remarks]
    views = np.flatnonzero(~np.isnan(disliked))
    asked = [(int(users[i]), name) for i in views for name in COMPLAINTS] if any(kinds) else []
    hits = [(int(users[i]), name) for i in views if (name := kinds[i])]
    return [
        _outcome("word", users, rows, names, disliked, items, size),
        _counts("complaint", asked, hits, list(COMPLAINTS) if any(kinds) else [], size),
    ]


def _activity_counts(users: Ints, column: Mapping[str, Floats], size: int) -> list[Counts]:
    rate = column["play_rate"]
    outcomes = {
        "finished views": _flag(rate > FINISH_ABOVE, rate),
        "fast skips": _flag(rate < FAST_SKIP_BELOW, rate),
        "clicks": column["clicked"],
        "dislikes": column["disliked"],
    }
    each = np.bincount(users, minlength=size).astype(float)
    items = [VIEWS_EACH, *(name for name, values in outcomes.items() if not np.isnan(values).all())]
    n = [sparse.csr_matrix(np.ones((size, 1)))]
    total = [sparse.csr_matrix(each[:, None])]
    for name in items[1:]:
        has_value = ~np.isnan(outcomes[name])
        n.append(_per_user(users[has_value], np.ones(int(has_value.sum())), size))
        total.append(_per_user(users[has_value], outcomes[name][has_value], size))
    squares = [sparse.csr_matrix((each**2)[:, None]), *total[1:]]  # shares: 0 and 1 are their own squares
    return [Counts("activity", items, *(sparse.hstack(m).tocsr() for m in (n, total, squares)))]


def _per_user(users: Ints, values: Floats, size: int) -> sparse.csr_matrix:
    return sparse.csr_matrix(np.bincount(users, weights=values, minlength=size)[:, None])


def _outcome(
    section: str,
    users: Ints,
    rows: Ints,
    names: Sequence[str],
    values: Floats,
    items: list[str],
    size: int,
    *,
    mean: bool = False,
) -> Counts:
    """Counts of a value per item; `rows` are the records of each of `names`. Records without the value do not count."""
    place = {item: i for i, item in enumerate(items)}
    columns = np.array([place.get(name, -1) for name in names], np.int64)
    counted = (columns >= 0) & ~np.isnan(values[rows]) if len(rows) else np.zeros(0, bool)
    if not counted.any():
        return Counts(section, [], *(sparse.csr_matrix((size, 0)),) * 2)
    at, what = (users[rows[counted]], columns[counted]), values[rows[counted]]

    def matrix(data: Floats) -> sparse.csr_matrix:
        return sparse.csr_matrix((data, at), (size, len(items)))

    return Counts(section, items, matrix(np.ones(len(what))), matrix(what), matrix(what**2) if mean else None)


def _counts(
    section: str, asked: Sequence[tuple[int, str]], hits: Sequence[tuple[int, str]], items: list[str], size: int
) -> Counts:
    """Counts of pairs (user, item)."""
    place = {item: i for i, item in enumerate(items)}

    def matrix(pairs: Sequence[tuple[int, str]]) -> sparse.csr_matrix:
        kept = [(u, place[name]) for u, name in pairs if name in place]
        rows, columns = np.array(kept, np.int64).reshape(-1, 2).T
        return sparse.csr_matrix((np.ones(len(kept)), (rows, columns)), (size, len(items)))

    return Counts(section, items, matrix(asked), matrix(hits))


def _crossed(users: Ints, items: Sequence[str]) -> list[tuple[int, str]]:
    return [(int(u), item) for u in users for item in items]


def _common(names: Iterable[str], most: int = 400) -> list[str]:
    """The most frequent names that occur often enough to say something."""
    return [name for name, n in Counter(names).most_common(most) if n >= _FEWEST]


def _numbers(column: pa.ChunkedArray) -> Floats:
    """As floats; unknown is NaN, true is 1."""
    return column.cast(pa.float64()).to_numpy() if pa.types.is_floating(column.type) else _booleans(column)


def _booleans(column: pa.ChunkedArray) -> Floats:
    return np.array([np.nan if v is None else float(v) for v in column.to_pylist()])


def _flag(condition: npt.NDArray[np.bool_], values: Floats) -> Floats:
    return np.where(np.isnan(values), np.nan, condition)


def _sums(matrix: sparse.csr_matrix | None, members: Ints | None) -> Floats:
    if matrix is None:
        return np.zeros(0)
    rows = matrix if members is None else matrix[members]
    return np.asarray(rows.sum(axis=0)).ravel()
