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
from gubs.prompts.digest import CLICKS, LIKES
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
"""Share of the lessons in a run's own words that show a group's profile."""
_GROUP_LIKES = 4
_VIEWS_SHOWN = 2
_TOPICS = 120
"""Most tags that interests are drawn from."""


@dataclass(frozen=True)
class LessonPool:
    """People with an invented history, and videos; of the simulated app, with their flaws and clips."""

    people: list[Person]
    videos: list[Video]
    topics: tuple[str, ...]
    """Names that interests are drawn from."""
    flaws: list[str] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    by_task: Mapping[Task, list[Person]] = field(default_factory=dict)
    """A run's own people, with views of one task; empty: those of the simulated app, for both tasks."""


def corpus(words: Vocabulary | None = None) -> Iterator[str]:
    """The texts that the tokenizer is trained on: about the simulated app, or in a run's own words; always the same."""
    return _simulated_corpus() if words is None else _own_corpus(words)


def _own_corpus(words: Vocabulary) -> Iterator[str]:
    """Lessons in a run's own words, and the words alone."""
    rng = np.random.default_rng(_SEED)
    pool = own_words(words, rng)
    for _ in range(_PEOPLE):
        prompt, answer = own_lesson(pool, rng)
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
    for i, person in enumerate(pool.people):
        video = pool.videos[int(rng.integers(len(pool.videos)))]
        for task in Task:
            yield user_prompt(task, person, video, style=_STYLES[i % 2])
            think = script.facts(person, video).sentences()
            yield as_answer(think, TASK_OPTIONS[task][i % len(TASK_OPTIONS[task])])
        if i % 8 == 0:
            yield group_prompt(Task.SEQUENTIAL, "Viewers", f"likes {person.user.tags}", video, style=_STYLES[i % 2])
    yield from script.texts()
    yield " ".join(word for topic in TOPICS for word in (topic.name, *topic.nouns))
    yield " ".join(f"{n} s {n % 101}%" for n in range(600))
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
    draw = lesson if words is None else own_lesson
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()
    losses = []
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = _learning_rate(step, steps)
        lessons = [draw(pool, rng) for _ in range(BATCH)]
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
    """One prompt, and an answer about what it shows. Some show a history, some only a cover, some no picture.

    Interests are drawn anew each time: a list that comes back would be learned by heart instead of being read.
    """
    someone = pool.people[int(rng.integers(len(pool.people)))]
    number = int(rng.integers(len(pool.videos)))
    video, flaw, clip = pool.videos[number], pool.flaws[number], pool.clips[number]
    topics = [pool.topics[t] for t in rng.permutation(len(pool.topics))[: int(rng.integers(1, 5))]]
    if rng.random() < 0.5 and video.tags[0] not in topics:
        topics[int(rng.integers(len(topics)))] = video.tags[0]
    shortest, longest = (3, int(script.LONG_S)) if rng.random() < 0.5 else (int(script.LONG_S), _LONGEST_S)
    video = replace(video, duration_s=float(rng.integers(shortest, longest)))
    history = someone.history if rng.random() < 0.25 else ()
    person = Person(replace(someone.user, tags=topics), history)
    task = Task.CLICK if rng.random() < 0.25 else Task.SEQUENTIAL
    with_picture = rng.random() > 0.1
    if task == Task.CLICK:
        clip = Clip(f"{clip.key}-cover", clip.frames[:1])
    text = user_prompt(task, person, video, vision=VISION_MARK if with_picture else "", style="brief")
    remark = script.REMARKS.get(flaw, "") if with_picture or flaw != "unpleasant" else ""
    facts = script.facts(person, video)
    option = _guess(task, facts, remark, rng)
    think = script.concluded(facts, remark, task, option)
    return Prompt(text, clip if with_picture else None), as_answer(think, option)


def own_lesson(pool: LessonPool, rng: np.random.Generator) -> tuple[Prompt, str]:
    """One prompt in a run's own words without a picture, and an answer about what it shows.

    One in eight shows a group's profile; the others show a user with a digest of an invented history. Interests are
    drawn anew each time, half of the time with a tag of the video.
    """
    task = list(pool.by_task)[int(rng.random() * len(pool.by_task))]
    someone = pool.by_task[task][int(rng.integers(len(pool.by_task[task])))]
    video = pool.videos[int(rng.integers(len(pool.videos)))]
    topics = _interests(pool, video, rng)
    person = Person(replace(someone.user, tags=topics), someone.history[-_VIEWS_SHOWN:], whole_tally=someone.tally)
    if rng.random() < _GROUPS:
        listed, skipped = topics[:_GROUP_LIKES], _interests(pool, None, rng)[:2]
        profile = f"Likes: {', '.join(listed)}.\nSkips: {', '.join(f'{t} {int(rng.integers(100))}%' for t in skipped)}."
        group = Person(User("", tags=listed))
        text = group_prompt(task, f"Fans of {listed[0]}", profile, video, tags=True, style="brief")
        facts = script.facts(group, video)
        facts = replace(facts, seconds=None, repeated=False)
    else:
        text = user_prompt(task, person, video, tags=True, style="brief", digest=person.tally.digest(video))
        facts = replace(script.facts(person, video, digest=True), repeated=False)
    return Prompt(text), as_answer(facts.sentences(), _guess(task, facts, "", rng))


def _interests(pool: LessonPool, video: Video | None, rng: np.random.Generator) -> list[str]:
    """One to six topics, half of the time with a tag of the video."""
    count = min(int(rng.integers(1, DERIVED_TAGS + 1)), len(pool.topics))
    topics = [pool.topics[t] for t in rng.choice(len(pool.topics), count, replace=False)]
    shared = [tag for tag in video.tags if tag in pool.topics and tag not in topics] if video else []
    if shared and rng.random() < 0.5:
        topics[int(rng.integers(len(topics)))] = shared[int(rng.integers(len(shared)))]
    return topics


def own_words(words: Vocabulary, rng: np.random.Generator) -> LessonPool:
    """A run's users with histories invented for each task: random videos, and outcomes by a rate drawn per user and per
    half of the tags, so that every word of a digest comes up.
    """
    by_task = {
        task: [Person(user, _invented(words, measure, rng)) for user in words.users] for task, measure in words.measures
    }
    return LessonPool([], list(words.videos), words.interests[:_TOPICS], by_task=by_task)


def _invented(words: Vocabulary, measure: str, rng: np.random.Generator) -> tuple[View, ...]:
    rate, contrast = rng.random(), rng.random()
    views = []
    for number in rng.integers(len(words.videos), size=int(rng.integers(1, 30))):
        video = words.videos[number]
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
    users = make_users(settings, make_archetypes(settings, rng), rng)
    drawn = make_videos(settings, rng)
    videos = [
        Video(f"v{i}", title, float(drawn.duration_s[i]), tags=[TOPICS[drawn.title_topic[i]].name])
        for i, title in enumerate(drawn.titles)
    ]
    people = []
    for i, listed in enumerate(users.listed):
        user = User(f"u{i}", int(users.age[i]), "female", "teacher", {}, [TOPICS[t].name for t in listed if t >= 0])
        views = [View(videos[int(rng.integers(count))], play_rate=float(rng.random())) for _ in range(3)]
        people.append(Person(user, tuple(views)))
    flaws = [FLAWS[f] for f in drawn.flaw]
    rendered = [_clip(i, int(drawn.topic[i]), flaws[i]) for i in range(count)] if clips else []
    return LessonPool(people, videos, tuple(t.name for t in TOPICS), flaws, rendered)


def _clip(number: int, topic: int, flaw: str) -> Clip:
    scene = Scene(f"v{number}", topic, flaw, float(_FRAMES), _SEED + number)
    pictures = [np.asarray(image) for image in frames(scene, RenderSettings(size=_SIZE, fps=1))]
    return Clip(f"lesson-{number}", np.stack(pictures), float(_FRAMES))
