"""How the `tiny` model is taught to read before it sees any log: texts for its tokenizer, lessons for its weights.

A lesson shows the fields and pictures of a prompt about a simulated app that no run uses, and asks only what is there:
the topic, the user's interests, whether they fit, whether the video is long, what is wrong with title or picture; it
ends with an option drawn from those that common sense leaves open. No lesson says what any user did. They stand in for
what a model of 7 B parameters brings along: it reads, it keeps to a form, and it has an idea, though no knowledge, of
why videos are skipped.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gubs.prompts.answers import as_answer
from gubs.prompts.people import Person, View
from gubs.prompts.question import Style, group_prompt, user_prompt
from gubs.records import TASK_OPTIONS, Option, Task, User, Video
from gubs.simulator.population import FLAWS, TOPICS, USER_TEXTS, make_archetypes, make_users, make_videos
from gubs.simulator.render import Scene, frames
from gubs.simulator.settings import RenderSettings, SyntheticSettings
from gubs.teachers import script
from gubs.ufm.inputs import VISION_MARK, Clip, Encoded, Inputs, Prompt

_SEED = 20_250_519
_PEOPLE = 400
_CLIPS = 800
_FRAMES = 4
_MICRO_TOKENS = 2048
_SIZE = 56
_STYLES: tuple[Style, ...] = ("full", "brief")
BATCH = 8
"""Few, and many steps: to look something up and to copy it are learned suddenly, after steps rather than examples."""
LEARNING_RATE = 1.2e-3
_LONGEST_S = 150
_FLAW_RATE = 0.4
"""More than in the apps: what is to be learned must be seen."""


@dataclass(frozen=True)
class LessonPool:
    """People with a short made-up history, and videos with their flaws and clips."""

    people: list[Person]
    videos: list[Video]
    flaws: list[str]
    clips: list[Clip]


def corpus() -> Iterator[str]:
    """Prompts of both styles and tasks with answers, all topics' words, numbers; always the same."""
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
    yield from (f'["{word}", "yes", "no", "user"] user assistant' for word in words * _OFTEN)


def teach(
    model: Any, inputs: Inputs, steps: int, seed: int, on_progress: Callable[[int, int], None] | None = None
) -> float:
    """Teaches a model in place, wherever it is; returns the mean loss of the last lessons (nats a token).

    Args:
        model: a Qwen2.5-VL for conditional generation.
        inputs: of its checkpoint.
        steps: optimiser steps of `BATCH` lessons.
        seed: of the lessons.
        on_progress: called with (steps done, steps in all).
    """
    import torch

    rng = np.random.default_rng([seed, 51])
    pool = simulated(rng, _CLIPS, clips=True)
    adam = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    model.train()
    losses = []
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = _rate(step, steps)
        encoded = [(inputs.encode(p), inputs.answer_ids(a)) for p, a in (lesson(pool, rng) for _ in range(BATCH))]
        adam.zero_grad()
        losses.append(_accumulate(model, inputs, encoded))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        if on_progress:
            on_progress(step + 1, steps)
    return float(np.mean(losses[-50:]))


def _accumulate(model: Any, inputs: Inputs, encoded: Sequence[tuple[Encoded, list[int]]]) -> float:
    """Adds up the gradients of one step; sequences of about the same length go together."""
    from gubs.ufm.trainer import logprobs, micro_batches

    tokens, total = sum(len(a) for _, a in encoded), 0.0
    for part in micro_batches([len(e.ids) + len(a) for e, a in encoded], _MICRO_TOKENS):
        loss = -logprobs(model, inputs.collate([encoded[i] for i in part]), vision=True).sum() / tokens
        loss.backward()
        total += loss.item()
    return total


def _rate(step: int, steps: int) -> float:
    warm, left = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
    return LEARNING_RATE * warm * max(0.02, left)


def lesson(pool: LessonPool, rng: np.random.Generator) -> tuple[Prompt, str]:
    """One prompt and what is there to be read in it. Some show a history, some a cover only, some no picture.

    Interests are drawn anew each time: a list that comes back would be learned by heart instead of being read.
    """
    someone = pool.people[int(rng.integers(len(pool.people)))]
    number = int(rng.integers(len(pool.videos)))
    video, flaw, clip = pool.videos[number], pool.flaws[number], pool.clips[number]
    topics = [TOPICS[t].name for t in rng.permutation(len(TOPICS))[: int(rng.integers(1, 5))]]
    if rng.random() < _HALF and video.tags[0] not in topics:
        topics[int(rng.integers(len(topics)))] = video.tags[0]
    shortest, longest = (3, int(script.LONG_S)) if rng.random() < _HALF else (int(script.LONG_S), _LONGEST_S)
    video = replace(video, duration_s=float(rng.integers(shortest, longest)))
    history = someone.history if rng.random() < _QUARTER else ()
    person = Person(replace(someone.user, tags=topics), history)
    task = Task.CLICK if rng.random() < _QUARTER else Task.SEQUENTIAL
    shown = rng.random() > _TENTH
    if task == Task.CLICK:
        clip = Clip(f"{clip.key}-cover", clip.frames[:1])
    text = user_prompt(task, person, video, vision=VISION_MARK if shown else "", style="brief")
    remark = script.REMARKS.get(flaw, "") if shown or flaw != "unpleasant" else ""
    facts = script.facts(person, video)
    option = _guess(task, facts, remark, rng)
    think = script.concluded(facts.sentences(remark), task, option)
    return Prompt(text, clip if shown else None), as_answer(think, option)


def _guess(task: Task, facts: script.Facts, remark: str, rng: np.random.Generator) -> Option:
    """What the facts may speak for, by common sense: one of those that speak at even odds, else that nothing is wrong.

    Whether a remark, a length or a topic really drives somebody away is what the logs have to tell.
    """
    options = TASK_OPTIONS[task]
    if rng.random() < _TENTH:
        return options[int(rng.integers(len(options)))]
    if task == Task.CLICK:
        return Option.A if facts.fits and rng.random() < _HALF else options[int(rng.integers(len(options)))]
    supported = {Option.B: bool(remark), Option.C: facts.fits is False, Option.D: facts.long}
    open_ = [o for o, holds in supported.items() if holds] or [Option.A]
    return open_[int(rng.integers(len(open_)))]


def simulated(rng: np.random.Generator, count: int, clips: bool = False) -> LessonPool:
    """People and as many videos; with clips where they are wanted."""
    settings = SyntheticSettings(users=count, videos=count, flaw_rate=_FLAW_RATE)
    users = make_users(settings, make_archetypes(settings, rng), rng)
    drawn = make_videos(settings, rng)
    videos = [
        Video(f"v{i}", title, float(drawn.duration_s[i]), tags=[TOPICS[drawn.title_topic[i]].name])
        for i, title in enumerate(drawn.titles)
    ]
    people = [_person(i, users, videos, rng) for i in range(count)]
    flaws = [FLAWS[f] for f in drawn.flaw]
    made = [_clip(i, int(drawn.topic[i]), flaws[i]) for i in range(count)] if clips else []
    return LessonPool(people, videos, flaws, made)


def _person(i: int, users: Any, videos: Sequence[Video], rng: np.random.Generator) -> Person:
    tags = [TOPICS[t].name for t in users.listed[i] if t >= 0]
    user = User(f"u{i}", int(users.age[i]), "female", "teacher", {}, tags)
    return Person(user, tuple(_view(videos[int(rng.integers(len(videos)))], rng) for _ in range(3)))


def _view(video: Video, rng: np.random.Generator) -> View:
    return View(video, play_rate=float(rng.random()))


def _clip(number: int, topic: int, flaw: str) -> Clip:
    settings = RenderSettings(size=_SIZE, fps=1)
    scene = Scene(f"v{number}", topic, flaw, float(_FRAMES), _SEED + number)
    pictures: list[npt.NDArray[np.uint8]] = [np.asarray(f.convert("RGB")) for f in frames(scene, settings)]
    return Clip(f"lesson-{number}", np.stack(pictures[:_FRAMES]), float(_FRAMES))


_OFTEN = 4
"""Times a word is shown to the tokenizer: then it becomes one token."""
_HALF, _QUARTER, _TENTH = 0.5, 0.25, 0.1
