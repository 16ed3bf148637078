"""The population of the simulated app: topics, archetypes, users and videos, with their hidden truth.

Everything is drawn from a seed with numpy's PCG64, in arrays with one row per user or video. What a model may see
(listed tags, titles, durations, demographics) and what it may not (interests, tolerances, flaws) are separate fields.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gubs.simulator.settings import NoiseSettings, SyntheticSettings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

FLAWS = ("none", "clickbait", "unpleasant", "vulgar")
"""Index 0 means no flaw. Clickbait: the title names another topic than the picture shows."""

INTERESTS_PER_USER = 4
MEDIAN_DURATION_S = 24.0
"""In news feeds, videos of 10-30 s are the most frequent (paper, A.4)."""


@dataclass(frozen=True)
class Topic:
    """The subject of a video, and words for its title."""

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
    *("for beginners", "explained", "at home", "this week", "with friends"),
    *("step by step", "from start to finish", "live"),
)
_BAIT = ("You will not believe this", "Doctors hate this", "Number 7 is shocking", "Gone in 24 hours")
_VULGAR = ("damn", "crappy", "stupid-ass", "bloody idiotic")

_GENDERS = ("female", "male")
_OCCUPATIONS = (
    *("student", "office worker", "public servant", "retired", "driver"),
    *("teacher", "nurse", "engineer", "shopkeeper", "farmer"),
)
_MARITAL = ("single", "married", "parenting")
_CITY = ("small town", "city", "metropolis")
USER_TEXTS = {"gender": _GENDERS, "occupation": _OCCUPATIONS, "marital status": _MARITAL, "city size": _CITY}
"""Values of the demographic fields except age."""


@dataclass(frozen=True)
class Archetypes:
    """Latent groups of users; k rows."""

    interests: Ints
    """(k, INTERESTS_PER_USER) topic indices."""
    intolerance: Bools
    """(k, 4): which flaws the group cannot stand; column 0 (no flaw) is False."""
    patience_s: Floats
    """(k,) longest duration for which the group has time."""
    restlessness: Floats
    """(k,) probability that a member does not want to watch at that moment."""
    age: Ints
    """(k,) mean age in the group, years."""
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
    """Topic of the picture."""
    title_topic: Ints
    """Topic of the title; differs from `topic` only for clickbait."""
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
    interests[:, 0] = np.arange(k) % s.topics  # every group has a different first topic
    for row in interests:
        others = np.setdiff1d(np.arange(s.topics), row[:1])
        row[1:] = rng.permutation(others)[: INTERESTS_PER_USER - 1]
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


def make_users(s: SyntheticSettings, archetypes: Archetypes, rng: np.random.Generator) -> Users:
    """Draws users around their archetypes; their listed tags are a noisy copy of their interests."""
    n, k = s.users, s.archetypes
    share = rng.dirichlet(np.full(k, 6.0))
    archetype = rng.choice(k, n, p=share)
    favourite = archetypes.interests[archetype].copy()
    deviating = rng.random(favourite.shape) < s.noise.deviation
    favourite[deviating] = rng.integers(0, s.topics, int(deviating.sum()))
    interests = np.zeros((n, s.topics), bool)
    np.put_along_axis(interests, favourite, True, axis=1)
    flipped = rng.random((n, len(FLAWS))) < s.noise.deviation / 2
    flipped[:, 0] = False
    female = rng.random(n) < archetypes.female[archetype]
    usual = archetypes.occupations[archetype, rng.integers(0, 2, n)]
    unusual = rng.random(n) < 0.2
    return Users(
        archetype=archetype,
        interests=interests,
        listed=_list_tags(favourite, s.topics, s.noise, rng),
        intolerance=archetypes.intolerance[archetype] ^ flipped,
        patience_s=np.round(archetypes.patience_s[archetype] * rng.lognormal(0.0, s.noise.deviation, n), 1),
        restlessness=archetypes.restlessness[archetype],
        age=_with_unknown(np.clip(np.round(rng.normal(archetypes.age[archetype], 5.0)), 12, 90).astype(np.int64), rng),
        gender=_with_unknown(np.where(female, 0, 1), rng),
        occupation=_with_unknown(np.where(unusual, rng.integers(0, len(_OCCUPATIONS), n), usual), rng),
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
    weight = rng.lognormal(0.0, s.popularity, m)
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
    """Texts for gender, occupation, marital status and city size, one entry per user; None if unknown."""
    columns = zip(USER_TEXTS.items(), (users.gender, users.occupation, users.marital, users.city), strict=True)
    return {field: [texts[i] if i >= 0 else None for i in column] for (field, texts), column in columns}


def _list_tags(favourite: Ints, topics: int, noise: NoiseSettings, rng: np.random.Generator) -> Ints:
    """Copies the favourites, drops some and replaces some by other topics; -1 stands for dropped and repeated tags."""
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
    adjective, noun, tail, extra = (rng.integers(0, n, m) for n in (len(_ADJECTIVES), 3, len(_TAILS), 4))
    titles = []
    for i in range(m):
        topic = TOPICS[title_topic[i]]
        core = f"{topic.name} {topic.nouns[noun[i]]} {_TAILS[tail[i]]}"
        match FLAWS[flaw[i]]:
            case "clickbait":
                titles.append(f"{_BAIT[extra[i]]}: {core}!!!")
            case "vulgar":
                titles.append(f"{_VULGAR[extra[i]]} {core}".capitalize())
            case _:
                titles.append(f"{_ADJECTIVES[adjective[i]]} {core}".capitalize())
    return titles
