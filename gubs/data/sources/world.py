"""The simulated video app's world: topics, archetypes, users and videos, with their hidden truth.

Everything is drawn from a seed with numpy's PCG64, in arrays: one row a user or a video. What a model may see (listed
tags, titles, durations, demographics) and what it may not (interests, tolerances, flaws) are kept in separate fields.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gubs.config import NoiseSettings, SyntheticSettings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FLAWS = ("none", "clickbait", "unpleasant", "vulgar")
"""Index 0 means no flaw. Clickbait: the title speaks of another topic than the picture shows."""

INTERESTS_PER_USER = 4
MEDIAN_DURATION_S = 24.0
"""In news feeds, videos of 10-30 s are the most frequent (paper, A.4)."""


@dataclass(frozen=True)
class Topic:
    """What a video is about: its words, and what can be seen of it."""

    name: str
    nouns: tuple[str, ...]


TOPICS: tuple[Topic, ...] = (
    Topic("cooking", ("noodles", "soup", "kitchen tricks")),
    Topic("football", ("penalty", "derby", "training")),
    Topic("gardening", ("roses", "balcony herbs", "pruning")),
    Topic("gaming", ("boss fight", "speedrun", "patch notes")),
    Topic("travel", ("night train", "island", "old town")),
    Topic("pets", ("kitten", "puppy", "parrot")),
    Topic("news", ("city council", "flood relief", "election")),
    Topic("health", ("blood pressure", "stretching", "sleep")),
    Topic("music", ("guitar cover", "choir", "concert")),
    Topic("cars", ("test drive", "engine", "rally")),
    Topic("fashion", ("autumn coats", "shoes", "street style")),
    Topic("science", ("comet", "microscope", "experiment")),
    Topic("history", ("castle", "old letters", "empire")),
    Topic("comedy", ("sketch", "stand-up", "prank")),
    Topic("drama", ("episode", "reunion", "betrayal")),
    Topic("finance", ("savings", "interest rates", "pension")),
    Topic("fitness", ("push-ups", "marathon", "yoga")),
    Topic("parenting", ("toddler", "homework", "bedtime")),
    Topic("fishing", ("carp", "river", "boat")),
    Topic("painting", ("watercolour", "portrait", "sketchbook")),
    Topic("dance", ("square dance", "ballet", "hip-hop class")),
    Topic("technology", ("phone review", "robot", "chip")),
    Topic("farming", ("harvest", "tractor", "orchard")),
    Topic("crafts", ("knitting", "woodwork", "pottery")),
)

_ADJECTIVES = ("easy", "quiet", "famous", "local", "long-awaited", "simple", "rare", "weekly", "honest", "beautiful")
_TAILS = (
    "for beginners",
    "explained",
    "at home",
    "this week",
    "with friends",
    "step by step",
    "from start to finish",
    "live",
)
_BAIT = ("You will not believe this", "Doctors hate this", "Number 7 is shocking", "Gone in 24 hours")
_VULGAR = ("damn", "crappy", "stupid-ass", "bloody idiotic")

_GENDERS = ("female", "male")
_OCCUPATIONS = (
    "student",
    "office worker",
    "public servant",
    "retired",
    "driver",
    "teacher",
    "nurse",
    "engineer",
    "shopkeeper",
    "farmer",
)
_MARITAL = ("single", "married", "parenting")
_CITY = ("small town", "city", "metropolis")
USER_TEXTS = {"gender": _GENDERS, "occupation": _OCCUPATIONS, "marital status": _MARITAL, "city size": _CITY}
"""What users say of themselves, beside age and interests, by field."""


@dataclass(frozen=True)
class Archetypes:
    """Latent groups of users; k rows."""

    interests: Ints
    """(k, INTERESTS_PER_USER) topic indices."""
    intolerance: Bools
    """(k, 4): which flaw makes the group turn away; column 0 (no flaw) is False."""
    patience_s: Floats
    """(k,) longest duration the group has time for."""
    restlessness: Floats
    """(k,) chance that a member has no wish to watch at that moment."""
    age: Ints
    """(k,) centre of the group's ages, years."""
    female: Floats
    """(k,) share of women."""
    occupations: Ints
    """(k, 2) usual occupations."""


@dataclass(frozen=True)
class Users:
    """n simulated people."""

    archetype: Ints
    interests: Bools
    """(n, topics) what they truly like."""
    listed: Ints
    """(n, INTERESTS_PER_USER) topic indices of the listed tags, -1 where there is none."""
    intolerance: Bools
    """(n, 4) by flaw."""
    patience_s: Floats
    restlessness: Floats
    age: Ints
    """Years; -1 unknown."""
    gender: Ints
    """Index into ("female", "male"); -1 unknown."""
    occupation: Ints
    marital: Ints
    city: Ints


@dataclass(frozen=True)
class Videos:
    """m simulated videos."""

    topic: Ints
    """What the picture shows."""
    title_topic: Ints
    """What the title speaks of; differs from `topic` for clickbait only."""
    flaw: Ints
    """Index into FLAWS."""
    duration_s: Floats
    weight: Floats
    """Popularity, sums to 1."""
    titles: list[str]


def make_archetypes(s: SyntheticSettings, rng: np.random.Generator) -> Archetypes:
    """Draws the latent groups: different favourite topics, tolerances, patience and demographics."""
    k = s.archetypes
    interests = np.stack([rng.permutation(s.topics)[:INTERESTS_PER_USER] for _ in range(k)])
    interests[:, 0] = np.arange(k) % s.topics  # every group has a topic of its own in front
    for row in interests:
        rest = np.setdiff1d(np.arange(s.topics), row[:1])
        row[1:] = rng.permutation(rest)[: INTERESTS_PER_USER - 1]
    intolerance = np.zeros((k, len(FLAWS)), bool)
    intolerance[:, 1:] = rng.random((k, len(FLAWS) - 1)) < 0.5
    return Archetypes(
        interests=interests,
        intolerance=intolerance,
        patience_s=rng.choice([40.0, 75.0, 180.0], k),
        restlessness=rng.choice([0.003, 0.01, 0.03], k),
        age=rng.integers(18, 72, k),
        female=rng.choice([0.15, 0.5, 0.85], k),
        occupations=rng.integers(0, len(_OCCUPATIONS), (k, 2)),
    )


def make_users(s: SyntheticSettings, groups: Archetypes, rng: np.random.Generator) -> Users:
    """Draws users around their archetypes; listed tags are a noisy copy of their interests."""
    n, k = s.users, s.archetypes
    share = rng.dirichlet(np.full(k, 6.0))
    archetype = rng.choice(k, n, p=share)
    favourite = groups.interests[archetype].copy()
    stray = rng.random(favourite.shape) < s.noise.deviation
    favourite[stray] = rng.integers(0, s.topics, int(stray.sum()))
    interests = np.zeros((n, s.topics), bool)
    np.put_along_axis(interests, favourite, True, axis=1)
    flip = rng.random((n, len(FLAWS))) < s.noise.deviation / 2
    flip[:, 0] = False
    female = rng.random(n) < groups.female[archetype]
    usual = groups.occupations[archetype, rng.integers(0, 2, n)]
    odd = rng.random(n) < 0.2
    return Users(
        archetype=archetype,
        interests=interests,
        listed=_list_tags(favourite, s.topics, s.noise, rng),
        intolerance=groups.intolerance[archetype] ^ flip,
        patience_s=np.round(groups.patience_s[archetype] * rng.lognormal(0.0, s.noise.deviation, n), 1),
        restlessness=groups.restlessness[archetype],
        age=_with_unknown(np.clip(np.round(rng.normal(groups.age[archetype], 5.0)), 12, 90).astype(np.int64), rng),
        gender=_with_unknown(np.where(female, 0, 1), rng),
        occupation=_with_unknown(np.where(odd, rng.integers(0, len(_OCCUPATIONS), n), usual), rng),
        marital=rng.integers(0, len(_MARITAL), n),
        city=rng.integers(0, len(_CITY), n),
    )


def make_videos(s: SyntheticSettings, rng: np.random.Generator) -> Videos:
    """Draws videos with topic, title, duration, popularity and, at `flaw_rate`, a flaw."""
    m = s.videos
    topic = rng.integers(0, s.topics, m)
    flaw = np.where(rng.random(m) < s.flaw_rate, rng.integers(1, len(FLAWS), m), 0)
    other = (topic + rng.integers(1, s.topics, m)) % s.topics
    title_topic = np.where(flaw == FLAWS.index("clickbait"), other, topic)
    weight = rng.lognormal(0.0, 0.9, m)
    duration = np.clip(rng.lognormal(np.log(MEDIAN_DURATION_S), 0.75, m), 3.0, 600.0)
    return Videos(
        topic=topic,
        title_topic=title_topic,
        flaw=flaw,
        duration_s=np.round(duration, 1),
        weight=weight / weight.sum(),
        titles=_titles(title_topic, flaw, rng),
    )


def demographics(users: Users) -> dict[str, list[str | None]]:
    """Visible texts for gender, occupation, marital status and city, one entry a user; None where unknown."""
    columns = {
        "gender": users.gender,
        "occupation": users.occupation,
        "marital status": users.marital,
        "city size": users.city,
    }
    return {key: [USER_TEXTS[key][i] if i >= 0 else None for i in column] for key, column in columns.items()}


def _list_tags(favourite: Ints, topics: int, noise: NoiseSettings, rng: np.random.Generator) -> Ints:
    """Copies the favourites, drops some, replaces some by strangers; no tag stands twice, -1 fills the gaps."""
    listed = favourite.copy()
    wrong = rng.random(listed.shape) < noise.wrong_tags
    listed[wrong] = rng.integers(0, topics, int(wrong.sum()))
    listed[rng.random(listed.shape) < noise.missing_tags] = -1
    for j in range(1, listed.shape[1]):
        repeated = (listed[:, :j] == listed[:, j : j + 1]).any(axis=1)
        listed[repeated, j] = -1
    return listed


def _with_unknown(values: Ints, rng: np.random.Generator, share: float = 0.03) -> Ints:
    return np.where(rng.random(len(values)) < share, -1, values)


def _titles(title_topic: Ints, flaw: Ints, rng: np.random.Generator) -> list[str]:
    m = len(flaw)
    picks = {
        name: rng.integers(0, n, m)
        for name, n in (("adj", len(_ADJECTIVES)), ("noun", 3), ("tail", len(_TAILS)), ("extra", 4))
    }
    titles = []
    for i in range(m):
        topic = TOPICS[title_topic[i]]
        core = f"{topic.name} {topic.nouns[picks['noun'][i]]} {_TAILS[picks['tail'][i]]}"
        match FLAWS[flaw[i]]:
            case "clickbait":
                titles.append(f"{_BAIT[picks['extra'][i]]}: {core}!!!")
            case "vulgar":
                titles.append(f"{_VULGAR[picks['extra'][i]]} {core}".capitalize())
            case _:
                titles.append(f"{_ADJECTIVES[picks['adj'][i]]} {core}".capitalize())
    return titles
