"""The "10 + 10" protocols: which items a simulated user is asked about, and the proof that nothing is given away.

Per user, some items that the user chose (positives) stand beside as many others (negatives), in an order drawn by the
seed. Everything else that the user chose is the profile. The literature's setting, interacted against unseen, is won by
popularity alone; so the protocols come side by side: unseen items drawn evenly, unseen items drawn by popularity, and
liked against disliked; each with positives drawn at random, and with the last in time. Where candidates are the last of
their kind, what a user did after the first of them is no part of the profile.

Negatives are only items that somebody had chosen before the user's last record, where times are known. Otherwise "never
seen before" would tell them apart.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from gubs.errors import InputError
from gubs.evaluate.feedback import UNTIMED, Bools, Feedback, Ints


class Contrast(StrEnum):
    """What is told apart from what."""

    UNSEEN = "interacted / unseen"
    """Chosen items against items never chosen, each as likely as any other (the literature's setting)."""
    POPULAR = "interacted / unseen by popularity"
    """The same, the negatives drawn in proportion to how many users chose them."""
    LIKED = "liked / disliked"
    """Ratings of 4 and more against ratings of 2 and less."""


class HeldOut(StrEnum):
    """Which of a user's items become candidates."""

    RANDOM = "random"
    LAST = "last in time"
    """The last ones of each kind; the profile ends before the first of them. Equal times keep the order of the log."""
    PUBLISHED = "published parts"
    """Of a data set that comes divided: at random from the parts `valid` and `test`; only `train` is the profile."""


@dataclass(frozen=True)
class Protocol:
    """How candidates are drawn."""

    contrast: Contrast
    held_out: HeldOut
    positives: int = 10
    negatives: int = 10
    least_profile: int = 10
    """Users with a shorter profile are left out: there is too little to know them by."""
    available: bool = True
    """Negatives had been chosen by somebody before the user's last record; False = at any time, as the literature."""

    @property
    def name(self) -> str:
        """As in `interacted / unseen, random`."""
        return f"{self.contrast}, {self.held_out}"


@dataclass(frozen=True)
class Candidates:
    """The candidates of one protocol, sorted by user and position; [n] each, and where they come from."""

    protocol: Protocol
    user: Ints
    """Number of the user in the feedback."""
    item: Ints
    position: Ints
    """Place in the list that is shown, from 0."""
    positive: Bools
    facts: Mapping[str, Any]
    """Counts, rules, and what the proof found; see `prove`."""

    def __len__(self) -> int:
        return len(self.user)


def protocols_for(feedback: Feedback, each: int, least_profile: int, *, available: bool = True) -> list[Protocol]:
    """Every protocol that the data allow: ratings are needed for liked and disliked, an order in time for the last."""
    contrasts = [Contrast.UNSEEN, Contrast.POPULAR]
    if feedback.liked.any() and feedback.disliked.any():
        contrasts.append(Contrast.LIKED)
    if (feedback.part == "train").any():
        ways = [HeldOut.PUBLISHED]
    else:
        ways = [HeldOut.RANDOM, HeldOut.LAST] if feedback.timed or feedback.ordered else [HeldOut.RANDOM]
    return [Protocol(c, h, each, each, least_profile, available) for h in ways for c in contrasts]


def draw(feedback: Feedback, protocol: Protocol, users: int, seed: int) -> Candidates:
    """Draws the candidates of up to `users` users, and proves that they give nothing away.

    Args:
        feedback: all records.
        protocol: how to draw.
        users: most users, drawn from those who have enough records; 0 = all.
        seed: decides users, items and order; a user's candidates do not depend on other users being asked.

    Raises:
        InputError: no user has enough records.
    """
    key = int.from_bytes(hashlib.sha256(protocol.name.encode()).digest()[:4])
    eligible = np.flatnonzero(_eligible(feedback, protocol))
    if not len(eligible):
        raise InputError(
            f"{protocol.name}: no user has {protocol.positives} + {protocol.negatives} items and a profile"
        )
    drawer, lists, barren = _Drawer(feedback, protocol), dict[int, tuple[Ints, Bools]](), 0
    for user in np.random.default_rng([seed, key]).permutation(eligible).tolist():
        if len(lists) == (users or len(eligible)):
            break
        if drawn := drawer.lists(user, np.random.default_rng([seed, key, user])):
            lists[user] = drawn
        else:
            barren += 1
    if not lists:
        raise InputError(f"{protocol.name}: no user has {protocol.negatives} items that only others had chosen by then")
    chosen = np.array(sorted(lists))
    n = protocol.positives + protocol.negatives
    candidates = Candidates(
        protocol,
        user=np.repeat(chosen, n),
        item=np.concatenate([lists[u][0] for u in chosen]),
        position=np.tile(np.arange(n), len(chosen)),
        positive=np.concatenate([lists[u][1] for u in chosen]),
        facts={"eligible": len(eligible), "too_few_unseen": barren, "seed": seed, **_rules(feedback, protocol)},
    )
    return Candidates(**{**vars(candidates), "facts": {**candidates.facts, **prove(feedback, candidates)}})


def training(feedback: Feedback, candidates: Candidates) -> Feedback:
    """What every baseline may learn from: all records but the candidates themselves, or the published part `train`. If
    the candidates are the last ones, the records of their users end before the first of them.
    """
    if candidates.protocol.held_out is HeldOut.PUBLISHED:
        return feedback.without(feedback.part != "train")
    held = held_out(feedback, candidates)
    if candidates.protocol.held_out is HeldOut.LAST:
        held |= np.arange(len(feedback)) >= _first_rows(feedback, held)[feedback.user]
    return feedback.without(held)


def held_out(feedback: Feedback, candidates: Candidates) -> Bools:
    """Which records are candidates, [N]."""
    n = len(feedback.items)
    return np.isin(feedback.user * n + feedback.item, candidates.user * n + candidates.item)


def prove(feedback: Feedback, candidates: Candidates) -> dict[str, Any]:
    """Checks the candidates against the records, whoever drew them, and measures what is given away.

    Returns:
        Counts, with the accuracy that "nobody else ever chose it: no" has (`unknown_item_rule`, .5 = nothing is given
        away by the data set's edge).

    Raises:
        InputError: a candidate is in a profile or twice in a list, a positive was not chosen, a negative was, a label
            contradicts the rating, a record of the profile or of a candidate's kind is later than a last candidate, a
            profile is too short, or a list has another size.
    """
    p, n_items = candidates.protocol, len(feedback.items)
    pair, records = candidates.user * n_items + candidates.item, feedback.user * n_items + feedback.item
    rest = training(feedback, candidates)
    chosen = np.isin(pair, records)
    _refuse(len(np.unique(pair)) < len(pair), p, "an item is twice in a list")
    _refuse(bool(np.isin(pair, rest.user * n_items + rest.item).any()), p, "a candidate is in the profile")
    _refuse(bool((candidates.positive & ~chosen).any()), p, "a positive was never chosen")
    rated = p.contrast is Contrast.LIKED
    _refuse(bool((~candidates.positive & chosen).any()) and not rated, p, "a negative was chosen")
    if rated:
        _refuse(not _fit_the_ratings(feedback, candidates, pair, records), p, "a label contradicts the rating")
    users, sizes = np.unique(candidates.user, return_counts=True)
    _refuse(bool((sizes != p.positives + p.negatives).any()), p, "a list has another size")
    _refuse(int(candidates.positive.sum()) != p.positives * len(users), p, "a list has another number of positives")
    tied = _check_time(feedback, rest, candidates) if p.held_out is HeldOut.LAST else 0
    profile = np.diff(rest.starts)[users]
    _refuse(int(profile.min()) < p.least_profile, p, f"a profile has fewer than {p.least_profile} records")
    support = np.bincount(rest.item, minlength=n_items)[candidates.item]
    return {
        "users": len(users),
        "candidates": len(candidates),
        "profile_records": float(profile.mean()),
        "positives_nobody_else_chose": int((support[candidates.positive] == 0).sum()),
        "negatives_nobody_else_chose": int((support[~candidates.positive] == 0).sum()),
        "unknown_item_rule": float(((support > 0) == candidates.positive).mean()),
        "users_cut_inside_a_tie": tied,
    }


def digest(candidates: Iterable[Candidates], feedback: Feedback) -> str:
    """Hash of users, items, order and labels: 16 hexadecimal digits. Equal candidates have equal hashes anywhere."""
    hashed = hashlib.sha256()
    for c in candidates:
        hashed.update(c.protocol.name.encode())
        for u, i, label in zip(c.user, c.item, c.positive, strict=True):
            hashed.update(f"{feedback.users[u]}\t{feedback.items[i]}\t{int(label)}\n".encode())
    return hashed.hexdigest()[:16]


SCHEMA = pa.schema(
    [
        pa.field("protocol", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("positive", pa.bool_(), nullable=False),
    ]
)
"""Table `candidates`, by protocol, user and position."""


def to_table(candidates: Sequence[Candidates], feedback: Feedback) -> pa.Table:
    """Candidates as a table of `SCHEMA`."""
    users, items = np.array(feedback.users), np.array(feedback.items)
    tables = [
        pa.table(
            {
                "protocol": pa.array([c.protocol.name] * len(c)),
                "user_id": users[c.user],
                "position": c.position.astype(np.int32),
                "item_id": items[c.item],
                "positive": c.positive,
            }
        )
        for c in candidates
    ]
    return pa.concat_tables(tables).cast(SCHEMA)


def from_table(table: pa.Table, feedback: Feedback, protocol: Protocol) -> Candidates:
    """The candidates of a protocol, read back.

    Raises:
        InputError: the table has none, names an unknown user or item, or does not stand the proof.
    """
    frame = table.to_pandas()
    frame = frame[frame["protocol"] == protocol.name]
    if frame.empty:
        raise InputError(f"the table of candidates has no protocol {protocol.name!r}")
    columns = [_numbers(frame[c], ids, c) for c, ids in (("user_id", feedback.users), ("item_id", feedback.items))]
    position, positive = frame["position"].to_numpy(np.int64), frame["positive"].to_numpy(bool)
    candidates = Candidates(protocol, columns[0], columns[1], position, positive, {})
    return Candidates(**{**vars(candidates), "facts": prove(feedback, candidates)})


# --- drawing ----------------------------------------------------------------------------------------------------------


class _Drawer:
    """Draws a user's items: positives from the user's records, negatives from these or from items never chosen."""

    def __init__(self, feedback: Feedback, protocol: Protocol):
        self._feedback, self._protocol = feedback, protocol
        self._yes, self._no = _sources(feedback, protocol)
        chosen = np.bincount(feedback.item, minlength=len(feedback.items))
        self._weights = np.where(chosen > 0, chosen if protocol.contrast is Contrast.POPULAR else 1, 0).astype(float)
        self._since = np.full(len(feedback.items), UNTIMED)
        if protocol.available:
            self._since[:] = np.iinfo(np.int64).max
            np.minimum.at(self._since, feedback.item, feedback.time)

    def lists(self, user: int, rng: np.random.Generator) -> tuple[Ints, Bools] | None:
        """A user's items in the order shown, and their labels; None if too few unseen items can be drawn."""
        yes = self._held(self._yes, user, self._protocol.positives, rng)
        no = self._unseen(user, rng) if self._no is None else self._held(self._no, user, self._protocol.negatives, rng)
        if len(no) < self._protocol.negatives:
            return None
        order = rng.permutation(len(yes) + len(no))
        labels = np.arange(len(order)) < len(yes)
        return np.concatenate([yes, no])[order], labels[order]

    def _held(self, mask: Bools, user: int, n: int, rng: np.random.Generator) -> Ints:
        rows = self._feedback.rows_of(user)
        among = self._feedback.item[rows][mask[rows]]
        return among[-n:] if self._protocol.held_out is HeldOut.LAST else rng.choice(among, n, replace=False)

    def _unseen(self, user: int, rng: np.random.Generator) -> Ints:
        rows, n = self._feedback.rows_of(user), self._protocol.negatives
        weights = np.where(self._since <= self._feedback.time[rows].max(), self._weights, 0.0)
        weights[self._feedback.item[rows]] = 0.0
        if (weights > 0).sum() < n:
            return np.zeros(0, dtype=np.int64)
        return rng.choice(len(weights), n, replace=False, p=weights / weights.sum())


def _sources(feedback: Feedback, protocol: Protocol) -> tuple[Bools, Bools | None]:
    """The records that positives and negatives are drawn from; None = items never chosen."""
    if protocol.contrast is Contrast.LIKED:
        return feedback.liked, feedback.disliked
    published = protocol.held_out is HeldOut.PUBLISHED
    return (feedback.part != "train" if published else np.ones(len(feedback), bool)), None


def _eligible(feedback: Feedback, protocol: Protocol) -> Bools:
    """Users with enough records, [U]."""
    users = len(feedback.users)

    def count(mask: Bools) -> Ints:
        return np.bincount(feedback.user[mask], minlength=users)

    total = count(np.ones(len(feedback), bool))
    yes, no = _sources(feedback, protocol)
    if protocol.held_out is HeldOut.PUBLISHED:
        profile = count(~yes)
    elif protocol.held_out is HeldOut.LAST:
        last = _last_of(feedback, yes, protocol.positives)
        last |= _last_of(feedback, no, protocol.negatives) if no is not None else False
        profile = _first_rows(feedback, last) - feedback.starts[:-1]
    else:
        profile = total - protocol.positives - (protocol.negatives if no is not None else 0)
    enough = (count(yes) >= protocol.positives) & (profile >= protocol.least_profile)
    return enough & (count(no) >= protocol.negatives if no is not None else len(feedback.items) > total)


def _last_of(feedback: Feedback, mask: Bools, n: int) -> Bools:
    """The last `n` records of each user among those in the mask, [N]."""
    rows = np.flatnonzero(mask)
    ends = np.searchsorted(feedback.user[rows], np.arange(len(feedback.users)), side="right")
    last = np.zeros(len(feedback), bool)
    last[rows[ends[feedback.user[rows]] - np.arange(len(rows)) <= n]] = True
    return last


def _first_rows(feedback: Feedback, mask: Bools) -> Ints:
    """The first row of each user that is in the mask; one past the user's last where none is, [U]."""
    first = feedback.starts[1:].copy()
    np.minimum.at(first, feedback.user[mask], np.flatnonzero(mask))
    return first


def _rules(feedback: Feedback, protocol: Protocol) -> dict[str, str]:
    """What holds for every candidate, in words, for the manifest."""
    drawn = {
        Contrast.UNSEEN: "items the user never chose, each as likely as any other",
        Contrast.POPULAR: "items the user never chose, in proportion to the number of users who did",
        Contrast.LIKED: "items the user rated 2 or less",
    }
    timed = feedback.timed and protocol.available
    when = "chosen by somebody before the user's last record" if timed else "chosen by somebody at any time"
    return {
        "negatives_drawn": drawn[protocol.contrast] + ("" if protocol.contrast is Contrast.LIKED else f"; {when}"),
        "ties": "equal times keep the order of the log",
        "masking": "a candidate is in no profile and in no training data",
        "profile": "the user's records before the first candidate"
        if protocol.held_out is HeldOut.LAST
        else "the user's records that are no candidates",
        "order": "drawn by the seed per user; answers are joined by item id",
    }


def _fit_the_ratings(feedback: Feedback, candidates: Candidates, pair: Ints, records: Ints) -> bool:
    row = np.argsort(records)[np.searchsorted(np.sort(records), pair)]
    return bool(np.where(candidates.positive, feedback.liked[row], feedback.disliked[row]).all())


def _check_time(feedback: Feedback, rest: Feedback, candidates: Candidates) -> int:
    """Users for whom the order of equal times decides.

    Raises:
        InputError: a record of the profile is later than a candidate, or one of a candidate's kind that is none is.
    """
    p, held = candidates.protocol, held_out(feedback, candidates)
    records, place = feedback.user * len(feedback.items) + feedback.item, np.arange(len(feedback))
    asked = np.isin(feedback.user, candidates.user)
    kinds = zip(_sources(feedback, p), (candidates.positive, ~candidates.positive), strict=True)
    for kind, which in kinds:
        if kind is not None:
            pairs = candidates.user[which] * len(feedback.items) + candidates.item[which]
            first = _first_rows(feedback, np.isin(records, pairs))[feedback.user]
            _refuse(
                bool((kind & asked & ~held & (place > first)).any()), p, "one of its kind is later than a candidate"
            )
    first, users = _first_rows(feedback, held), np.unique(candidates.user)
    late = records[place >= first[feedback.user]]
    left = rest.user * len(feedback.items) + rest.item
    _refuse(bool(np.isin(left, late).any()), p, "the profile is later than a candidate")
    ended = rest.starts[1:][users] - 1
    return int((rest.time[ended] == feedback.time[first[users]]).sum()) if feedback.timed else 0


def _refuse(broken: bool, protocol: Protocol, what: str) -> None:
    if broken:
        raise InputError(f"candidates of {protocol.name!r}: {what}")


def _numbers(column: Any, ids: Sequence[str], name: str) -> Ints:
    number = {text: i for i, text in enumerate(ids)}
    try:
        return np.array([number[text] for text in column], dtype=np.int64)
    except KeyError as e:
        raise InputError(f"candidates: {name} {e.args[0]!r} is not in the data set") from None
