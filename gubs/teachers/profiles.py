"""User profiles from rated items (A.7): for sources whose users have no interest tags, MovieLens and Amazon Books.

Only history records are read, and items that are also among the user's targets are left out, so a profile knows
nothing of what will be predicted.
"""

import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gubs.artifacts import Run, StageJob
from gubs.data.ifvr import IFVR
from gubs.llm.calls import Answer, LLMRequest, question
from gubs.llm.settings import LLMSettings
from gubs.prompts import fill
from gubs.prompts.fields import plain
from gubs.prompts.people import Person
from gubs.prompts.question import video_line
from gubs.records import Role, Split, User, Video
from gubs.teachers.annotator import ROLE, annotator, by_cause, failures
from gubs.teachers.forms import PARSER, profile_form, words
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
"""Profile, interest tags (strongest first), ids of the interactions they rest on, how many those are, and the time of
the latest of them (milliseconds since 1970)."""

_THINGS = {"movielens": "films", "amazon": "books"}


@dataclass(frozen=True)
class Rated:
    """A user and the items that tell about the user's taste."""

    user: User
    liked: tuple[str, ...]
    """Items with 4 stars or more, a safe line each."""
    disliked: tuple[str, ...]
    """Items with 2 stars or fewer."""
    evidence: tuple[str, ...]
    until: int | None
    """Time of the latest of the items; None where the source has no times."""


def make(job: StageJob, teachers: TeacherSettings, llm: LLMSettings, seed: int, kind: str) -> str:
    """Writes the profiles (tables profiles, failures). A source without ratings gets an empty table, with a note.

    Errors: see `LLMClient.stream`; what was finished is kept in the journal.
    """
    users, left_out = rated_users(IFVR(job.run), teachers, seed)
    with annotator(job.run, llm) as asked:
        answers = asked.ask([profile_request(u, teachers, kind) for u in users])
    rows = [_row(u, a, teachers) for u, a in zip(users, answers, strict=True) if a.ok]
    with job.writing() as out:
        out.write_table("profiles", pa.Table.from_pylist(rows, schema=SCHEMA))
        out.write_table("failures", failed := failures(answers))
        notes = [] if users else ["no user without tags has rated anything in the history: there are no profiles"]
        out.info = {"asked": len(users), "left_out": left_out, "failures": by_cause(failed), "notes": notes}
        out.summary = f"{len(rows):,} profiles, {failed.num_rows:,} failures"
    return out.summary


def requests(run: Run, teachers: TeacherSettings, seed: int, kind: str) -> list[LLMRequest]:
    """All requests of the job, for an estimate."""
    users, _ = rated_users(IFVR(run), teachers, seed)
    return [profile_request(u, teachers, kind) for u in users]


def profile_request(rated: Rated, settings: TeacherSettings, kind: str) -> LLMRequest:
    """Asks for one user's profile; `kind` is the source's."""
    u = rated.user
    prompt = fill(
        "teachers/profile",
        things=_THINGS.get(kind, "videos"),
        profile=Person(u).profile(settings.max_text),
        liked=rated.liked,
        disliked=rated.disliked,
        words=words(settings.profile_chars),
    )
    form = profile_form(settings.profile_chars)
    return question(ROLE, f"profile/{u.user_id}", prompt, schema=form, parser=PARSER, metadata={"item": u.user_id})


def rated_users(ifvr: IFVR, settings: TeacherSettings, seed: int) -> tuple[list[Rated], dict[str, int]]:
    """The users who get a profile, with their drawn items; and why others get none, counted."""
    log = ifvr.log(["interaction_id", "user_id", "video_id", "timestamp", "rating", "liked", "disliked", "role"])
    log = log.filter(log["rating"].is_valid())
    pool = _pool(log)
    order = _order(ifvr)
    untagged = [u for u in order if not ifvr.users[u].tags]
    wanted = [u for u in untagged if u in pool]
    chosen = wanted[: settings.profile_users or None]
    place = {u: i for i, u in enumerate(sorted(pool))}
    drawn = (_draw(ifvr.users[u], pool[u], ifvr.videos, settings, [seed, 31, place[u]]) for u in chosen)
    counts = {
        "has_tags": len(order) - len(untagged),
        "no_rated_items": len(untagged) - len(wanted),
        "over_limit": len(wanted) - len(chosen),
    }
    return list(drawn), counts


def _pool(log: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """Liked and disliked history records by user, without items that the user's targets show again."""
    target = pc.equal(log["role"], str(Role.TARGET))
    ahead = set(_pairs(log.filter(target)))
    felt = pc.or_(pc.fill_null(log["liked"], False), pc.fill_null(log["disliked"], False))
    pool: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for row in log.filter(pc.and_(pc.invert(target), felt)).to_pylist():
        if (row["user_id"], row["video_id"]) not in ahead:
            pool[row["user_id"]].append(row)
    return dict(pool)


def _pairs(log: pa.Table) -> Iterator[tuple[str, str]]:
    return zip(log["user_id"].to_pylist(), log["video_id"].to_pylist(), strict=True)


def _order(ifvr: IFVR) -> list[str]:
    """Test users, then the UGM's, then the others; each user once, by id."""
    rank: dict[str, int] = {}
    for row in ifvr.user_splits.to_pylist():
        mine = 0 if row["split"] == Split.TEST else 1 if row["ugm"] else 2
        rank[row["user_id"]] = min(mine, rank.get(row["user_id"], 2))
    return sorted(rank, key=lambda u: (rank[u], u))


def _draw(
    user: User, pool: list[dict[str, Any]], videos: Mapping[str, Video], settings: TeacherSettings, seed: list[int]
) -> Rated:
    picks = np.random.default_rng(seed).permutation(len(pool))[: settings.profile_items]
    rows = [pool[i] for i in np.sort(picks)]

    def lines(side: str) -> tuple[str, ...]:
        return tuple(video_line(videos[r["video_id"]], tags=True, limit=settings.max_text) for r in rows if r[side])

    times = [r["timestamp"] for r in rows if r["timestamp"] is not None]
    evidence = tuple(r["interaction_id"] for r in rows)
    return Rated(user, lines("liked"), lines("disliked"), evidence, max(times, default=None))


def _row(rated: Rated, answer: Answer, settings: TeacherSettings) -> dict[str, Any]:
    return {
        "user_id": rated.user.user_id,
        "text": plain(answer.value["profile"], settings.profile_chars),
        "tags": answer.value["tags"],
        "evidence": list(rated.evidence),
        "n": len(rated.evidence),
        "until": rated.until,
    }
