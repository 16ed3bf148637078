"""How the `tiny` model is taught to read before it is trained on any log: texts for its tokenizer, lessons for its
weights.

A lesson shows the fields and pictures of a prompt about a simulated app that no run uses, or the fields of a run's own
users and videos with an invented history (`Vocabulary`). It asks only what can be seen there: the topic, the interests
of the user or the group, whether they fit, whether the video is long, how the earlier views went, what is wrong with
title or picture. It ends with an option drawn from those that common sense leaves open. No lesson says what any user
did. They replace what a model of 7 B parameters brings along: it reads, it keeps to a form, and it has an idea, though
no knowledge, of why videos are skipped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from gubs.console import OnProgress
from gubs.prompts.answers import as_answer
from gubs.prompts.digest import CLICKS, LIKES, SKIPS
from gubs.prompts.digest import words as digest_words
from gubs.prompts.people import DERIVED_TAGS, Person, View
from gubs.prompts.question import Style, group_prompt, user_prompt
from gubs.records import FAST_SKIP_BELOW, TASK_OPTIONS, Option, Task, User, Video
from gubs.simulator.population import FLAWS, TOPICS, USER_TEXTS, make_archetypes, make_users, make_videos
from gubs.simulator.render import Scene, frames
from gubs.simulator.settings import RenderSettings, SyntheticSettings
from gubs.teachers import script
from gubs.ufm.inputs import VISION_MARK, Answered, Inputs, Prompt
from gubs.ufm.vocabulary import Vocabulary
from gubs.video.clips import Clip

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

_SEED = 20_250_519
_PEOPLE = 400
_CLIPS = 800
_FRAMES = 4
_MICRO_TOKENS = 2048
_SIZE = 56
_STYLES: tuple[Style, ...] = ("full", "brief")
BATCH = 8
"""Small, with many steps: looking up and copying are learned suddenly, after enough steps rather than examples."""
LEARNING_RATE = 1.2e-3
_LONGEST_S = 150
_FLAW_RATE = 0.4
"""More than in the apps: what is to be learned must be seen."""
_REPEATS = 4
"""Times the tokenizer sees a word, so that it becomes one token."""
_GROUPS = 1 / 8
"""Share of the lessons that show a group's profile."""
_WITH_VIEWS = 0.25
"""Share of the lessons with pictures that show the latest views too: they are long."""
_WITHOUT_PICTURE = 0.1
_GROUP_LIKES = 4
_VIEWS_SHOWN = 2
_TOPICS = 120
"""Most tags that interests are drawn from."""


@dataclass(frozen=True)
class LessonPool:
    """People with invented histories, and videos; those of the simulated app have flaws and clips."""

    people: Mapping[Task, list[Person]]
    """By the task that their views are of."""
    videos: list[Video]
    topics: tuple[str, ...]
    """Names that interests are drawn from."""
    flaws: list[str] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    most_interests: int = DERIVED_TAGS


def corpus(words: Vocabulary | None = None) -> Iterator[str]:
    """The texts that the tokenizer is trained on: about the simulated app, or in a run's own words; always the same."""
    return _simulated_corpus() if words is None else _own_corpus(words)


def _own_corpus(words: Vocabulary) -> Iterator[str]:
    """Lessons in a run's own words, and the words alone."""
    rng = np.random.default_rng(_SEED)
    pool = own_words(words, rng)
    for _ in range(_PEOPLE):
        prompt, answer = lesson(pool, rng)
        yield prompt.text
        yield answer
    for _ in range(_REPEATS):
        yield from words.texts()
    yield " ".join(f"{n} s {n % 101}%" for n in range(600))
    yield from ("user assistant" for _ in range(_REPEATS))


def _simulated_corpus() -> Iterator[str]:
    """Prompts of both styles and tasks with answers, the words of all topics, and numbers; always the same."""
    rng = np.random.default_rng(_SEED)
    pool = simulated(rng, _PEOPLE)
    for task, people in pool.people.items():
        for i, person in enumerate(people):
            video = pool.videos[int(rng.integers(len(pool.videos)))]
            digest = person.tally.digest(video)
            yield user_prompt(task, person.latest(_VIEWS_SHOWN), video, style=_STYLES[i % 2], digest=digest)
            think = script.facts(person, video, digest=i % 4 > 0).sentences()
            yield as_answer(think, TASK_OPTIONS[task][i % len(TASK_OPTIONS[task])])
            if i % 8 == 0:
                yield group_prompt(task, "Viewers", f"likes {person.user.tags}", video, style=_STYLES[i % 2])
    yield from script.texts()
    yield " ".join(word for topic in TOPICS for word in (topic.name, *topic.nouns))
    yield " ".join(f"{n} s {n % 101}%" for n in range(600))
    yield from (f" {word}" for word in digest_words() * _REPEATS)
    words = [w for texts in USER_TEXTS.values() for w in texts]
    yield from (f'["{word}", "yes", "no", "user"] user assistant' for word in words * _REPEATS)


def teach(
    model: "Qwen2_5_VLForConditionalGeneration",
    inputs: Inputs,
    steps: int,
    seed: int,
    on_progress: OnProgress | None = None,
    words: Vocabulary | None = None,
) -> float:
    """Trains a model in place on its device; returns the mean loss of the last lessons (nats per token).

    Args:
        model: the model.
        inputs: of its checkpoint.
        steps: optimiser steps of `BATCH` lessons.
        seed: of the lessons.
        on_progress: called with (finished steps, all steps).
        words: a run's own words; None = the simulated app's.
    """
    import torch

    rng = np.random.default_rng([seed, 51])
    pool = simulated(rng, _CLIPS, clips=True) if words is None else own_words(words, rng)
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()
    losses = []
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = _learning_rate(step, steps)
        lessons = [lesson(pool, rng) for _ in range(BATCH)]
        adam.zero_grad()
        losses.append(_backward(model, inputs, [(inputs.encode(p), inputs.answer_ids(a)) for p, a in lessons]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if on_progress:
            on_progress(step + 1, steps)
    return float(np.mean(losses[-50:]))


def _backward(model: "Qwen2_5_VLForConditionalGeneration", inputs: Inputs, encoded: Sequence[Answered]) -> float:
    """Adds up the gradients of one step, in micro-batches of sequences of similar length; returns the loss."""
    from gubs.ufm.trainer import logprobs, micro_batches

    tokens, total = sum(len(a) for _, a in encoded), 0.0
    for part in micro_batches([len(e.ids) + len(a) for e, a in encoded], _MICRO_TOKENS):
        loss = -logprobs(model, inputs.collate([encoded[i] for i in part]), vision=True).sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def _learning_rate(step: int, steps: int) -> float:
    """Rises for 50 steps and falls along a cosine."""
    return LEARNING_RATE * min(1.0, (step + 1) / 50) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def lesson(pool: LessonPool, rng: np.random.Generator) -> tuple[Prompt, str]:
    """One prompt, and an answer about what it shows.

    One in eight shows a group's profile; the others show a user with a digest of an invented history. On the simulated
    app most also show pictures, in the click task only a cover. Interests are drawn anew each time: a list that comes
    back would be learned by heart instead of being read.
    """
    task = list(pool.people)[int(rng.random() * len(pool.people))]
    someone = pool.people[task][int(rng.integers(len(pool.people[task])))]
    number = int(rng.integers(len(pool.videos)))
    video, clip, remark = _shown(pool, number, task, someone, rng)
    topics = _interests(pool, video, rng)
    vision, tags = VISION_MARK if clip else "", not pool.flaws
    if rng.random() < _GROUPS:
        profile, facts = _about_group(pool, topics, video, rng)
        name = f"Fans of {topics[0]}"
        text = group_prompt(task, name, profile, video, vision=vision, tags=tags, style="brief")
    else:
        shown = _VIEWS_SHOWN if rng.random() < _WITH_VIEWS or not pool.flaws else 0
        views = someone.history[-shown:] if shown else ()
        person = Person(replace(someone.user, tags=topics), views, whole_tally=someone.tally)
        digest = person.tally.digest(video)
        text = user_prompt(task, person, video, vision=vision, tags=tags, style="brief", digest=digest)
        facts = replace(script.facts(person, video, digest=True), repeated=False)
    return Prompt(text, clip), as_answer(facts.sentences(remark), _guess(task, facts, remark, rng))


def _shown(
    pool: LessonPool, number: int, task: Task, someone: Person, rng: np.random.Generator
) -> tuple[Video, Clip | None, str]:
    """A video, the pictures that a lesson shows of it, and the remark that they and the title allow.

    A video of the simulated app gets another length each time, half of the time one of the user's history.
    """
    video = pool.videos[number]
    if not pool.flaws:
        return video, None, ""
    seen = someone.history[int(rng.integers(len(someone.history)))].video.duration_s
    seconds = seen if rng.random() < 0.5 else float(rng.integers(3, _LONGEST_S))
    video = replace(video, duration_s=seconds)
    clip: Clip | None = pool.clips[number] if pool.clips and rng.random() > _WITHOUT_PICTURE else None
    if clip and task == Task.CLICK:
        clip = Clip(f"{clip.key}-cover", clip.frames[:1])
    flaw = pool.flaws[number]
    return video, clip, script.REMARKS.get(flaw, "") if clip or flaw != "unpleasant" else ""


def _about_group(
    pool: LessonPool, topics: list[str], video: Video, rng: np.random.Generator
) -> tuple[str, script.Facts]:
    """The profile of a group that likes some topics, and the facts in it."""
    listed, skipped = topics[:_GROUP_LIKES], _interests(pool, None, rng)[:2]
    profile = f"Likes: {', '.join(listed)}.\nSkips: {', '.join(f'{t} {int(rng.integers(100))}%' for t in skipped)}."
    return profile, replace(
        script.facts(Person(User("", tags=listed)), video), seconds=None, long=False, repeated=False
    )


def _interests(pool: LessonPool, video: Video | None, rng: np.random.Generator) -> list[str]:
    """Some topics, half of the time with a tag of the video."""
    count = min(int(rng.integers(1, pool.most_interests + 1)), len(pool.topics))
    topics = [pool.topics[t] for t in rng.choice(len(pool.topics), count, replace=False)]
    shared = [tag for tag in video.tags if tag in pool.topics and tag not in topics] if video else []
    if shared and rng.random() < 0.5:
        topics[int(rng.integers(len(topics)))] = shared[int(rng.integers(len(shared)))]
    return topics


def own_words(words: Vocabulary, rng: np.random.Generator) -> LessonPool:
    """A run's users, with histories invented for each task, and videos."""
    people = {
        task: [Person(user, _invented(words.videos, measure, rng)) for user in words.users]
        for task, measure in words.measures
    }
    return LessonPool(people, list(words.videos), words.interests[:_TOPICS])


def _invented(videos: Sequence[Video], measure: str, rng: np.random.Generator) -> tuple[View, ...]:
    """Random videos; outcomes by a rate drawn per user and per half of the tags, so every word of a digest comes up."""
    rate, contrast = rng.random(), rng.random()
    views = []
    for number in rng.integers(len(videos), size=int(rng.integers(1, 30))):
        video = videos[number]
        likely = rate + contrast * (0.5 if len(video.tags[0] if video.tags else "") % 2 else -0.5)
        hit = bool(rng.random() < likely)
        views.append(_view(video, measure, hit, float(rng.random())))
    return tuple(views)


def _view(video: Video, measure: str, hit: bool, by_chance: float) -> View:
    """A view that is a hit by a measure, or not."""
    if measure == LIKES:
        return View(video, rating=float(4 + round(by_chance)) if hit else float(1 + int(3 * by_chance)), liked=hit)
    if measure == CLICKS:
        return View(video, clicked=hit)
    low = FAST_SKIP_BELOW * by_chance * 0.99
    return View(video, play_rate=low if hit else FAST_SKIP_BELOW + (1 - FAST_SKIP_BELOW) * by_chance)


def _guess(task: Task, facts: script.Facts, remark: str, rng: np.random.Generator) -> Option:
    """An option that the facts support by common sense; A where none does, and now and then any.

    Whether a remark, a length or a topic really drives somebody away is for the logs to say.
    """
    options = TASK_OPTIONS[task]
    if rng.random() >= 0.1:
        if task == Task.SEQUENTIAL:
            supported = {Option.B: bool(remark), Option.C: facts.fits is False, Option.D: facts.long}
            options = tuple(o for o, holds in supported.items() if holds) or (Option.A,)
        elif facts.fits and rng.random() < 0.5:
            return Option.A
    return options[int(rng.integers(len(options)))]


def simulated(rng: np.random.Generator, count: int, clips: bool = False) -> LessonPool:
    """As many people as videos; the videos have clips only on request."""
    settings = SyntheticSettings(users=count, videos=count, flaw_rate=_FLAW_RATE)
    drawn = make_videos(settings, rng)
    videos = [
        Video(f"v{i}", title, float(drawn.duration_s[i]), tags=[TOPICS[drawn.title_topic[i]].name])
        for i, title in enumerate(drawn.titles)
    ]
    users = _simulated_users(settings, rng)
    people = {
        task: [Person(user, _invented(videos, measure, rng)) for user in users]
        for task, measure in ((Task.SEQUENTIAL, SKIPS), (Task.CLICK, CLICKS))
    }
    flaws = [FLAWS[f] for f in drawn.flaw]
    rendered = [_clip(i, int(drawn.topic[i]), flaws[i]) for i in range(count)] if clips else []
    return LessonPool(people, videos, tuple(t.name for t in TOPICS), flaws, rendered, most_interests=4)


def _simulated_users(settings: SyntheticSettings, rng: np.random.Generator) -> list[User]:
    drawn = make_users(settings, make_archetypes(settings, rng), rng)
    return [
        User(f"u{i}", int(drawn.age[i]), "female", "teacher", {}, [TOPICS[t].name for t in listed if t >= 0])
        for i, listed in enumerate(drawn.listed)
    ]


def _clip(number: int, topic: int, flaw: str) -> Clip:
    scene = Scene(f"v{number}", topic, flaw, float(_FRAMES), _SEED + number)
    pictures = [np.asarray(image) for image in frames(scene, RenderSettings(size=_SIZE, fps=1))]
    return Clip(f"lesson-{number}", np.stack(pictures), float(_FRAMES))
