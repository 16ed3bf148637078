"""The source `synthetic`: a simulated video app whose true causes are known.

A recommender that knows only the listed tags shows videos to users of latent archetypes. One of several hazards ends
each view (a flaw the user cannot stand, a topic the user does not care for, no time, a slip of the thumb, ...); it is
the skip's true cause, kept in separate tables that no model may see. Everything is vectorised: a million interactions
take seconds.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from gubs.data.sources import FileCount, SourceTables
from gubs.records import FAST_SKIP_BELOW, SCHEMAS, Option, conform, empty
from gubs.simulator.population import (
    FLAWS,
    TOPICS,
    Archetypes,
    Bools,
    Floats,
    Ints,
    Users,
    Videos,
    demographics,
    make_archetypes,
    make_users,
    make_videos,
)
from gubs.simulator.settings import NoiseSettings, SyntheticSettings

START_MS = 1747612800000
"""The log starts on 2025-05-19, 00:00 UTC, as the paper's does."""

P_FLAW_INTOLERANT, P_FLAW_TOLERANT = 0.92, 0.05
"""Probability that a flaw ends the view, for users who cannot and who can stand it."""
P_MISMATCH = 0.80
"""Probability that a topic outside the user's interests ends the view."""
P_REPETITION = 0.15
"""Probability that a video seen before ends the view."""
P_TOO_LONG = 0.75
"""Probability that a video longer than the user's patience ends the view."""

_REDRAWS = 3
"""Times the recommender draws another video if the user has seen the first one. In a small catalogue some repetitions
remain."""

MECHANISMS = (
    *("watched", "flaw", "mismatch", "repetition", "too_long", "no_intent", "accident"),
    *("interruption", "exit", "autoplay"),
)
"""How a view can end; the order up to `accident` is the order of precedence."""
UNMEANT = frozenset({"accident", "interruption", "exit"})
"""Mechanisms of skips that nobody meant."""
_CAUSE = {"flaw": Option.B, "mismatch": Option.C, "repetition": Option.C}
"""True causes of skips; all others are D."""
_P_DISLIKE = {"flaw": 0.8, "mismatch": 0.7, "repetition": 0.7, "too_long": 0.6, "no_intent": 0.4}
"""Probability that an explicit dislike follows a skip (paper: 50 K dislikes and 72 K skips)."""
_VAGUE = 0.1
"""Share of dislikes whose text gives no reason."""
_REASONS: dict[str, tuple[str, ...]] = {
    "clickbait": ("The title promises something else than the video shows", "Clickbait, nothing of the title is in it"),
    "unpleasant": ("Disgusting picture, I had to look away", "Those creeping things make me feel sick"),
    "vulgar": ("Crude language in the title", "Too vulgar for me"),
    "mismatch": ("I do not care for {topic}", "Why am I shown {topic}? Not my thing"),
    "repetition": ("I have seen this {topic} video before", "The same {topic} video again"),
    "too_long": ("Too long, I have no time for that now", "Cannot watch that long at the moment"),
    "no_intent": ("I did not want to watch anything just now", "Not now, wrong moment"),
    "vague": ("I do not like it", "Not good"),
}


@dataclass
class _Exposures:
    """Which user was shown which video, in order of time per user. One entry per view or exposure."""

    user: Ints
    video: Ints
    order: Ints
    """Position in the user's sequence, from 0."""


def simulate(settings: SyntheticSettings, seed: int) -> SourceTables:
    """Draws the app's users, videos and log. The same settings and seed give the same tables, byte for byte."""
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5)]
    archetypes = make_archetypes(settings, streams[0])
    users = make_users(settings, archetypes, streams[1])
    videos = make_videos(settings, streams[2])
    viewers = round(settings.users * settings.sequential_share)
    views, skips = _sequential(settings, users, videos, np.arange(viewers), streams[3])
    clicks = _click(settings, users, videos, np.arange(viewers, settings.users), streams[4])
    interactions = pa.concat_tables([views, clicks])
    return SourceTables(
        users=_users_table(users),
        videos=_videos_table(videos),
        interactions=interactions,
        rejects=empty("rejects"),
        files={"simulation": FileCount(interactions.num_rows, interactions.num_rows)},
        truth={"skips": skips, "users": _user_truth(users, archetypes), "videos": _video_truth(videos)},
    )


def _sequential(
    s: SyntheticSettings, users: Users, videos: Videos, viewers: Ints, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    lengths = _lengths(len(viewers), s.views_per_user, s.views_spread, rng)
    if s.loyalty:
        lengths = _by_hazard(lengths, _hazard(users, videos, viewers), s.loyalty, rng)
    exposures = _recommend(users, videos, viewers, lengths, s.matched, rng)
    mechanism = _end_of_view(users, videos, exposures, s.noise, rng)
    duration = videos.duration_s[exposures.video]
    watched = _watch_seconds(mechanism, duration, s, rng)
    rate = np.minimum(watched / duration, 1.0)
    ids = _ids("s", np.arange(len(watched)), digits=7)
    prev_gap, next_gap = _operation_gaps(mechanism, watched, rng)
    reasons = _dislikes(mechanism, videos.flaw[exposures.video], videos.topic[exposures.video], rate, rng)
    table = pa.table(
        {
            "interaction_id": ids,
            "user_id": _ids("u", exposures.user),
            "video_id": _ids("v", exposures.video),
            "task": pa.repeat(pa.scalar("sequential"), len(ids)),
            "timestamp": _times(exposures, watched, s.days, rng),
            "watch_s": np.round(watched, 2),
            "play_rate": np.minimum(np.round(watched, 2) / duration, 1.0),
            "disliked": np.array([r is not None for r in reasons]),
            "dislike_reason": pa.array(reasons, pa.string()),
            "prev_op_gap_s": pa.array(prev_gap, mask=np.isnan(prev_gap)),
            "next_op_gap_s": pa.array(next_gap, mask=np.isnan(next_gap)),
            "exited_app": mechanism == MECHANISMS.index("exit"),
        }
    )
    return conform(table, "interactions"), _skip_truth(ids, mechanism, table["play_rate"].to_numpy())


def _click(s: SyntheticSettings, users: Users, videos: Videos, people: Ints, rng: np.random.Generator) -> pa.Table:
    pages = np.maximum(
        1, np.round(_lengths(len(people), s.exposures_per_user, s.exposures_spread, rng) / s.page_size)
    ).astype(np.int64)
    exposures = _recommend(users, videos, people, pages * s.page_size, s.matched, rng)
    page, position = exposures.order // s.page_size, exposures.order % s.page_size
    noticed = rng.random(len(position)) < 1.0 / (1.0 + 0.12 * position)
    title_fits = users.interests[exposures.user, videos.title_topic[exposures.video]]
    flaw = videos.flaw[exposures.video]
    repelled = users.intolerance[exposures.user, flaw] & (flaw > 0)
    interest = np.where(title_fits, s.click_interest, 0.03) * np.where(repelled, 0.15, 1.0)
    clicked = noticed & (rng.random(len(interest)) < interest)
    duration = videos.duration_s[exposures.video]
    watched = np.round(_watch_seconds(np.zeros(len(interest), np.int64), duration, s, rng), 2)
    ids = _ids("c", np.arange(len(watched)), digits=7)
    first = np.flatnonzero(position == 0)
    page_starts = _Exposures(exposures.user[first], exposures.video[first], page[first])
    page_ids = pc.binary_join_element_wise(_ids("u", exposures.user), pa.array(page).cast(pa.string()), "p")
    table = pa.table(
        {
            "interaction_id": ids,
            "user_id": _ids("u", exposures.user),
            "video_id": _ids("v", exposures.video),
            "task": pa.repeat(pa.scalar("click"), len(ids)),
            "timestamp": np.repeat(_times(page_starts, duration[first], s.days, rng), s.page_size),
            "page_id": page_ids,
            "position": position,
            "watch_s": pa.array(watched, mask=~clicked),
            "play_rate": pa.array(np.minimum(watched / duration, 1.0), mask=~clicked),
            "clicked": clicked,
        }
    )
    return conform(table, "interactions")


def _lengths(n: int, mean: float, spread: float, rng: np.random.Generator) -> Ints:
    """Records per user: many short logs, few long ones, at least 6, with the given mean."""
    raw = rng.lognormal(0.0, spread, n)
    return np.maximum(6, np.round(raw * (mean / raw.mean()))).astype(np.int64) if n else np.zeros(0, np.int64)


def _hazard(users: Users, videos: Videos, viewers: Ints) -> Floats:
    """Roughly what share users skip: for listed tags that are not interests, long videos, wrong moments."""
    listed = users.listed[viewers]
    liked = np.take_along_axis(users.interests[viewers], np.maximum(listed, 0), axis=1)
    mismatched = ((listed >= 0) & ~liked).sum(axis=1) / np.maximum(1, (listed >= 0).sum(axis=1))
    shorter = np.searchsorted(np.sort(videos.duration_s), users.patience_s[viewers], side="right")
    too_long = 1.0 - shorter / len(videos.duration_s)
    return P_MISMATCH * mismatched + P_TOO_LONG * too_long + users.restlessness[viewers]


def _by_hazard(lengths: Ints, hazard: Floats, loyalty: float, rng: np.random.Generator) -> Ints:
    """The same lengths, the longer ones rather for users with a small hazard."""
    n = len(lengths)
    calm = np.argsort(np.argsort(-hazard, kind="stable"), kind="stable") / max(1, n)
    return np.sort(lengths)[np.argsort(np.argsort(loyalty * calm + (1.0 - loyalty) * rng.random(n), kind="stable"))]


def _recommend(
    users: Users, videos: Videos, people: Ints, lengths: Ints, matched: float, rng: np.random.Generator
) -> _Exposures:
    """Chooses videos by the listed tags or by popularity, popular ones more often, and rarely one seen before."""
    user = np.repeat(people, lengths)
    order = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    video = _choose(users, videos, user, matched, rng)
    for _ in range(_REDRAWS):
        again = np.flatnonzero(_seen_before(user, video))
        video[again] = _choose(users, videos, user[again], matched, rng)
    return _Exposures(user, video, order)


def _choose(users: Users, videos: Videos, user: Ints, matched: float, rng: np.random.Generator) -> Ints:
    """One video for each entry of `user`."""
    listed = users.listed[user]
    pick = rng.random(listed.shape)
    pick[listed < 0] = -1.0
    best = pick.argmax(axis=1)
    topic = np.where(pick.max(axis=1) >= 0, listed[np.arange(len(user)), best], -1)
    by_tags = (rng.random(len(user)) < matched) & (topic >= 0)
    popular = np.searchsorted(np.cumsum(videos.weight), rng.random(len(user)) * videos.weight.sum() * (1 - 1e-12))
    return np.where(by_tags, _popular_in_topic(videos, topic, rng), popular)


def _popular_in_topic(videos: Videos, topic: Ints, rng: np.random.Generator) -> Ints:
    """One video for each topic in `topic`, by popularity. The recommender uses titles, so clickbait fools it too."""
    chosen = np.zeros(len(topic), np.int64)
    draw = rng.random(len(topic))
    for t in range(int(videos.title_topic.max()) + 1):
        rows, candidates = np.flatnonzero(topic == t), np.flatnonzero(videos.title_topic == t)
        if len(candidates) == 0:
            candidates = np.arange(len(videos.topic))
        cumulative = np.cumsum(videos.weight[candidates])
        chosen[rows] = candidates[np.searchsorted(cumulative, draw[rows] * cumulative[-1] * (1 - 1e-12))]
    return chosen


def _end_of_view(
    users: Users, videos: Videos, exposures: _Exposures, noise: NoiseSettings, rng: np.random.Generator
) -> Ints:
    """Index into MECHANISMS for each view."""
    u, v = exposures.user, exposures.video
    flaw = videos.flaw[v]
    hazards: dict[str, Floats | float] = {
        "accident": noise.accidental_skip,
        "no_intent": users.restlessness[u],
        "too_long": np.where(videos.duration_s[v] > users.patience_s[u], P_TOO_LONG, 0.0),
        "repetition": np.where(_seen_before(u, v), P_REPETITION, 0.0),
        "mismatch": np.where(users.interests[u, videos.topic[v]], 0.0, P_MISMATCH),
        "flaw": np.where(flaw == 0, 0.0, np.where(users.intolerance[u, flaw], P_FLAW_INTOLERANT, P_FLAW_TOLERANT)),
        "autoplay": noise.autoplay,
        "interruption": noise.interruption,
        "exit": noise.app_exit,
    }
    mechanism = np.zeros(len(u), np.int64)
    for name, probability in hazards.items():  # later ones override earlier ones
        mechanism[rng.random(len(u)) < probability] = MECHANISMS.index(name)
    return mechanism


def _seen_before(user: Ints, video: Ints) -> Bools:
    return pd.DataFrame({"user": user, "video": video}).duplicated().to_numpy()


def _watch_seconds(mechanism: Ints, duration: Floats, s: SyntheticSettings, rng: np.random.Generator) -> Floats:
    n = len(mechanism)
    skipped = FAST_SKIP_BELOW * 0.97 * rng.beta(1.2, 1.8, n)
    watched = np.where(rng.random(n) < s.finish, rng.uniform(0.91, 1.0, n), 0.31 + 0.58 * rng.beta(1.4, s.leave, n))
    again = (watched > 0.9) & (rng.random(n) < 0.1)
    watched = np.where(again, rng.uniform(1.2, 2.5, n), watched)
    interrupted = rng.uniform(0.02, 0.9, n)
    unattended = rng.uniform(0.5, 1.0, n)
    last_skip, exited = MECHANISMS.index("accident"), MECHANISMS.index("exit")
    kinds = [mechanism == 0, mechanism <= last_skip, mechanism <= exited]
    return np.select(kinds, [watched, skipped, interrupted], unattended) * duration


def _operation_gaps(mechanism: Ints, watched: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Seconds to the operations before and after the one that ended the view; NaN where there is none."""
    n = len(mechanism)
    before = np.minimum(watched, rng.exponential(20.0, n)) + 0.2
    after = np.minimum(rng.exponential(8.0, n), 45.0) + 0.2
    after = np.where(mechanism == MECHANISMS.index("interruption"), rng.uniform(150.0, 3600.0, n), after)
    stayed_away = (mechanism == MECHANISMS.index("exit")) & (rng.random(n) < 0.5)  # others return within a minute
    after = np.where(stayed_away, np.nan, after)
    before = np.where(mechanism == MECHANISMS.index("autoplay"), np.nan, before)
    return np.round(before, 2), np.round(after, 2)


def _times(exposures: _Exposures, durations: Floats, days: int, rng: np.random.Generator) -> Ints:
    """Start times, ms: a user's views follow each other in sessions of about eight, spread over the days."""
    n = len(exposures.user)
    if n == 0:
        return np.zeros(0, np.int64)
    new_session = (exposures.order == 0) | (rng.random(n) < 1 / 8)
    users, index = np.unique(exposures.user, return_inverse=True)
    sessions = np.bincount(index, weights=new_session).astype(np.int64)
    session = np.cumsum(new_session) - 1
    session_of_user = session - session[np.flatnonzero(exposures.order == 0)][index]
    slot_s = days * 86400.0 / np.maximum(sessions, 1)[index]
    step = durations + rng.uniform(0.5, 3.0, n)
    elapsed = np.cumsum(step) - step
    offset = elapsed - elapsed[np.flatnonzero(new_session)][session]
    begin = (session_of_user + rng.random(len(users))[index] * 0.5) * slot_s
    # A long session must not run into the next slot: its times are squeezed, their order is kept.
    return START_MS + np.round((begin + np.minimum(offset, 0.45 * slot_s) + exposures.order * 1e-3) * 1000).astype(
        np.int64
    )


def _dislikes(mechanism: Ints, flaw: Ints, topic: Ints, rate: Floats, rng: np.random.Generator) -> list[str | None]:
    probability = np.array([_P_DISLIKE.get(m, 0.0) for m in MECHANISMS])[mechanism]
    disliked = (rng.random(len(mechanism)) < probability) & (rate < FAST_SKIP_BELOW)
    vague = rng.random(len(mechanism)) < _VAGUE
    pick = rng.integers(0, 2, len(mechanism))
    reasons: list[str | None] = [None] * len(mechanism)
    for i in np.flatnonzero(disliked):
        name = MECHANISMS[mechanism[i]]
        key = "vague" if vague[i] else FLAWS[flaw[i]] if name == "flaw" else name
        reasons[i] = _REASONS[key][pick[i]].format(topic=TOPICS[topic[i]].name)
    return reasons


def _skip_truth(ids: pa.Array, mechanism: Ints, rate: Floats) -> pa.Table:
    skipped = np.flatnonzero(rate < FAST_SKIP_BELOW)
    names = [MECHANISMS[m] for m in mechanism[skipped]]
    causes = [str(_CAUSE.get(m, Option.D)) for m in names]
    columns = {"interaction_id": ids.take(pa.array(skipped)), "cause": causes, "mechanism": names}
    return pa.table(columns, schema=SCHEMAS["truth"])


def _users_table(users: Users) -> pa.Table:
    texts = demographics(users)
    n = len(users.archetype)
    others = [[(k, v) for k in ("marital status", "city size") if (v := texts[k][i])] for i in range(n)]
    columns = {
        "user_id": _ids("u", np.arange(n)),
        "age": pa.array(users.age, pa.int32(), mask=users.age < 0),
        "gender": pa.array(texts["gender"], pa.string()),
        "occupation": pa.array(texts["occupation"], pa.string()),
        "other": pa.array(others, SCHEMAS["users"].field("other").type),
        "tags": pa.array([[TOPICS[t].name for t in row if t >= 0] for row in users.listed], pa.list_(pa.string())),
    }
    return conform(pa.table(columns), "users")


def _videos_table(videos: Videos) -> pa.Table:
    columns = {
        "video_id": _ids("v", np.arange(len(videos.topic))),
        "title": videos.titles,
        "duration_s": videos.duration_s,
        "tags": [[TOPICS[t].name] for t in videos.title_topic],
    }
    return conform(pa.table(columns), "videos")


def _user_truth(users: Users, archetypes: Archetypes) -> pa.Table:
    return pa.table(
        {
            "user_id": _ids("u", np.arange(len(users.archetype))),
            "archetype": pa.array(users.archetype, pa.int32()),
            "interests": [[TOPICS[t].name for t in np.flatnonzero(row)] for row in users.interests],
            "intolerance": [[FLAWS[f] for f in np.flatnonzero(row)] for row in users.intolerance],
            "patience_s": users.patience_s,
            "archetype_interests": [[TOPICS[t].name for t in archetypes.interests[a]] for a in users.archetype],
        }
    )


def _video_truth(videos: Videos) -> pa.Table:
    return pa.table(
        {
            "video_id": _ids("v", np.arange(len(videos.topic))),
            "topic": [TOPICS[t].name for t in videos.topic],
            "title_topic": [TOPICS[t].name for t in videos.title_topic],
            "flaw": [FLAWS[f] for f in videos.flaw],
        }
    )


def _ids(prefix: str, numbers: Ints, digits: int = 6) -> pa.Array:
    count = int(numbers.max(initial=0)) + 1
    return pa.array([f"{prefix}{i:0{digits}d}" for i in range(count)], pa.string()).take(pa.array(numbers))
