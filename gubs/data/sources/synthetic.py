"""Source `synthetic`: a simulated video app whose truth is known.

Users of latent archetypes are shown videos by a recommender that knows only their listed tags. Each view ends by one of
several hazards (a flaw the user cannot stand, a topic the user does not care for, no time, a slip of the thumb, ...);
which one it was is the skip's true cause, kept in tables of its own that no model may see. All of it is vectorised:
933 K interactions take seconds.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from gubs.config import NoiseSettings, SyntheticSettings
from gubs.data.sources import FileCount, SourceTables
from gubs.data.sources.world import (
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
from gubs.records import FAST_SKIP_BELOW, SCHEMAS, Option, conform, empty

START_MS = 1747612800000
"""The log starts on 2025-05-19, 00:00 UTC, as the paper's does."""

P_FLAW_INTOLERANT, P_FLAW_TOLERANT = 0.92, 0.05
"""Chance that a flaw ends the view, for users who cannot and who can stand it."""
P_MISMATCH = 0.80
"""Chance that a topic outside the user's interests ends the view."""
P_REPETITION = 0.15
"""Chance that a video seen before ends the view."""
P_TOO_LONG = 0.75
"""Chance that a video longer than the user's patience ends the view."""
P_FINISH = 0.22
"""Chance that a view that is not skipped is finished."""

_REDRAWS = 3
"""Times the recommender tries for another video where the user has seen the first choice. In a small catalogue some
repetitions remain."""

MECHANISMS = (
    "watched",
    "flaw",
    "mismatch",
    "repetition",
    "too_long",
    "no_intent",
    "accident",
    "interruption",
    "exit",
    "autoplay",
)
"""How a view can end; the order up to `accident` is the order of precedence."""
_CAUSE = {
    "flaw": Option.B,
    "mismatch": Option.C,
    "repetition": Option.C,
    "too_long": Option.D,
    "no_intent": Option.D,
    "accident": Option.D,
    "interruption": Option.D,
    "exit": Option.D,
}
_P_DISLIKE = {"flaw": 0.8, "mismatch": 0.7, "repetition": 0.7, "too_long": 0.6, "no_intent": 0.4}
"""Chance that a skip is followed by an explicit dislike (paper: 50 K dislikes beside 72 K skips)."""
_VAGUE = 0.1
"""Share of dislikes whose text does not tell why."""
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
class _Shown:
    """Which video was put before which user, in the order of time within a user. One entry a view or exposure."""

    user: Ints
    video: Ints
    order: Ints
    """Place within the user's own sequence, from 0."""


def simulate(settings: SyntheticSettings, seed: int) -> SourceTables:
    """Draws the world and its log. The same settings and seed give the same tables, byte for byte."""
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5)]
    groups = make_archetypes(settings, streams[0])
    users = make_users(settings, groups, streams[1])
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
        truth={"skips": skips, "users": _user_truth(users, groups), "videos": _video_truth(videos)},
    )


def _sequential(
    s: SyntheticSettings, users: Users, videos: Videos, viewers: Ints, rng: np.random.Generator
) -> tuple[pa.Table, pa.Table]:
    shown = _recommend(users, videos, viewers, _lengths(len(viewers), s.views_per_user, rng), s.matched, rng)
    mechanism = _end_of_view(users, videos, shown, s.noise, rng)
    duration = videos.duration_s[shown.video]
    watched = _watch_seconds(mechanism, duration, rng)
    rate = np.minimum(watched / duration, 1.0)
    ids = _ids("s", len(shown.user))
    prev_gap, next_gap = _operation_gaps(mechanism, watched, rng)
    reasons = _dislikes(mechanism, videos.flaw[shown.video], videos.topic[shown.video], rate, rng)
    table = pa.table(
        {
            "interaction_id": ids,
            "user_id": _user_ids(shown.user),
            "video_id": _video_ids(shown.video),
            "task": pa.repeat(pa.scalar("sequential"), len(ids)),
            "timestamp": _times(shown, watched, s.days, rng),
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


def _click(s: SyntheticSettings, users: Users, videos: Videos, readers: Ints, rng: np.random.Generator) -> pa.Table:
    pages = np.maximum(1, np.round(_lengths(len(readers), s.exposures_per_user, rng) / s.page_size)).astype(np.int64)
    shown = _recommend(users, videos, readers, pages * s.page_size, s.matched, rng)
    page, position = shown.order // s.page_size, shown.order % s.page_size
    noticed = rng.random(len(position)) < 1.0 / (1.0 + 0.12 * position)
    title_fits = users.interests[shown.user, videos.title_topic[shown.video]]
    flaw = videos.flaw[shown.video]
    repelled = users.intolerance[shown.user, flaw] & (flaw > 0)
    wish = np.where(title_fits, 0.34, 0.03) * np.where(repelled, 0.15, 1.0)
    clicked = noticed & (rng.random(len(wish)) < wish)
    duration = videos.duration_s[shown.video]
    watched = np.round(_watch_seconds(np.zeros(len(wish), np.int64), duration, rng), 2)
    ids = _ids("c", len(shown.user))
    first = np.flatnonzero(position == 0)
    page_time = np.repeat(
        _times(_Shown(shown.user[first], shown.video[first], page[first]), duration[first], s.days, rng), s.page_size
    )
    table = pa.table(
        {
            "interaction_id": ids,
            "user_id": _user_ids(shown.user),
            "video_id": _video_ids(shown.video),
            "task": pa.repeat(pa.scalar("click"), len(ids)),
            "timestamp": page_time,
            "page_id": pa.compute.binary_join_element_wise(
                _user_ids(shown.user), pa.array(page).cast(pa.string()), "p"
            ),
            "position": position,
            "watch_s": pa.array(watched, mask=~clicked),
            "play_rate": pa.array(np.minimum(watched / duration, 1.0), mask=~clicked),
            "clicked": clicked,
        }
    )
    return conform(table, "interactions")


def _lengths(n: int, mean: float, rng: np.random.Generator) -> Ints:
    """Records per user: many short logs, few long ones, the given mean, at least 6."""
    raw = rng.lognormal(0.0, 0.7, n)
    return np.maximum(6, np.round(raw * (mean / raw.mean()))).astype(np.int64) if n else np.zeros(0, np.int64)


def _recommend(
    users: Users, videos: Videos, people: Ints, lengths: Ints, matched: float, rng: np.random.Generator
) -> _Shown:
    """Chooses videos by the listed tags (or by popularity), more popular videos more often, seldom one seen before."""
    user = np.repeat(people, lengths)
    order = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    video = _choose(users, videos, user, matched, rng)
    for _ in range(_REDRAWS):
        again = np.flatnonzero(_seen_before(user, video))
        video[again] = _choose(users, videos, user[again], matched, rng)
    return _Shown(user, video, order)


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
    """One video for each asked topic, by popularity. The recommender goes by titles, so clickbait fools it too."""
    chosen = np.zeros(len(topic), np.int64)
    draw = rng.random(len(topic))
    for t in range(int(videos.title_topic.max()) + 1):
        asked, there = np.flatnonzero(topic == t), np.flatnonzero(videos.title_topic == t)
        if len(there) == 0:
            there = np.arange(len(videos.topic))
        cumulative = np.cumsum(videos.weight[there])
        chosen[asked] = there[np.searchsorted(cumulative, draw[asked] * cumulative[-1] * (1 - 1e-12))]
    return chosen


def _end_of_view(users: Users, videos: Videos, shown: _Shown, noise: NoiseSettings, rng: np.random.Generator) -> Ints:
    """Index into MECHANISMS for each view."""
    u, v = shown.user, shown.video
    flaw = videos.flaw[v]
    hazards: dict[str, Floats] = {
        "accident": np.full(len(u), noise.accidental_skip),
        "no_intent": users.restlessness[u],
        "too_long": np.where(videos.duration_s[v] > users.patience_s[u], P_TOO_LONG, 0.0),
        "repetition": np.where(_seen_before(u, v), P_REPETITION, 0.0),
        "mismatch": np.where(users.interests[u, videos.topic[v]], 0.0, P_MISMATCH),
        "flaw": np.where(flaw == 0, 0.0, np.where(users.intolerance[u, flaw], P_FLAW_INTOLERANT, P_FLAW_TOLERANT)),
        "autoplay": np.full(len(u), noise.autoplay),
        "interruption": np.full(len(u), noise.interruption),
        "exit": np.full(len(u), noise.app_exit),
    }
    mechanism = np.zeros(len(u), np.int64)
    for name, chance in hazards.items():  # the later overrides the earlier
        mechanism[rng.random(len(u)) < chance] = MECHANISMS.index(name)
    return mechanism


def _seen_before(user: Ints, video: Ints) -> Bools:
    key = user * (int(video.max(initial=0)) + 1) + video
    _, first = np.unique(key, return_index=True)
    seen = np.ones(len(key), bool)
    seen[first] = False
    return seen


def _watch_seconds(mechanism: Ints, duration: Floats, rng: np.random.Generator) -> Floats:
    n = len(mechanism)
    skipped = FAST_SKIP_BELOW * 0.97 * rng.beta(1.2, 1.8, n)
    watched = np.where(rng.random(n) < P_FINISH, rng.uniform(0.91, 1.0, n), 0.31 + 0.58 * rng.beta(1.4, 2.6, n))
    again = (watched > 0.9) & (rng.random(n) < 0.1)
    watched = np.where(again, rng.uniform(1.2, 2.5, n), watched)
    broken_off = rng.uniform(0.02, 0.9, n)
    alone = rng.uniform(0.5, 1.0, n)
    kind = np.array(["w", "s", "s", "s", "s", "s", "s", "b", "b", "a"])[mechanism]
    return np.select([kind == "s", kind == "b", kind == "a"], [skipped, broken_off, alone], watched) * duration


def _operation_gaps(mechanism: Ints, watched: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Seconds to the operations before and after the one that ended the view; NaN where there is none."""
    n = len(mechanism)
    before = np.minimum(watched, rng.exponential(20.0, n)) + 0.2
    after = np.minimum(rng.exponential(8.0, n), 45.0) + 0.2
    after = np.where(mechanism == MECHANISMS.index("interruption"), rng.uniform(150.0, 3600.0, n), after)
    gone_for_good = (mechanism == MECHANISMS.index("exit")) & (
        rng.random(n) < 0.5
    )  # the others are back within a minute
    after = np.where(gone_for_good, np.nan, after)
    before = np.where(mechanism == MECHANISMS.index("autoplay"), np.nan, before)
    return np.round(before, 2), np.round(after, 2)


def _times(shown: _Shown, lasted: Floats, days: int, rng: np.random.Generator) -> Ints:
    """Start times, ms: a user's views follow each other within sessions of about eight, spread over the days."""
    n = len(shown.user)
    new_session = (shown.order == 0) | (rng.random(n) < 1 / 8)
    users, index = np.unique(shown.user, return_inverse=True)
    sessions = np.bincount(index, weights=new_session).astype(np.int64)
    number = np.cumsum(new_session) - 1
    starts_at = np.flatnonzero(shown.order == 0)
    within_user = number - number[starts_at][index] if n else number
    slot_s = days * 86400.0 / np.maximum(sessions, 1)[index] if n else np.zeros(0)
    step = lasted + rng.uniform(0.5, 3.0, n)
    run = np.cumsum(step) - step
    offset = run - run[np.flatnonzero(new_session)][number] if n else run
    begin = (within_user + rng.random(len(users))[index] * 0.5) * slot_s if n else np.zeros(0)
    # a long session may not run into the next slot: it is squeezed, the order stays
    return START_MS + np.round((begin + np.minimum(offset, 0.45 * slot_s) + shown.order * 1e-3) * 1000).astype(np.int64)


def _dislikes(mechanism: Ints, flaw: Ints, topic: Ints, rate: Floats, rng: np.random.Generator) -> list[str | None]:
    chance = np.array([_P_DISLIKE.get(m, 0.0) for m in MECHANISMS])[mechanism]
    said = (rng.random(len(mechanism)) < chance) & (rate < FAST_SKIP_BELOW)
    vague = rng.random(len(mechanism)) < _VAGUE
    pick = rng.integers(0, 2, len(mechanism))
    reasons: list[str | None] = [None] * len(mechanism)
    for i in np.flatnonzero(said):
        name = MECHANISMS[mechanism[i]]
        key = "vague" if vague[i] else FLAWS[flaw[i]] if name == "flaw" else name
        reasons[i] = _REASONS[key][pick[i]].format(topic=TOPICS[topic[i]].name)
    return reasons


def _skip_truth(ids: pa.Array, mechanism: Ints, rate: Floats) -> pa.Table:
    skipped = np.flatnonzero(rate < FAST_SKIP_BELOW)
    names = [MECHANISMS[m] for m in mechanism[skipped]]
    causes = [str(_CAUSE[m]) for m in names]
    return pa.table(
        {"interaction_id": ids.take(pa.array(skipped)), "cause": causes, "mechanism": names}, schema=SCHEMAS["truth"]
    )


def _users_table(users: Users) -> pa.Table:
    texts = demographics(users)
    n = len(users.archetype)
    others = [{k: v for k in ("marital status", "city size") if (v := texts[k][i])} for i in range(n)]
    tags = [[TOPICS[t].name for t in row if t >= 0] for row in users.listed]
    table = {
        "user_id": _user_ids(np.arange(n)),
        "age": pa.array(users.age, pa.int32(), mask=users.age < 0),
        "gender": pa.array(texts["gender"], pa.string()),
        "occupation": pa.array(texts["occupation"], pa.string()),
        "other": pa.array([list(o.items()) for o in others], SCHEMAS["users"].field("other").type),
        "tags": pa.array(tags, pa.list_(pa.string())),
    }
    return conform(pa.table(table), "users")


def _videos_table(videos: Videos) -> pa.Table:
    tags = [[TOPICS[t].name] for t in videos.title_topic]
    columns = {
        "video_id": _video_ids(np.arange(len(videos.topic))),
        "title": videos.titles,
        "duration_s": videos.duration_s,
        "tags": pa.array(tags, pa.list_(pa.string())),
    }
    return conform(pa.table(columns), "videos")


def _user_truth(users: Users, groups: Archetypes) -> pa.Table:
    n = len(users.archetype)
    return pa.table(
        {
            "user_id": _user_ids(np.arange(n)),
            "archetype": pa.array(users.archetype, pa.int32()),
            "interests": [[TOPICS[t].name for t in np.flatnonzero(row)] for row in users.interests],
            "intolerance": [[FLAWS[f] for f in np.flatnonzero(row)] for row in users.intolerance],
            "patience_s": users.patience_s,
            "archetype_interests": [[TOPICS[t].name for t in groups.interests[a]] for a in users.archetype],
        }
    )


def _video_truth(videos: Videos) -> pa.Table:
    return pa.table(
        {
            "video_id": _video_ids(np.arange(len(videos.topic))),
            "topic": [TOPICS[t].name for t in videos.topic],
            "title_topic": [TOPICS[t].name for t in videos.title_topic],
            "flaw": [FLAWS[f] for f in videos.flaw],
        }
    )


def _ids(prefix: str, n: int) -> pa.Array:
    return pa.array(np.char.add(prefix, np.char.zfill(np.arange(n).astype(str), 7)), pa.string())


def _user_ids(index: Ints) -> pa.Array:
    return _names("u", index, 6)


def _video_ids(index: Ints) -> pa.Array:
    return _names("v", index, 6)


def _names(prefix: str, index: Ints, width: int) -> pa.Array:
    top = int(index.max(initial=0)) + 1
    return pa.array([f"{prefix}{i:0{width}d}" for i in range(top)], pa.string()).take(pa.array(index))
