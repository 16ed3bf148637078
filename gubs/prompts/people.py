"""How people are shown to models: profile fields and views as safe lines of text.

A `Person` is built only from records with the role `history` (`gubs.data.ifvr`), so prediction targets cannot get into
a prompt. `before(time)` and `latest(n)` cut a history; apply the time limit first.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from gubs.prompts.digest import Tally
from gubs.prompts.fields import record
from gubs.records import User, Video

DERIVED_TAGS = 6
"""Interest tags derived from the history of a user without tags."""
_LIKED_PLAY_RATE = 0.6
_TASTE_CHARS = 800
"""A taste is several sentences, about as long as `teachers.profile_chars`."""


@dataclass(frozen=True, slots=True)
class View:
    """One view or exposure in a history: what was shown, and what the user did."""

    video: Video
    interaction_id: str = ""
    timestamp: int | None = None
    """Milliseconds since 1970; None if the source has an order but no times."""
    play_rate: float | None = None
    clicked: bool | None = None
    rating: float | None = None
    liked: bool | None = None

    def line(self, limit: int = 200) -> str:
        """One safe line of JSON; `limit` is in characters per field."""
        video = self.video
        fields: dict[str, object] = {"title": video.title} if video.title else {"tags": video.tags}
        if video.duration_s is not None:
            fields["length"] = f"{video.duration_s:.0f} s"
        if self.rating is not None:
            fields["rating"] = f"{self.rating:g} of 5"
        elif self.play_rate is not None:
            fields["played"] = f"{self.play_rate:.0%}"
        elif self.clicked is not None:
            fields["clicked"] = "yes" if self.clicked else "no"
        return record(fields, limit)

    @property
    def enjoyed(self) -> bool:
        """Liked, else watched for long, else clicked."""
        if self.liked is not None:
            return self.liked
        return self.play_rate >= _LIKED_PLAY_RATE if self.play_rate is not None else bool(self.clicked)


@dataclass(frozen=True, slots=True)
class Taste:
    """What a language model wrote about a user without tags, from ratings in the history (A.7)."""

    text: str
    tags: tuple[str, ...]
    until: int | None = None
    """Time of the latest rating it uses; None if the source has no times."""


@dataclass(frozen=True)
class Person:
    """A user with a history."""

    user: User
    history: tuple[View, ...] = ()
    """Oldest first."""
    taste: Taste | None = None
    seen_tags: tuple[str, ...] | None = None
    """Interests seen in the whole history before it was cut; None: it was not."""
    whole_tally: Tally | None = None
    """Counts over the whole history before it was cut; None: it was not."""

    def before(self, time: int | None) -> "Person":
        """The person as known at a time: without later views, and without a taste that uses later ratings. Without
        times, nothing is later.

        Raises:
            ValueError: the history has been cut already; the rest of it may all be later.
        """
        if time is None:
            return self
        if self.seen_tags is not None:
            raise ValueError("a history must be limited in time before it is cut: call before(), then latest()")
        history = tuple(v for v in self.history if v.timestamp is None or v.timestamp < time)
        late = self.taste is not None and self.taste.until is not None and self.taste.until >= time
        return dataclasses.replace(self, history=history, taste=None if late else self.taste)

    def latest(self, items: int) -> "Person":
        """The person with only the latest views (0 = all); interests and counts stay those of the whole history."""
        if not items or len(self.history) <= items:
            return self
        return dataclasses.replace(
            self, history=self.history[-items:], seen_tags=self._tags_from_history(), whole_tally=self.tally
        )

    def backwards(self) -> "Person":
        """The person with the latest view first; interests and counts stay."""
        return dataclasses.replace(
            self, history=self.history[::-1], seen_tags=self._tags_from_history(), whole_tally=self.tally
        )

    @property
    def tags(self) -> list[str]:
        """Interest tags: the user's; else those of the taste; else those seen in the history."""
        if self.user.tags:
            return self.user.tags
        return list(self.taste.tags if self.taste else self._tags_from_history())

    @property
    def with_tags(self) -> User:
        """The user with the person's interest tags."""
        return dataclasses.replace(self.user, tags=self.tags)

    @cached_property
    def tally(self) -> Tally:
        """Counts over the whole history."""
        return Tally.of(self.history) if self.whole_tally is None else self.whole_tally

    def views(self, limit: int = 200) -> list[str]:
        """The history as safe lines, oldest first; `limit` is in characters per field."""
        return [view.line(limit) for view in self.history]

    def profile(self, limit: int = 200) -> str:
        """Known profile fields as one safe line of JSON: u = [ID, Occ, Age, Gender, T]."""
        u = self.user
        fields: dict[str, object] = {"age": u.age, "gender": u.gender, "occupation": u.occupation, **u.other}
        if u.tags:
            fields |= {"interest tags": u.tags}
        elif self.taste:
            fields |= {"interests by ratings": self.tags, "taste": self.taste.text}
        else:
            fields |= {"interests seen in the history": self.tags}
        return record(fields, limit, {"taste": _TASTE_CHARS})

    def _tags_from_history(self) -> tuple[str, ...]:
        if self.seen_tags is not None:
            return self.seen_tags
        counts = Counter(tag for view in self.history if view.enjoyed for tag in view.video.tags)
        return tuple(tag for tag, _ in counts.most_common(DERIVED_TAGS))
