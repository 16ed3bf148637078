"""User profiles from rated items (A.7): for sources whose users have no interest tags, MovieLens and Amazon Books.

Only history records are read, without items that are also targets of the user, so a profile reveals nothing of what
will be predicted.
"""

import collections
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import JsonObject, Run, StageJob
from gubs.data.ifvr import IFVR
from gubs.llm.calls import Answer, LLMRequest
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.fields import plain
from gubs.prompts.people import Person
from gubs.prompts.question import video_line
from gubs.records import Role, Split, User, Video
from gubs.teachers.annotator import annotator, by_cause, failures, in_words, request_about
from gubs.teachers.forms import profile_form, words
from gubs.teachers.settings import TeacherSettings

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        ("text", pa.string()),
        ("tags", pa.list_(pa.string())),
        ("evidence", pa.list_(pa.string())),
        ("n", pa.int32()),
        ("until", pa.int64()),
    ]
)
"""text: the profile; tags: interests, strongest first; evidence: ids of the `n` interactions on which they rest; until:
time of the latest of these (milliseconds since 1970)."""

_ITEM_NOUNS = {"movielens": "films", "netflix": "films", "amazon": "books", "yelp": "places"}


@dataclass(frozen=True)
class Rated:
    """A user and the rated items that show the user's taste."""

    user: User
    liked: tuple[str, ...]
    """Items with 4 stars or more, one sanitized line per item."""
    disliked: tuple[str, ...]
    """Items with 2 stars or fewer."""
    evidence: tuple[str, ...]
    until: int | None
    """Time of the latest item; None if the source has no times."""


def make(job: StageJob, teachers: TeacherSettings, llm: LLMSettings, seed: int, kind: str) -> str:
    """Writes the profiles (tables profiles, failures). A source without ratings gets an empty table and a note.

    Errors: see `LLMClient.stream`; the journal keeps the answers received so far.
    """
    users, left_out = rated_users(IFVR(job.run), teachers, seed)
    with annotator(job.run, llm) as opened:
        answers = opened.ask([profile_request(u, teachers, kind) for u in users])
    rows = [_row(u, a, teachers) for u, a in zip(users, answers, strict=True) if a.ok]
    with job.writing() as out:
        out.write_table("profiles", pa.Table.from_pylist(rows, schema=SCHEMA))
        out.write_table("failures", failed := failures(answers))
        notes = [] if users else ["no user without tags has rated anything in the history: no profiles are written"]
        out.info = {"asked": len(users), "left_out": left_out, "failures": by_cause(failed), "notes": notes}
        out.summary = f"{len(rows):,} profiles, {in_words(failed)}"
    return out.summary


def requests(run: Run, teachers: TeacherSettings, seed: int, kind: str) -> list[LLMRequest]:
    """All requests of the job, for an estimate."""
    users, _ = rated_users(IFVR(run), teachers, seed)
    return [profile_request(u, teachers, kind) for u in users]


def profile_request(rated: Rated, settings: TeacherSettings, kind: str) -> LLMRequest:
    """Asks for one user's profile; `kind` is the kind of the source."""
    prompt = fill(
        "teachers/profile",
        things=_ITEM_NOUNS.get(kind, "videos"),
        profile=Person(rated.user).profile(settings.max_text),
        liked=rated.liked,
        disliked=rated.disliked,
        words=words(settings.profile_chars),
    )
    return request_about(rated.user.user_id, "profile", prompt, profile_form(settings.profile_chars))


def rated_users(ifvr: IFVR, settings: TeacherSettings, seed: int) -> tuple[list[Rated], dict[str, int]]:
    """The users who get a profile, with the items drawn for them; and the number of others by reason."""
    log = ifvr.log(["interaction_id", "user_id", "video_id", "timestamp", "rating", "liked", "disliked", "role"])
    log = log.filter(log["rating"].is_valid())
    pool = _pool(log)
    order = _order(ifvr)
    untagged = [u for u in order if not ifvr.users[u].tags]
    eligible = [u for u in untagged if u in pool]
    chosen = eligible[: settings.profile_users or None]
    position = {u: i for i, u in enumerate(sorted(pool))}
    drawn = (_draw(ifvr.users[u], pool[u], ifvr.videos, settings, [seed, 31, position[u]]) for u in chosen)
    counts = {
        "has_tags": len(order) - len(untagged),
        "no_rated_items": len(untagged) - len(eligible),
        "over_limit": len(eligible) - len(chosen),
    }
    return list(drawn), counts


def _pool(log: pa.Table) -> dict[str, list[JsonObject]]:
    """Liked and disliked history records by user, without items that are also targets of the user."""
    is_target = pc.equal(log["role"], str(Role.TARGET))
    targets = {
        (row["user_id"], row["video_id"]) for row in log.filter(is_target).select(["user_id", "video_id"]).to_pylist()
    }
    opinionated = pc.or_(pc.fill_null(log["liked"], False), pc.fill_null(log["disliked"], False))
    pool: dict[str, list[JsonObject]] = collections.defaultdict(list)
    for row in log.filter(pc.and_(pc.invert(is_target), opinionated)).to_pylist():
        if (row["user_id"], row["video_id"]) not in targets:
            pool[row["user_id"]].append(row)
    return dict(pool)


def _order(ifvr: IFVR) -> list[str]:
    """Test users, then the UGM's, then the others; each user once, by id."""
    rank: dict[str, int] = {}
    for row in ifvr.user_splits.to_pylist():
        priority = 0 if row["split"] == Split.TEST else 1 if row["ugm"] else 2
        rank[row["user_id"]] = min(priority, rank.get(row["user_id"], 2))
    return sorted(rank, key=lambda u: (rank[u], u))


def _draw(
    user: User, pool: list[JsonObject], videos: Mapping[str, Video], settings: TeacherSettings, seed: list[int]
) -> Rated:
    picks = np.random.default_rng(seed).permutation(len(pool))[: settings.profile_items]
    rows = [pool[i] for i in np.sort(picks)]

    def lines(opinion: str) -> tuple[str, ...]:
        return tuple(video_line(videos[r["video_id"]], tags=True, limit=settings.max_text) for r in rows if r[opinion])

    times = [r["timestamp"] for r in rows if r["timestamp"] is not None]
    evidence = tuple(r["interaction_id"] for r in rows)
    return Rated(user, lines("liked"), lines("disliked"), evidence, max(times, default=None))


def _row(rated: Rated, answer: Answer, settings: TeacherSettings) -> JsonObject:
    return {
        "user_id": rated.user.user_id,
        "text": plain(answer.value["profile"], settings.profile_chars),
        "tags": answer.value["tags"],
        "evidence": list(rated.evidence),
        "n": len(rated.evidence),
        "until": rated.until,
    }
