"""What an engine replica does with a request: people and videos from the filter, pictures, prompts, decisions.

Knows neither Serve nor HTTP. The engine is anything with `FilterEngine.ask`.
"""

import asyncio
import base64
import functools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

from gubs.errors import ArtifactError, GubsError
from gubs.evaluate.held_out import DecisionRule
from gubs.prompts.people import Person, View
from gubs.records import Task, Video
from gubs.records import User as UserRecord
from gubs.serving import schemas
from gubs.serving.bundle import Bundle
from gubs.serving.engine import Answer
from gubs.serving.filter import Decision, Mode, decide
from gubs.serving.pictures import DECODERS, PictureError, Pictures, fitting
from gubs.serving.schemas import (
    Candidate,
    ExplainRequest,
    FilterRequest,
    ModelName,
    Perspective,
    Problem,
    Result,
    Usage,
    UserRef,
)
from gubs.serving.settings import ServingSettings
from gubs.ufm.inputs import Prompt
from gubs.ufm.prompting import PromptBuilder
from gubs.video.clips import Clip

_PICTURES_SHARE = 0.5
"""Of a request's time, how much its pictures may take; the rest is for the engine."""


class RequestError(GubsError):
    """A request that cannot be answered, with a code for the client."""

    exit_code = 3

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["RequestError"], tuple[str, str]]:
        return RequestError, (self.code, str(self))


class Asker(Protocol):
    """The part of an engine that the service uses."""

    async def ask(self, task: Task, mode: Mode, prompts: Sequence[Prompt], salt: str = "") -> list[Answer]:
        """See `FilterEngine.ask`."""


@dataclass(frozen=True, slots=True)
class Decided:
    """Decisions about some candidates."""

    results: list[Result]
    """In the candidates' order."""
    usage: Usage
    threshold: float
    model: ModelName
    """Who decided."""
    seconds: dict[str, float]
    """By phase: `pictures` (with people and prompts), `engine`."""


class FilterService:
    """Answers requests with one filter."""

    def __init__(self, bundle: Bundle, engine: Asker, settings: ServingSettings):
        self.bundle, self.engine, self.settings = bundle, engine, settings
        config = bundle.config
        self._prompts = PromptBuilder(config.inputs, config.pictures)
        self._pictures = Pictures(settings.fetch_roots, settings.limits, config.frames) if config.frames else None
        # threads of their own: neither a slow place that files come from nor frames that take long to decode may keep
        # stored frames waiting
        self._fetching = ThreadPoolExecutor(DECODERS, "fetch")
        self._decoding = ThreadPoolExecutor(DECODERS, "decode")

    async def decide(self, request: FilterRequest, mode: Mode, salt: str = "") -> Decided:
        """Decisions about the candidates.

        Args:
            request: the user and the candidates.
            mode: how the policy is asked.
            salt: see `FilterEngine.ask`.

        Raises:
            RequestError: the task, the mode or the user is unknown to this filter.
        """
        began = time.perf_counter()
        rule = self._rule(request.task, mode)
        threshold = rule.threshold.value if request.threshold is None else request.threshold
        person = self._person(request.user, request.task)
        group = await self._group_of(request.user, person)
        prompts = await self._questions(request, person)
        asked = time.perf_counter()
        answered = await self.engine.ask(request.task, mode, [p for p in prompts if isinstance(p, Prompt)], salt)
        seconds = {"pictures": asked - began, "engine": time.perf_counter() - asked}
        answers, results = iter(answered), []
        for index, (candidate, prompt) in enumerate(zip(request.candidates, prompts, strict=True)):
            if isinstance(prompt, PictureError):
                results.append(_kept(index, candidate.id, "pictures", str(prompt), retryable=prompt.retryable))
                continue
            answer = next(answers)
            result = _result(index, candidate.id, request.task, rule, threshold, answer, explain=request.explain)
            result.group_id = group
            results.append(result)
        return Decided(results, _used(answered), threshold, self.model, seconds)

    @property
    def model(self) -> ModelName:
        """The filter and its version."""
        return ModelName(name=self.bundle.config.name, version=self.bundle.version)

    async def _questions(self, request: FilterRequest, person: Person) -> list[Prompt | PictureError]:
        """What is asked about each candidate, or why it cannot be."""
        until = self._pictures_until(request.timeout_ms)
        clips = await asyncio.gather(*(self._clip(c, request.task, until) for c in request.candidates))
        return [
            clip
            if isinstance(clip, PictureError)
            else self._prompts.about_user(request.task, person, self._video(candidate), clip)
            for candidate, clip in zip(request.candidates, clips, strict=True)
        ]

    async def explain(self, request: ExplainRequest, salt: str = "") -> dict[str, object]:
        """The answers with the user's own, a similar user's, a group's and no profile; the fields of a response.

        Args:
            request: the user and the candidate.
            salt: see `FilterEngine.ask`.

        Raises:
            RequestError: the task or the user is unknown to this filter, or the pictures cannot be had.
        """
        task, candidate = request.task, request.candidate
        rule = self._rule(task, Mode.REASON)
        own = self._person(request.user, task)
        group_id = await self._group_of(request.user, own)
        clip = await self._clip(candidate, task, self._pictures_until(request.timeout_ms))
        if isinstance(clip, PictureError):
            raise RequestError("pictures", str(clip))
        video, limit = self._video(candidate), self.bundle.config.inputs.max_text
        shown = {"own": (own.profile(limit), self._prompts.about_user(task, own, video, clip))}
        similar = self._similar_to(request.user, group_id, task)
        if similar:
            shown["similar"] = (similar.profile(limit), self._prompts.about_user(task, similar, video, clip))
        if group_id:
            group = self.bundle.groups[group_id]
            shown["group"] = (f"{group.name}: {group.text}", self._prompts.about_group(task, group, video, clip))
        nobody = Person(UserRecord("nobody"))
        shown["none"] = (nobody.profile(limit), self._prompts.about_user(task, nobody, video, clip))
        answers = await self.engine.ask(task, Mode.REASON, [prompt for _, prompt in shown.values()], salt)
        perspectives = []
        for (whose, (text, _)), answer in zip(shown.items(), answers, strict=True):
            result = _result(0, candidate.id, task, rule, rule.threshold.value, answer, explain=True)
            perspectives.append(Perspective.model_validate({"whose": whose, "profile": text, "result": result}))
        return {
            "model": self.model,
            "title": video.title,
            "frames": await asyncio.to_thread(_as_jpegs, clip),
            "history": own.latest(self.bundle.config.inputs.history_items).views(limit),
            "perspectives": perspectives,
        }

    def user(self, user_id: str) -> schemas.User:
        """A user that the filter knows.

        Raises:
            RequestError: it does not.
        """
        person = self._known(user_id, Task.SEQUENTIAL)
        limit = self.bundle.config.inputs.max_text
        history = person.latest(20).views(limit)
        groups = self.bundle.groups_of(user_id)
        return schemas.User(user_id=user_id, profile=person.profile(limit), history=history, groups=groups)

    def groups(self) -> list[schemas.Group]:
        """The groups of the filter."""
        return [
            schemas.Group(group_id=g.group_id, name=g.name, features=g.features, profile=g.text, members=len(g.members))
            for g in self.bundle.groups.values()
        ]

    def about(self) -> dict[str, object]:
        """The fields of `ModelInfo` that a replica knows."""
        config, bundle = self.bundle.config, self.bundle
        return {
            "name": config.name,
            "version": bundle.version,
            "tasks": list(config.tasks),
            "modes": list(config.modes),
            "refused": config.refused,
            "thresholds": {t: {m: asdict(r.threshold) for m, r in d.items()} for t, d in config.decisions.items()},
            "auc": {t: {m: r.auc for m, r in d.items()} for t, d in config.decisions.items()},
            "users": len(bundle.user_ids),
            "videos": len(bundle.video_ids),
            "groups": len(bundle.groups),
        }

    def examples(self, count: int) -> dict[str, list[str]]:
        """Some ids of users and videos, for the console."""
        return {"users": list(self.bundle.user_ids[:count]), "videos": list(self.bundle.video_ids[:count])}

    def close(self) -> None:
        """Ends the decoder processes."""
        for threads in (self._fetching, self._decoding):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._pictures:
            self._pictures.close()

    def _rule(self, task: Task, mode: Mode) -> DecisionRule:
        config = self.bundle.config
        if task not in config.tasks:
            raise RequestError("unknown_task", f"this filter answers {', '.join(config.tasks)}")
        if not config.answers(task, mode):
            why = config.refused if mode is Mode.SCORE else "the policy's answers could not be measured"
            raise RequestError("mode_unavailable", f"mode {mode} is not available: {why}")
        return config.rule(task, mode)

    def _known(self, user_id: str, task: Task) -> Person:
        person = self.bundle.person(user_id, task)
        if person is None:
            raise RequestError("unknown_user", "there is no such user: send profile and history instead")
        return person

    def _person(self, user: UserRef, task: Task) -> Person:
        if user.id is not None:
            return self._known(user.id, task)
        assert user.profile
        p = user.profile
        record = UserRecord("guest", p.age, p.gender, p.occupation, dict(p.other), list(p.tags))
        return Person(record, tuple(self._view(v) for v in user.history))

    def _view(self, view: schemas.HistoryView) -> View:
        stored = self.bundle.video(view.id) if view.id else None
        video = stored or Video(view.id or "", view.title, view.duration_s, tags=list(view.tags))
        return View(video, play_rate=view.play_rate, clicked=view.clicked, rating=view.rating)

    def _video(self, candidate: Candidate) -> Video:
        """The known video, with what the request says about it; or an unknown one."""
        stored = self.bundle.video(candidate.id)
        title = candidate.title if candidate.title is not None else stored.title if stored else None
        duration = candidate.duration_s if candidate.duration_s is not None else stored.duration_s if stored else None
        return Video(candidate.id, title, duration, tags=list(candidate.tags) or list(stored.tags if stored else ()))

    async def _group_of(self, user: UserRef, person: Person) -> str | None:
        groups = self.bundle.groups_of(user.id) if user.id is not None else []
        return groups[0] if groups else await asyncio.to_thread(self.bundle.place, person)

    def _similar_to(self, user: UserRef, group_id: str | None, task: Task) -> Person | None:
        """The most similar other member of the group."""
        if group_id is None:
            return None
        members = sorted(self.bundle.groups[group_id].members, key=lambda m: -m.similarity)
        others = (
            self.bundle.person(m.user_id, task) for m in members if m.user_id != user.id and m.matched is not False
        )
        return next((p for p in others if p), None)

    def _pictures_until(self, timeout_ms: int | None) -> float:
        """When the pictures of a request that begins now have to be there; time of the event loop."""
        seconds = min(self.settings.timeout_s, (timeout_ms or 10**9) / 1e3)
        return asyncio.get_running_loop().time() + _PICTURES_SHARE * seconds

    async def _clip(self, candidate: Candidate, task: Task, until: float) -> Clip | PictureError | None:
        """The candidate's pictures; None if the filter shows none. What goes wrong is this candidate's error: it is
        kept, and the others are judged.
        """
        if self._pictures is None or not self.bundle.config.inputs.vision:
            return None
        try:
            async with asyncio.timeout_at(until):
                return fitting(await self._shown(candidate, self._pictures, cover=task == Task.CLICK))
        except PictureError as e:
            return e
        except TimeoutError:
            return PictureError("its pictures take too long", retryable=True)
        except ArtifactError:  # of the frame store
            return PictureError("its stored frames cannot be read")

    async def _shown(self, candidate: Candidate, pictures: Pictures, *, cover: bool) -> Clip | None:
        """The pictures that came with the request, or are stored, or can be fetched."""
        loop = asyncio.get_running_loop()
        if candidate.frames:
            sent = functools.partial(pictures.sent, candidate.frames, cover=cover)
            return await loop.run_in_executor(self._decoding, sent)
        if kept := self.bundle.pictures.in_memory(candidate.id, cover=cover):
            return kept  # without a thread, which takes longer than this
        clip = await asyncio.to_thread(self._stored, candidate.id, cover=cover)
        if clip is None and candidate.uri:
            fetch = functools.partial(pictures.fetched, candidate.uri, cover=cover)
            clip = await loop.run_in_executor(self._fetching, fetch)
        return clip

    def _stored(self, video_id: str, *, cover: bool) -> Clip | None:
        return self.bundle.pictures.cover(video_id) if cover else self.bundle.pictures.clip(video_id)


def _result(
    index: int, name: str, task: Task, rule: DecisionRule, threshold: float, answer: Answer, *, explain: bool
) -> Result:
    if answer.options is None:
        return _kept(index, name, *_cause(answer))
    calibrated = rule.calibration.options(answer.options)
    judgement = decide(task, calibrated, threshold, answer.texts)
    return Result(
        index=index,
        id=name,
        decision=judgement.decision,
        skip_probability=judgement.skip_probability,
        option=judgement.option,
        option_probabilities=dict(calibrated.options),
        label_mass=calibrated.mass,
        reason=judgement.reason or None if explain else None,
    )


def _cause(answer: Answer) -> tuple[str, str]:
    """Why an answer names no option: code and message."""
    if answer.failed:
        return "engine", "the engine failed at this question"
    if answer.too_long:
        return "too_long", "the prompt is too long"
    return "unreadable", "the model named no option"


def _kept(index: int, name: str, code: str, message: str, *, retryable: bool = False) -> Result:
    problem = Problem(code=code, message=message, retryable=retryable)
    return Result(index=index, id=name, decision=Decision.KEEP, error=problem)


def _used(answers: Sequence[Answer]) -> Usage:
    return Usage(
        prompt_tokens=sum(a.prompt_tokens for a in answers),
        cached_tokens=sum(a.cached_tokens for a in answers),
        answer_tokens=sum(a.answer_tokens for a in answers),
    )


def _as_jpegs(clip: Clip | None) -> list[str]:
    return [base64.b64encode(jpeg).decode() for jpeg in clip.jpegs()] if clip else []


def merged(chunks: Sequence[Decided]) -> list[Result]:
    """The results of a request that was split, numbered through."""
    results = [r for chunk in chunks for r in chunk.results]
    return [r.model_copy(update={"index": i}) for i, r in enumerate(results)]


def total(usages: Sequence[Usage]) -> Usage:
    """What several parts of a request cost together."""
    return Usage(**{name: sum(getattr(u, name) for u in usages) for name in Usage.model_fields})


Weights = Mapping[str, float]


def pick(weights: Weights, point: float) -> str:
    """The version at a point in [0, 1): versions take shares of it by weight, in the order of their names.

    Raises:
        ValueError: no version has a weight.
    """
    shares = sorted((name, w) for name, w in weights.items() if w > 0)
    if not shares:
        raise ValueError("no version has a weight above 0")
    left = point * sum(w for _, w in shares)
    for name, weight in shares:
        left -= weight
        if left < 0:
            return name
    return shares[-1][0]
