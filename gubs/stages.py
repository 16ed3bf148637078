"""The stages of a run: their names, what each is made from, and what makes it. Nothing else knows their order.

`make` walks the graph to its targets: a stage that is current is kept, a missing one is made, and one that was made
from other inputs, settings or prompts is refused, with what changed, unless `force` asks to make it again. Nothing is
used because its name is there.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from graphlib import TopologicalSorter
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from gubs import prompts
from gubs.artifacts import Artifact, Manifest, Recipe, Run, StageJob, in_words
from gubs.config import Settings, keys
from gubs.console import say
from gubs.errors import ArtifactError, InputError, SettingsError
from gubs.ray_runtime import ray_session

BASE = "base"
"""Name of the policy before any training; it lies outside the run."""
SFT, GRPO = "sft_model", "grpo"
EVALUATION = "eval-"
"""Begins the names of evaluations: eval-grpo is about the policy grpo."""


class StaleError(ArtifactError):
    """A stage was made from something else than what there is now."""


def _always(_: Settings) -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """One stage: what decides its artifact, and what makes it. Dotted names are settings, `module:function` is code."""

    name: str
    make: str
    """Maker: gets a `StageJob` and, by name, the sections of `sections`; returns a one-line summary. Empty: people make
    it."""
    command: str
    """What a person types to make it."""
    doing: str
    """What happens, for the line that says that it begins."""
    reads: tuple[str, ...] = ()
    """Stages it is made from, as far as they are wanted; they are made first."""
    needs: tuple[str, ...] = ()
    """Stages it is made from, whatever the settings say."""
    may_read: tuple[str, ...] = ()
    """Stages it uses where they are there; never made for it."""
    settings: tuple[str, ...] = ()
    """Settings that decide the content; `-ufm.grpo.trackers` takes one out again."""
    roles: tuple[str, ...] = ()
    """Roles of language models that are asked: model and parameters decide the content, not the endpoint's name."""
    prompts: tuple[str, ...] = ()
    """Templates that are filled."""
    outside: tuple[tuple[str, str], ...] = ()
    """(name, function of the settings in `sections`) for what lies outside the run; gives its identity."""
    sections: tuple[str, ...] = ()
    """Sections of the settings that the maker is given, each under the last part of its name."""
    wanted: Callable[[Settings], bool] = _always
    """Whether stages that read it need it, under the settings."""
    asks: Callable[[Settings], bool] = _always
    """Whether `roles` and `prompts` count, under the settings."""
    preflight: str = ""
    """Looks, before anything is made, at all that needs no data; gets the sections."""
    ray: bool = True
    """Its maker needs Ray."""
    page: str = ""
    """Writes the page that shows it; gets the run, returns the page's place."""
    resumable: bool = False
    """A killed attempt is continued by the next."""
    version: int = 1
    """To be raised when the maker gives something else for the same recipe."""
    kind: str = ""
    """Name in the registry, where the stage has a name of its own."""


def _simulated(s: Settings) -> bool:
    return s.source.kind == "synthetic"


def _annotated(s: Settings) -> bool:
    return s.teachers.author == "annotator"


def _reasons_asked(s: Settings) -> bool:
    return _annotated(s) and not (s.teachers.truth and _simulated(s))


_TEACHERS = ("history_items", "max_text", "author")
_TRAINING = ("seed", "ufm.inputs", "ufm.model.dtype", "ufm.rollout.min_new_tokens", "ufm.workers.count")
_UFM_PROMPTS = ("ufm/brief_user", "ufm/click_user", "ufm/sequential_user", prompts.OPTIONS)
_GROUP_PROMPTS = ("ufm/brief_group", "ufm/click_group", "ufm/sequential_group")
_MODEL = ("model", "gubs.ufm.model:identity")


def _teachers(*names: str) -> tuple[str, ...]:
    return ("seed", *(f"teachers.{n}" for n in (*_TEACHERS, *names)))


STAGES: tuple[Stage, ...] = (
    Stage(
        "raw",
        make="gubs.simulator.stage:make_raw",
        command="gubs synth",
        doing="simulate an app",
        settings=("source.kind", "synthetic", "seed"),
        sections=("synthetic", "seed"),
        wanted=_simulated,
        ray=False,
    ),
    Stage(
        "raw",
        make="gubs.data.ingest:make",
        command="gubs ingest",
        doing="read logs",
        settings=("source", "-source.path"),
        outside=(("source", "gubs.data.ingest:source_identity"),),
        sections=("source",),
        wanted=lambda s: not _simulated(s),
        ray=False,
    ),
    Stage(
        "truth",
        make="gubs.simulator.stage:make_truth",
        command="gubs synth",
        doing="note what only the simulation knows",
        settings=("synthetic", "seed"),
        sections=("synthetic", "seed"),
        wanted=_simulated,
        ray=False,
    ),
    Stage(
        "videos",
        make="gubs.simulator.stage:make_videos",
        command="gubs synth",
        doing="render videos",
        reads=("raw", "truth"),
        settings=("render",),
        sections=("render",),
        wanted=_simulated,
        resumable=True,
    ),
    Stage(
        "ifvr",
        make="gubs.data.build:make",
        command="gubs build",
        doing="filter and split",
        reads=("raw",),
        settings=("filters", "splits", "seed"),
        sections=("filters", "splits", "seed"),
        ray=False,
    ),
    Stage(
        "frames",
        make="gubs.video.frames:make",
        command="gubs frames",
        doing="decode videos",
        reads=("ifvr", "videos"),
        settings=("frames", "-frames.timeout_s", "-frames.max_memory_mb", "-frames.workers", "-frames.store"),
        sections=("frames",),
        page="gubs.report.data:write_page",
        version=2,
    ),
    Stage(
        "profiles",
        make="gubs.teachers.profiles:make",
        command="gubs teach",
        doing="write profiles of users who list no tags",
        reads=("ifvr",),
        settings=(
            "seed",
            "source.kind",
            *(f"teachers.profile_{n}" for n in ("items", "users", "chars")),
            "teachers.max_text",
        ),
        roles=("annotator",),
        prompts=("teachers/profile",),
        sections=("teachers", "llm", "seed", "source.kind"),
        wanted=lambda s: s.teachers.profiles,
    ),
    Stage(
        "ugm",
        make="gubs.ugm.stage:make",
        command="gubs ugm",
        doing="summarize, cluster, reflect",
        reads=("ifvr", "profiles"),
        settings=("ugm", "seed"),
        roles=("summarizer", "profiler", "matcher"),
        prompts=("ugm/summarize", "ugm/group_profile", "ugm/match"),
        sections=("ugm", "llm", "seed"),
        wanted=lambda s: s.ufm.grpo.groups,
        page="gubs.report.groups:write_page",
    ),
    Stage(
        "sft",
        make="gubs.teachers.sft:make",
        command="gubs teach",
        doing="write SFT examples",
        reads=("ifvr", "profiles", "truth"),
        settings=_teachers(
            "sft_dislikes",
            "sft_watched",
            "sft_click_users",
            "sft_click_each",
            "think_chars",
            "script_mistakes",
            "truth",
        ),
        roles=("annotator",),
        prompts=("teachers/dislike", "teachers/click", prompts.OPTIONS),
        sections=("teachers", "llm", "seed"),
        asks=_annotated,
    ),
    Stage(
        "labels",
        make="gubs.teachers.reasons:make",
        command="gubs teach",
        doing="find reasons of skips",
        reads=("ifvr", "profiles", "truth"),
        settings=_teachers("truth", "train_skips", "test_skips", "rounds", "reason_chars"),
        roles=("annotator",),
        prompts=("teachers/label", "teachers/judge", prompts.OPTIONS),
        sections=("teachers", "llm", "seed"),
        asks=_reasons_asked,
    ),
    Stage(
        "annotations",
        make="",
        command="gubs annotate import",
        doing="people's answers",
        reads=("labels",),
    ),
    Stage(
        SFT,
        make="gubs.ufm.stage:make_sft",
        command="gubs sft",
        doing="fine-tune",
        reads=("ifvr", "frames", "profiles", "sft"),
        settings=(*_TRAINING, "ufm.sft", "-ufm.sft.checkpoint"),
        prompts=_UFM_PROMPTS,
        outside=(_MODEL,),
        sections=("ufm", "frames", "seed"),
        wanted=lambda s: s.ufm.grpo.start == "sft",
        preflight="gubs.ufm.stage:preflight_sft",
        resumable=True,
    ),
    Stage(
        GRPO,
        make="gubs.ufm.stage:make_grpo",
        command="gubs grpo",
        doing="GA-GRPO",
        reads=("ifvr", "frames", "profiles", "labels", "ugm", SFT),
        may_read=("annotations",),
        settings=(
            *_TRAINING,
            "ufm.grpo",
            "-ufm.grpo.checkpoint",
            "-ufm.grpo.samples_every",
            "-ufm.grpo.trackers",
        ),
        prompts=(*_UFM_PROMPTS, *_GROUP_PROMPTS),
        outside=(_MODEL,),
        sections=("ufm", "frames", "seed"),
        preflight="gubs.ufm.stage:preflight_grpo",
        resumable=True,
    ),
    Stage(
        "eval",
        make="gubs.evaluate.judge:make",
        command="gubs judge",
        doing="judge test users",
        reads=("ifvr", "frames", "profiles", "labels"),
        may_read=("annotations",),
        settings=("seed", "ufm.inputs", "ufm.model.dtype", "ufm.rollout.min_new_tokens", "evaluate"),
        prompts=_UFM_PROMPTS,
        outside=(_MODEL,),
        sections=("ufm", "evaluate", "seed"),
        wanted=lambda _: False,
    ),
)
"""Every stage. Of two with one name, the one that is wanted under the settings counts."""


class Status(StrEnum):
    """How a stage stands."""

    CURRENT = "current"
    STALE = "stale"
    MISSING = "missing"


@dataclass(frozen=True)
class State:
    """A stage and how it stands."""

    stage: Stage
    status: Status
    changes: tuple[str, ...] = ()
    """What is different now, where it is stale."""
    manifest: Manifest | None = None

    @property
    def story(self) -> str:
        """What changed, in words."""
        return in_words(self.changes)

    def to_json(self) -> dict[str, Any]:
        """For scripts."""
        manifest = self.manifest.model_dump(mode="json") if self.manifest else None
        return {"stage": self.stage.name, "status": str(self.status), "changes": self.changes, "manifest": manifest}


def start_policy(settings: Settings) -> str:
    """The policy that GA-GRPO starts from."""
    return SFT if settings.ufm.grpo.start == "sft" else BASE


def main_targets(settings: Settings, name: str = GRPO) -> tuple[str, ...]:
    """The main job: the policy before GA-GRPO on test users, the training, the policy after it."""
    return f"{EVALUATION}{start_policy(settings)}", name, f"{EVALUATION}{name}"


def stage(name: str, settings: Settings, run: Run | None = None) -> Stage:
    """The stage of a name. A training may have a name of its own, which its artifact in `run` tells.

    Raises:
        SettingsError: there is no such stage.
    """
    found = [s for s in STAGES if s.name == name]
    if found:
        return next((s for s in found if s.wanted(settings)), found[0])
    if name.startswith(EVALUATION):
        return _evaluation(name.removeprefix(EVALUATION), settings)
    if run and run.has(name):
        return named(run.artifact(name).manifest.kind, name, settings)
    raise SettingsError(f"there is no stage {name!r}; stages are {', '.join(dict.fromkeys(s.name for s in STAGES))}")


def named(kind: str, name: str, settings: Settings) -> Stage:
    """A stage of the registry under a name of its own: trainings of several settings can stand side by side."""
    made = stage(kind, settings)
    command = f"{made.command} --name {name}" if name != kind else made.command
    return dataclasses.replace(made, name=name, kind=kind, command=command)


def _evaluation(policy: str, settings: Settings) -> Stage:
    """The evaluation of a policy. A trained one is given as a version: its training's settings are its own affair."""
    made = dataclasses.replace(stage("eval", settings), name=f"{EVALUATION}{policy}", kind="eval")
    made = dataclasses.replace(made, command=f"{made.command} {policy}")
    return made if policy == BASE else dataclasses.replace(made, needs=(policy,), outside=())


class Graph:
    """The stages behind some targets, in order, and how they stand."""

    def __init__(self, targets: Iterable[str | Stage], run: Run, settings: Settings, *, as_made: Iterable[str] = ()):
        """Resolves the graph; nothing is read yet.

        Args:
            targets: stages that are wanted, whatever the settings say; order matters where the graph leaves it open.
            run: where.
            settings: all settings.
            as_made: policies that are taken as they were trained, whatever the settings say about their training.
        """
        self.run, self.settings, self.as_made = run, settings, frozenset(as_made)
        self.stages: dict[str, Stage] = {}
        edges: dict[str, list[str]] = {}
        for target in targets:
            self._add(target if isinstance(target, Stage) else stage(target, settings, run), edges)
        self.order = list(TopologicalSorter(edges).static_order())

    def _add(self, node: Stage, edges: dict[str, list[str]]) -> None:
        if node.name in self.stages:
            return
        self.stages[node.name] = node
        before = [] if node.name in self.as_made else self.inputs(node)
        for name in before:
            self._add(self._stage(name), edges)
        edges[node.name] = before

    def _stage(self, name: str) -> Stage:
        return self.stages.get(name) or stage(name, self.settings, self.run)

    def inputs(self, node: Stage) -> list[str]:
        """Stages that one is made from: `needs`, those of `reads` that are wanted, those of `may_read` that exist."""
        wanted = [n for n in node.reads if self._stage(n).wanted(self.settings)]
        there = [n for n in node.may_read if self.run.has(n) and self._stage(n).wanted(self.settings)]
        return [*node.needs, *wanted, *there]

    def recipe(self, node: Stage) -> Recipe:
        """What decides the stage's content now.

        Raises:
            MissingArtifactError: an input is not there.
        """
        return Recipe(
            inputs={n: self.run.artifact(n).content for n in self.inputs(node)},
            settings=settings_of(node, self.settings),
            prompts=prompts.hashes(node.prompts) if node.asks(self.settings) else {},
            outside={n: _load(f)(**sections_of(node, self.settings)) for n, f in node.outside},
            version=node.version,
        )

    def state(self, name: str) -> State:
        """How a stage stands. An input that is missing, or stale itself, says nothing yet about the stage."""
        node = self.stages[name]
        if not self.run.has(name):
            return State(node, Status.MISSING)
        manifest = self.run.artifact(name).manifest
        changes = self._changes(node, manifest)
        return State(node, Status.STALE if changes else Status.CURRENT, tuple(changes), manifest)

    def _changes(self, node: Stage, manifest: Manifest) -> list[str]:
        before = manifest.recipe
        if node.name in self.as_made or not node.make:
            return [
                f"made from another {n}"
                for n, content in before.inputs.items()
                if not self.run.has(n) or self.run.artifact(n).content != content
            ]
        inputs = self.inputs(node)
        there = [n for n in inputs if self.run.has(n)]
        now = Recipe(
            inputs={n: self.run.artifact(n).content for n in there}
            | {n: before.inputs.get(n, "") for n in inputs if n not in there},
            settings=settings_of(node, self.settings),
            prompts=prompts.hashes(node.prompts) if node.asks(self.settings) else {},
            outside={n: self._outside(node, n, f, before) for n, f in node.outside},
            version=node.version,
        )
        return before.changes(now)

    def _outside(self, node: Stage, name: str, function: str, before: Recipe) -> str:
        """Identity of what lies outside; where that cannot be reached any more, what it was when it was read."""
        try:
            return str(_load(function)(**sections_of(node, self.settings)))
        except InputError as e:
            say(f"[{node.name}] kept as it was read: {e}")
            return before.outside.get(name, "")


def make(
    targets: Iterable[str | Stage],
    run: Run,
    settings: Settings,
    *,
    force: bool = False,
    as_made: Iterable[str] = (),
) -> None:
    """Makes the targets and what they need, line by line on stderr.

    Args:
        targets: names of stages, or stages with a name of their own (`named`).
        run: where.
        settings: all settings.
        force: make the targets again, current or not, and every stage on the way to them that is stale.
        as_made: see `Graph`.

    Raises:
        StaleError: a stage was made from something else, and `force` is not given; nothing was made after it.
        GubsError: whatever a maker raises.
    """
    graph = Graph(targets := list(targets), run, settings, as_made=as_made)
    chosen = {t if isinstance(t, str) else t.name for t in targets}

    def forced(state: State) -> bool:
        return force and (state.stage.name in chosen or state.status is Status.STALE)

    states = [graph.state(name) for name in graph.order]
    for state in states:
        if state.stage.name in graph.as_made and state.status is Status.MISSING:
            run.artifact(state.stage.name)  # says that it is missing
        if not forced(state):
            _refuse_stale(state, run)
    with ExitStack() as stack:
        _preflight([s.stage for s in states if s.status is Status.MISSING or forced(s)], run, settings, stack)
        for name in graph.order:
            state = graph.state(name)
            if name in graph.as_made or (state.status is Status.CURRENT and not forced(state)):
                _say(name, f"current: {state.manifest.summary if state.manifest else ''}")
                continue
            if not forced(state):
                _refuse_stale(state, run)
            if state.stage.ray:
                stack.enter_context(ray_session(settings.ray))
            make_stage(state.stage, run, settings, force=forced(state), graph=graph)


def make_stage(
    node: Stage | str, run: Run, settings: Settings, *, force: bool = False, graph: Graph | None = None
) -> Artifact:
    """Makes one stage from what is there, without a look at how its inputs stand.

    Raises:
        MissingArtifactError: an input is not there. GubsError: whatever the maker raises.
    """
    chosen = stage(node, settings, run) if isinstance(node, str) else node
    if not chosen.make:
        raise ArtifactError(f"{run.full(chosen.name)} is made by people: {chosen.command}")
    graph = graph or Graph([chosen], run, settings)
    job = StageJob(
        run,
        chosen.name,
        chosen.kind or chosen.name,
        graph.recipe(chosen),
        settings.model_dump(mode="json"),
        force,
    )
    began = time.monotonic()
    _say(chosen.name, f"{chosen.doing} ...")
    summary = _load(chosen.make)(job, **sections_of(chosen, settings))
    _say(chosen.name, f"done in {time.monotonic() - began:.1f} s: {summary}")
    if chosen.page:
        say(f"[page]   {_load(chosen.page)(run)}")
    return run.artifact(chosen.name)


def states(run: Run, settings: Settings | None = None) -> Iterator[State]:
    """How every stage of a run stands, in order, those of the main job that are missing included.

    Without settings, each stage is held against those that it was made with: only its inputs and prompts can differ.
    """
    own = settings or _latest_settings(run) or Settings()
    there = [n for n in run.stages() if n not in {s.name for s in STAGES}]
    targets = [*main_targets(own), *(n for n in run.stages() if any(s.name == n for s in STAGES)), *there]
    graph = Graph(dict.fromkeys(targets), run, own, as_made=[n for n in there if not n.startswith(EVALUATION)])
    stale: set[str] = set()
    for name in graph.order:
        state = graph.state(name)
        if settings is None and state.manifest:
            state = Graph([graph.stages[name]], run, _settings_of(state.manifest, own), as_made=graph.as_made).state(
                name
            )
        under = [n for n in graph.inputs(state.stage) if n in stale]
        if state.status is Status.CURRENT and under:
            changes = tuple(f"stands on {n}, which is stale" for n in under)
            state = dataclasses.replace(state, status=Status.STALE, changes=changes)
        if state.status is Status.STALE:
            stale.add(name)
        yield state


def command_of(name: str) -> str:
    """The command that makes a stage; empty for a name that no stage has."""
    if name.startswith(EVALUATION):
        return f"gubs judge {name.removeprefix(EVALUATION)}"
    return next((s.command for s in STAGES if s.name == name), "")


def settings_of(node: Stage, settings: Settings) -> dict[str, Any]:
    """The values that decide a stage's content, by dotted name."""
    minus = [n[1:] for n in node.settings if n.startswith("-")]
    values: dict[str, Any] = {}
    for path in (n for n in node.settings if not n.startswith("-")):
        values |= _flat(path, value_at(settings, path))
    kept = {n: v for n, v in values.items() if not any(n == m or n.startswith(f"{m}.") for m in minus)}
    if node.asks(settings):
        kept |= {f"llm.roles.{role}": settings.llm.parameters_of(role) for role in node.roles}
    return kept


def sections_of(node: Stage, settings: Settings) -> dict[str, Any]:
    """What the stage's functions are given, by name."""
    return {path.rsplit(".", 1)[-1]: value_at(settings, path) for path in node.sections}


def value_at(settings: Settings, path: str) -> Any:
    """The section or value of a dotted name."""
    value: Any = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _flat(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, BaseModel):
        return {path: value}
    dumped = value.model_dump(mode="json")
    return {f"{path}.{key}": _dig(dumped, key) for key in keys(type(value))}


def _dig(nested: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        nested = nested[part]
    return nested


def _latest_settings(run: Run) -> Settings | None:
    manifests = [run.artifact(n).manifest for n in run.stages()]
    newest = max(manifests, key=lambda m: m.created, default=None)
    return _settings_of(newest, Settings()) if newest else None


def _settings_of(manifest: Manifest, otherwise: Settings) -> Settings:
    try:
        return Settings(**manifest.settings)
    except ValueError:  # written when other settings existed
        return otherwise


def _refuse_stale(state: State, run: Run) -> None:
    if state.status is Status.STALE:
        node = state.stage
        remedy = f"`{node.command} --force` makes it again" if node.make else "move it away"
        raise StaleError(f"{run.full(node.name)} is stale: {state.story}. {remedy}; or use another --run")


def _preflight(unmade: Sequence[Stage], run: Run, settings: Settings, stack: ExitStack) -> None:
    """Refuses, before anything is made or paid for, what can be refused without data."""
    checks = [s for s in unmade if s.preflight]
    if checks:
        _check_folder(run)
        stack.enter_context(ray_session(settings.ray))
    for node in checks:
        _load(node.preflight)(**sections_of(node, settings))


def _check_folder(run: Run) -> None:
    """Refuses a training at a URI before anything is made for it.

    Raises:
        SettingsError: the run is not at a path.
    """
    if "://" in run.uri and not run.uri.startswith("file://"):
        raise SettingsError(f"--run {run.uri}: training needs a path that all workers see, not a URI")


def _say(name: str, text: str) -> None:
    say(f"{f'[{name}]'.ljust(8)} {text}")


def _load(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)
