"""Names and profiles of groups written from the evidence alone, without a language model.

A profile has the sections of the paper's example (A.8): who the members are, what they prefer, what interests them
little, what drives them away, lengths, tags, and directions for recommending. The first lines matter most: short
prompts show only the beginning.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Sequence

from gubs.records import Finding
from gubs.ugm.evidence import number
from gubs.ugm.settings import Mode

SHARED = 0.5
"""Share of members from which a tag (or a fact about a person) is what unites them."""
_SOME = 0.25
"""Share of members from which a tag says something about the group, if others list it less."""
_FEW_VIEWS = 5
"""Views of a length below which it is not said to suit best."""
_MOST = 4
"""Items in a line."""
_WORD_GAP = 0.1
"""How far the dislikes of titles with a word must be above everybody's: among hundreds of words, some are by chance."""
COMPLAINT_WORDS = {
    "clickbait": "titles that promise more than the video shows",
    "unpleasant": "unpleasant pictures",
    "vulgar": "vulgar words",
    "repetition": "videos seen before",
    "mismatch": "topics outside their interests",
    "too_long": "videos that take too long",
    "moment": "videos at the wrong moment",
}

Findings = Sequence[Finding]


def in_section(findings: Findings, section: str, wanted: Callable[[Finding], bool] = lambda _: True) -> list[Finding]:
    """The findings of a section that are wanted, highest value first."""
    return sorted((f for f in findings if f.section == section and wanted(f)), key=lambda f: (-f.value, f.item))


def _telling(finding: Finding) -> bool:
    """Whether a share of members says something about the group."""
    return finding.value >= SHARED or (finding.above and finding.value >= _SOME)


def likes(findings: Findings) -> list[str]:
    """What the members like: tags that most of them list, or more of them than of everybody; strongest first."""
    listed = in_section(findings, "interest", _telling)
    listed.sort(key=lambda f: f.overall - f.value)
    watched = [f for s in ("liked", "clicked", "finished") for f in in_section(findings, s, lambda f: f.above)]
    skipped = set(skips(findings))
    return list(dict.fromkeys(f.item for f in [*listed, *watched] if f.item not in skipped))


def skips(findings: Findings) -> list[str]:
    """Topics that the members skip more than everybody, or click or like less (unless they list or watch them);
    strongest first.
    """
    more = in_section(findings, "skipped", lambda f: f.above)
    less = [f for s in ("clicked", "liked") for f in reversed(in_section(findings, s, lambda f: f.below))]
    kept = {f.item for f in in_section(findings, "interest", lambda f: f.value >= SHARED)} | _watched(findings)
    sure = [f.item for f in more] + [f.item for f in less if f.item not in kept]
    return list(dict.fromkeys(sure))


def rarely_listed(findings: Findings) -> list[str]:
    """Tags that fewer members list than others do, and whose videos they do not watch more."""
    watched = _watched(findings)
    return [f.item for f in reversed(in_section(findings, "interest", lambda f: f.below)) if f.item not in watched]


def _watched(findings: Findings) -> set[str]:
    """Topics that they skip less than everybody."""
    return {f.item for f in in_section(findings, "skipped", lambda f: f.value < f.overall)}


def name_group(findings: Findings, mode: Mode, taken: Container[str] = ()) -> str:
    """A name that says what unites the members, other than those `taken` (case-folded)."""
    options = _name_options(findings, mode)
    numbered = (f"{options[-1]} ({n})" for n in itertools.count(2))
    return next(name for name in itertools.chain(options, numbered) if name.casefold() not in taken)


def features(findings: Findings) -> str:
    """What unites the members, in a line."""
    tags = in_section(findings, "interest", _telling)
    people = in_section(findings, "person", lambda f: f.value >= SHARED)
    parts = [_list(tags[:6]), _list(people[:3])]
    return "; ".join(p for p in parts if p) or "nothing that most members share"


def write_profile(findings: Findings) -> str:
    """The profile, as far as the evidence goes: with findings about members only, the initial one."""
    return "\n".join(line for line in _lines(findings) if line)


def _lines(findings: Findings) -> Iterable[str]:
    liked, skipped = likes(findings), skips(findings)
    yield _line("Likes", ", ".join(liked[:_MOST]))
    yield _line("Skips", _with_numbers(findings, "skipped", skipped) or ", ".join(skipped[:_MOST]))
    yield _line("Put off by", _triggers(findings))
    yield _line("Lengths", _lengths(findings))
    yield _line("Members", _list(in_section(findings, "person", _telling)[:5]))
    yield _line("Listed interests", _list(in_section(findings, "interest", lambda f: f.value >= _SOME)[:8]))
    yield _line("Low interest", ", ".join(t for t in rarely_listed(findings)[:6] if t not in liked))
    yield _line("Habits", _list([f for f in in_section(findings, "activity") if f.above or f.below]))
    yield _line("Tags", _tags(findings))
    yield _line("Directions", _directions(findings, liked, skipped))


def _triggers(findings: Findings) -> str:
    complaints = [
        f"{COMPLAINT_WORDS[f.item]} ({number(f, f.value)} of views, all users {number(f, f.overall)})"
        for f in in_section(findings, "complaint", lambda f: f.above and f.item != "mismatch")
    ]
    words = in_section(findings, "word", lambda f: f.low > f.overall + _WORD_GAP)[:_MOST]
    return "; ".join([*complaints, *([f"titles with {', '.join(f.item for f in words)}"] if words else [])])


def best_length(findings: Findings) -> Finding | None:
    """The length that is played longest, if it is longer than another by more than chance."""
    lengths = in_section(findings, "length", lambda f: f.n >= _FEW_VIEWS)
    return lengths[0] if lengths and lengths[-1].value < lengths[0].low else None


def _lengths(findings: Findings) -> str:
    best = best_length(findings)
    worst = in_section(findings, "skipped by length", lambda f: f.above or (f.value >= 0.4 and f.low > 0.25))
    parts = [f"{best.item} suits best (played {number(best, best.value)})"] if best else []
    worst = [f for f in worst if best is None or f.item != best.item][:2]
    return "; ".join([*parts, *(f"{f.item} is skipped {number(f, f.value)} of the time" for f in worst)])


def _tags(findings: Findings) -> str:
    listed = {f.item for f in in_section(findings, "interest", lambda f: f.value >= SHARED)}
    some = {f.item for f in in_section(findings, "interest", lambda f: f.value >= _SOME)}
    add = [t for t in likes(findings) if t not in listed and t not in some][:3]
    drop = [t for t in skips(findings) if t in some][:3]
    return "; ".join(
        text for text, tags in ((f"add {', '.join(add)}", add), (f"lower {', '.join(drop)}", drop)) if tags
    )


def _directions(findings: Findings, liked: Sequence[str], skipped: Sequence[str]) -> str:
    best = best_length(findings)
    more = f"more {', '.join(liked[:3])}" if liked else ""
    if more and best:
        more += f", preferably {best.item}"
    return "; ".join(p for p in (more, f"fewer videos about {', '.join(skipped[:3])}" if skipped else "") if p)


def _name_options(findings: Findings, mode: Mode) -> list[str]:
    """Names from the shortest to the longest."""
    tags = in_section(findings, "interest", lambda f: f.value >= SHARED) or in_section(findings, "interest")[:1]
    tags.sort(key=lambda f: (f.overall - f.value, f.item))
    people = in_section(findings, "person", lambda f: f.value >= SHARED)
    people.sort(key=lambda f: (f.overall - f.value, f.item))
    fans = [f"Fans of {_and([f.item for f in tags[:n]])}" for n in range(min(3, len(tags)), len(tags) + 1) if n]
    people.sort(key=lambda f: not f.item.startswith("gender"))
    who = [", ".join(_person(f.item) for f in people[:n]) for n in (2, 3, 4) if people]
    who = [w[:1].upper() + w[1:] for w in dict.fromkeys(who)]
    both = [f"{f} ({w[:1].lower()}{w[1:]})" for f in fans[:1] for w in who]
    options = {"interest": [*fans, *both, *who], "demographics": [*who, *both, *fans], "both": [*both, *fans, *who]}
    return options[mode] or ["Users who share little"]


def _person(item: str) -> str:
    """A fact about a person in words: `age: 30s` as `in their 30s`, `occupation: nurse` as `nurse`."""
    name, _, value = item.partition(": ")
    return {"age": f"in their {value}", "gender": value, "occupation": value}.get(name, f"{name} {value}")


def _with_numbers(findings: Findings, section: str, items: Sequence[str]) -> str:
    by_item = {f.item: f for f in findings if f.section == section}
    chosen = [by_item[i] for i in items if i in by_item][:_MOST]
    return _list(chosen)


def _list(findings: Iterable[Finding]) -> str:
    return ", ".join(f"{_person(f.item) if f.section == 'person' else f.item} {number(f, f.value)}" for f in findings)


def _line(heading: str, text: str) -> str:
    return f"{heading}: {text}." if text else ""


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
