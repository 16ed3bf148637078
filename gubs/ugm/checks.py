"""Checks of what an author wrote about a group: that it is about the group at all, and that its claims hold.

A text fails if it is a placeholder, repeats the prompt, talks about being an assistant, or goes round in circles. Its
claims are checked one sentence at a time: topics it says the group likes or skips, lengths, percentages. A claim that
the evidence contradicts is unsupported; one that the evidence says nothing about is left alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gubs.records import Finding
from gubs.ugm.author import COMPLAINT_WORDS, best_length, likes, skips
from gubs.ugm.evidence import LENGTHS, LENGTHS_S
from gubs.ugm.words import words

_TO_FILL = "your|name|insert|group|user|topic|age|tag|describe"
"""What a placeholder in brackets begins with; in angle brackets, anything else may be markup."""
_TO_FILL_ANGLED = _TO_FILL + (
    "|users|topics|tags|features?|interests?|gender|occupation|lengths?|profile|placeholder|text|reason|answer|fill"
    "|typical|think|thinking|unk|pad|mask"
)
PLACEHOLDERS = re.compile(
    rf"\bx{{3,}}\b|\[(?:{_TO_FILL})\b[^\]]*\]|\blorem ipsum\b|<(?:{_TO_FILL_ANGLED})(?:[ _][a-z _]*)?>|\btbd\b"
    r"|\{\{?\s*\w+\s*\}?\}|\bcategory \d+\b|\bgroup name\b|_{3,}",
    re.I,
)
_ASSISTANT = re.compile(
    r"\bas an ai\b|\b(?:as|am|i'm) an? (?:large |ai )?language model\b|\bhelpful (?:ai )?assistant\b|\bsmollm\b"
    r"|\bi(?:'m| am) (?:sorry|here to|happy to|an? (?:ai|assistant|model))\b"
    r"|\bi can(?:no|')t (?:help|assist)|作为(?:一个)?(?:AI|人工智能|语言模型)",
    re.I,
)
_YOURS = r"\byour (?:own )?(?:profile|name|answer)\b"
_TO_READER = re.compile(
    r"(?:^|[.!?:]\s+|\bplease\s+)(?:here(?:'s| is) |this is |based on |according to |in |from |enter |write |insert "
    rf"|fill in |provide |update |improve |complete |describe |add |edit |check |review |share |change )?{_YOURS}"
    r"|\b(?:you(?:'ve|'ll|'re| can| could| should| may| might| must| need| want| will| would| have| are)"
    rf"|i|i'(?:ve|ll|d)|thanks|thank you)\b[^.!?\n]{{0,80}}{_YOURS}",
    re.I | re.M,
)
"""Talk to the reader about what is theirs; people's and videos' texts may have `your name` in them."""
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|«[^»\n]*»|「[^」\n]*」")
"""Titles, for example, which say what they like."""
_POSITIVE = re.compile(
    r"\b(?:like|likes|liked|love|loves|enjoy|enjoys|prefer|prefers|preferred|preference|favou?rite|fans?|interested"
    r"|high interest|keen|finish|finishes|watch|watches|recommend|more|suits?|best)\b|喜欢|偏好|感兴趣|爱看|推荐",
    re.I,
)
_NEGATIVE = re.compile(
    r"\b(?:skip|skips|skipped|avoid|avoids|dislike|dislikes|hate|hates|fewer|less|lower|little interest|low interest"
    r"|not interested|no interest|uninterested|driven away|put off|puts off|drives away|bored|reduce|not"
    r"|no|rarely|never|without|rather than|instead of|except|unlike)\b|n't\b|不喜欢|不感兴趣|跳过|避免|减少|反感",
    re.I,
)
_LENGTH = re.compile(
    r"(?P<bound>under|below|up to|less than|shorter than|over|above|longer than|more than)?\s*"
    r"(?P<a>\d+)\s*(?:s|sec|seconds?)?\s*(?:(?:-|–|to)\s*(?P<b>\d+)\s*)?(?P<unit>s|sec|seconds?|min|minutes?)\b",
    re.I,
)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s?%")
_SENTENCE = re.compile(r"(?<=[.!?;。！？；])\s+|\n+")
_COPIED = 9
"""So many words in a row are not repeated by chance ..."""
_COPY = 0.3
"""... and a text of which this share is so repeated is not an answer; a heading may be."""
_CIRCLES = 0.5
"""Share of different runs of four words below which a text goes round in circles."""
_ROUNDING = 0.02
"""Percentages are rounded, and intervals are not exact."""
_FEW, _SOME, _SHARED = 0.15, 0.25, 0.5
"""Shares of members who list a tag: what unites a group has more than the first, what it likes more than the second
or more than others have; most members share what has the third."""


@dataclass(frozen=True)
class Evidence:
    """What texts about one group are checked against."""

    findings: Sequence[Finding]
    topics: Sequence[str]
    """All tags and topics that the data have."""

    @cached_property
    def likes(self) -> set[str]:
        """Topics that the group likes."""
        return set(likes(self.findings))

    @cached_property
    def skips(self) -> set[str]:
        """Topics that the group skips."""
        return set(skips(self.findings))

    def finding(self, section: str, item: str) -> Finding | None:
        """The finding about an item of a section."""
        return next((f for f in self.findings if f.section == section and f.item == item), None)

    def mentioned(self, text: str) -> list[str]:
        """The topics that a text mentions."""
        folded = text.casefold()
        return [t for t in self.topics if re.search(_as_word(t), folded)]


def sentences(text: str) -> list[str]:
    """A text as sentences and lines."""
    return [s.strip() for s in _SENTENCE.split(text) if s.strip()]


def fault_of(text: str, instructions: str = "") -> str:
    """Why a text cannot be about the group at all; empty if it can.

    Args:
        text: a name or a profile.
        instructions: our words in the prompt, which must not come back.
    """
    if m := PLACEHOLDERS.search(text):
        return f"it holds the placeholder {m[0]!r}"
    if m := _ASSISTANT.search(text) or _TO_READER.search(_QUOTED.sub("", text)):
        return f"it talks about the assistant or the reader, not about the group: {m[0]!r}"
    if copied := _copied(text, instructions):
        return f"it repeats the question: {copied!r}"
    runs = list(zip(*(words(text)[i:] for i in range(4)), strict=False))
    if len(runs) >= 12 and len(set(runs)) < _CIRCLES * len(runs):
        return "it says the same over and over"
    return ""


def fault_of_name(name: str, evidence: Evidence, others: Iterable[str]) -> str:
    """Why a name cannot be used; empty if it can."""
    if fault := fault_of(name):
        return fault
    if name.casefold() in {o.casefold() for o in others}:
        return "another group has the same name"
    if re.fullmatch(r"\W*(?:group|users?|viewers?|members?|category|cluster|others?)?\W*\d*\W*", name, re.I):
        return "it says nothing about the members"
    foreign = [t for t in evidence.mentioned(name) if not _unites(t, evidence)]
    return f"{foreign[0]} is nothing that its members share" if foreign else ""


def unsupported(text: str, evidence: Evidence) -> dict[str, str]:
    """Sentences that claim what the evidence contradicts, with the reason; in their order."""
    claims = {}
    for sentence in sentences(text):
        why = next((w for check in _CHECKS if (w := check(sentence, evidence))), "")
        if why:
            claims[sentence] = why
    return claims


def without(text: str, claims: Mapping[str, str]) -> str:
    """The text without some of its sentences; lines stay lines."""
    lines = [" ".join(s for s in sentences(line) if s not in claims) for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def complete(text: str, evidence: Evidence) -> bool:
    """Whether a profile says at least half of what most members share, half of what they skip most, and a length, as
    far as the evidence has any.
    """
    mentioned = set(evidence.mentioned(text))
    shared = [f.item for f in evidence.findings if f.section == "interest" and f.value >= _SHARED]
    skipped = skips(evidence.findings)[:3]
    halves = all(2 * len(mentioned & set(items)) >= len(items) for items in (shared, skipped))
    return halves and (best_length(evidence.findings) is None or bool(_LENGTH.search(text)))


def _claim(sentence: str) -> str:
    """`likes`, `skips`, or empty where a sentence claims neither or both ("likes X, skips Y")."""
    negative = bool(_NEGATIVE.search(sentence))
    positive = bool(_POSITIVE.search(_NEGATIVE.sub(" ", sentence)))
    return "" if negative == positive else "skips" if negative else "likes"


def _topics(sentence: str, evidence: Evidence) -> str:
    mentioned = evidence.mentioned(sentence)
    for topic in mentioned:
        if len(re.findall(rf"(?:^|[:,]) ?{re.escape(topic)}(?=[,.]|$)", sentence.casefold())) > 1:
            return f"it lists {topic} twice"
    against = {"likes": _against_liking, "skips": _against_skipping}.get(_claim(sentence))
    return next((why for t in mentioned if against and (why := against(t, evidence))), "")


def _against_liking(topic: str, evidence: Evidence) -> str:
    f = evidence.finding("interest", topic)
    if topic in evidence.skips:
        return f"the members skip {topic}"
    few = f is not None and f.value < f.overall and f.value < _SOME and topic not in evidence.likes
    return f"hardly a member lists {topic}" if few else ""


def _against_skipping(topic: str, evidence: Evidence) -> str:
    f = evidence.finding("skipped", topic)
    if topic in evidence.likes:
        return f"the members like {topic}"
    return f"they skip {topic} less than all users" if f is not None and f.value < f.overall else ""


def _complaints(sentence: str, evidence: Evidence) -> str:
    """Something that is said to put the members off, although they complain of it no more than everybody."""
    if not _NEGATIVE.search(sentence):
        return ""
    for name, text in COMPLAINT_WORDS.items():
        f = evidence.finding("complaint", name)
        if f is not None and f.value <= f.overall and text in sentence:
            return f"they complain of {text} no more than all users"
    return ""


def _lengths(sentence: str, evidence: Evidence) -> str:
    """A length that is praised although others suit better, or blamed although it is played longest."""
    played = {f.item: f for f in evidence.findings if f.section == "length"}
    skipped = {f.item: f for f in evidence.findings if f.section == "skipped by length"}
    claim = _claim(sentence)
    if len(played) < 2 or not claim:
        return ""
    best = best_length(evidence.findings)
    for m in _LENGTH.finditer(sentence):
        classes = [c for c in _classes(m) if c in played]
        if claim == "skips" and best and classes == [best.item]:
            return f"videos of {best.item} are played longest"
        if claim == "likes" and classes and all(c in skipped and skipped[c].value > _SHARED for c in classes):
            return f"most videos of {classes[0]} are skipped"
        if best and "best" in sentence and classes and all(played[c].value < best.low for c in classes):
            return f"videos of {best.item} are played longer"
    return ""


def _shares(sentence: str, evidence: Evidence) -> str:
    """A percentage that no finding about the sentence's items has."""
    folded = sentence.casefold()
    about = [f for f in evidence.findings if re.search(_as_word(f.item.partition(": ")[2] or f.item), folded)]
    for m in _PERCENT.finditer(sentence) if about else ():
        share = float(m[1]) / 100
        if not any(_says(f, share) for f in about):
            return f"{m[0]} is not what the records say about {about[0].item}"
    return ""


def _says(finding: Finding, share: float) -> bool:
    inside = finding.low - _ROUNDING <= share <= finding.high + _ROUNDING
    return inside or abs(share - finding.overall) <= _ROUNDING


def _classes(m: re.Match[str]) -> list[str]:
    """The classes of length that a range of seconds or minutes covers."""
    factor = 60 if m["unit"].casefold().startswith("min") else 1
    low, high = float(m["a"]) * factor, float(m["b"] or m["a"]) * factor
    bound = (m["bound"] or "").casefold()
    if bound in ("under", "below", "up to", "less than", "shorter than"):
        low, high = 0.0, low
    elif bound:
        high = float("inf")
    edges = [0.0, *LENGTHS_S, float("inf")]
    return [c for c, a, b in zip(LENGTHS, edges, edges[1:], strict=False) if low < b and high > a]


def _unites(topic: str, evidence: Evidence) -> bool:
    f = evidence.finding("interest", topic)
    listed = f is not None and (f.value >= f.overall or f.value >= _SHARED) and f.value > _FEW
    return listed or topic in evidence.likes


def _copied(text: str, instructions: str) -> str:
    """A run of words that a text has from our instructions, if it has much from them."""
    runs, given = _runs(text), set(_runs(instructions))
    copied = [run for run in runs if run in given]
    return " ".join(copied[0]) if len(copied) > _COPY * len(runs) else ""


def _runs(text: str) -> list[tuple[str, ...]]:
    plain = re.findall(r"\w+", text.casefold())
    return [tuple(plain[i : i + _COPIED]) for i in range(len(plain) - _COPIED + 1)]


def _as_word(item: str) -> str:
    """Pattern of an item as a whole word; scripts without spaces have no word boundaries."""
    escaped = re.escape(item.casefold())
    left = r"(?<![^\W\d_])" if item[:1].isascii() else ""
    right = r"(?![^\W\d_])" if item[-1:].isascii() else ""
    return f"{left}{escaped}{right}"


_CHECKS = (_topics, _complaints, _lengths, _shares)
"""Each returns why a sentence does not hold, or an empty text."""
