"""Texts the project makes itself, for the tokenizer of the `tiny` model: prompts about a simulated app no run uses."""

from collections.abc import Iterator

import numpy as np

from gubs.config import SyntheticSettings
from gubs.data.sources.world import TOPICS, make_archetypes, make_users, make_videos
from gubs.people import Person, view_line
from gubs.prompts.answers import as_answer
from gubs.prompts.ufm import Style, group_prompt, user_prompt
from gubs.records import TASK_OPTIONS, Task, User, Video
from gubs.teachers import script

_SEED = 20_250_519
_PEOPLE = 400
_STYLES: tuple[Style, ...] = ("full", "brief")


def corpus() -> Iterator[str]:
    """Prompts of both styles and tasks with answers, all topics' words, numbers; always the same."""
    rng = np.random.default_rng(_SEED)
    people, videos = simulated(rng)
    for i, person in enumerate(people):
        video = videos[int(rng.integers(len(videos)))]
        for task in Task:
            yield user_prompt(task, person, video, style=_STYLES[i % 2])
            think = script.facts(person, video).said()
            yield as_answer(think, TASK_OPTIONS[task][i % len(TASK_OPTIONS[task])])
        if i % 8 == 0:
            yield group_prompt(Task.SEQUENTIAL, "Viewers", f"likes {person.user.tags}", video, style=_STYLES[i % 2])
    yield from script.texts()
    yield " ".join(word for topic in TOPICS for word in (topic.name, *topic.nouns))
    yield " ".join(f"{n} s {n % 101}%" for n in range(600))


def simulated(rng: np.random.Generator) -> tuple[list[Person], list[Video]]:
    """People with a short made-up history, and videos."""
    world = SyntheticSettings(users=_PEOPLE, videos=_PEOPLE)
    users = make_users(world, make_archetypes(world, rng), rng)
    drawn = make_videos(world, rng)
    videos = [
        Video(f"v{i}", title, float(drawn.duration_s[i]), tags=[TOPICS[drawn.title_topic[i]].name])
        for i, title in enumerate(drawn.titles)
    ]
    people = [
        Person(
            User(f"u{i}", int(users.age[i]), "female", "teacher", {}, [TOPICS[t].name for t in tags if t >= 0]),
            tuple(_view(videos[int(rng.integers(len(videos)))], rng) for _ in range(3)),
        )
        for i, tags in enumerate(users.listed)
    ]
    return people, videos


def _view(video: Video, rng: np.random.Generator) -> str:
    seen = {"title": video.title, "tags": video.tags, "duration_s": video.duration_s, "rating": None}
    return view_line({**seen, "play_rate": float(rng.random()), "clicked": None})
