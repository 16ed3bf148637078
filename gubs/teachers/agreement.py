"""Agreement of annotators: Cohen's kappa for every pair, the mean over the pairs, and Fleiss' kappa for three or more.

Kappa is undefined (None) if two annotators have no item in common, or if everybody gave the same label throughout, so
that chance alone would always agree.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypedDict

Votes = Mapping[str, Mapping[str, str]]
"""Item -> annotator -> option."""


class Pair(TypedDict):
    """How far two annotators agree."""

    annotators: list[str]
    items: int
    observed: float | None
    kappa: float | None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two annotators beyond chance; the labels are those of the same items in the same order.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"the lists differ in length: {len(first)} labels against {len(second)}")
    n = len(first)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    one, other = Counter(first), Counter(second)
    return _beyond_chance(observed, sum(one[o] * other[o] for o in one) / n**2)


def fleiss_kappa(items: Sequence[Mapping[str, int]]) -> float | None:
    """Agreement of several annotators; each item maps options to votes, with the same total (at least 2) for all.

    Raises:
        ValueError: the numbers of votes differ or are below 2.
    """
    if not items:
        return None
    raters = {sum(item.values()) for item in items}
    if len(raters) > 1 or min(raters) < 2:
        raise ValueError(f"every item needs the same number of votes, at least 2 (found: {sorted(raters)})")
    r = raters.pop()
    observed = sum((sum(v * v for v in item.values()) - r) / (r * (r - 1)) for item in items) / len(items)
    totals = sum(map(Counter, items), Counter())
    chance = sum((v / (r * len(items))) ** 2 for v in totals.values())
    return _beyond_chance(observed, chance)


def agreement(votes: Votes) -> dict[str, object]:
    """Items per annotator, and the agreement of each pair and of all.

    `fleiss` covers the items that every annotator labelled; it is None for fewer than three annotators.
    """
    names = sorted({name for item in votes.values() for name in item})
    pairs = [_pair(votes, a, b) for a, b in itertools.combinations(names, 2)]
    kappas = [pair["kappa"] for pair in pairs if pair["kappa"] is not None]
    shared = [Counter(item.values()) for item in votes.values() if len(item) == len(names)]
    return {
        "annotators": {name: sum(name in item for item in votes.values()) for name in names},
        "items": len(votes),
        "pairs": pairs,
        "mean_kappa": sum(kappas) / len(kappas) if kappas else None,
        "fleiss": {"items": len(shared), "kappa": fleiss_kappa(shared)} if len(names) > 2 else None,
    }


def majority(options: Mapping[str, str]) -> str | None:
    """The option that most annotators chose; None for a tie."""
    (first, most), *others = Counter(options.values()).most_common(2)
    return None if others and others[0][1] == most else first


def _pair(votes: Votes, a: str, b: str) -> Pair:
    both = [(item[a], item[b]) for item in votes.values() if a in item and b in item]
    observed = sum(x == y for x, y in both) / len(both) if both else None
    kappa = cohen_kappa([x for x, _ in both], [y for _, y in both])
    return {"annotators": [a, b], "items": len(both), "observed": observed, "kappa": kappa}


def _beyond_chance(observed: float, chance: float) -> float | None:
    return None if 1.0 - chance < 1e-12 else (observed - chance) / (1.0 - chance)
