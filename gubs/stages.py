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
from gubs.artifacts import Artifact, JsonObject, Manifest, Recipe, Run, StageJob, in_words
from gubs.config import Settings, keys
from gubs.console import say
from gubs.errors import ArtifactError, InputError, SettingsError
from gubs.ray_runtime import ray_session

BASE = "base"
"""Name of the policy before any training; it lies outside the run."""
SFT, GRPO, DISTIL, FILTER = "sft_model", "grpo", "distil", "filter"
EVALUATION, SENSITIVITY = "eval-", "sensitivity-"
"""Begin the names of stages about a policy: eval-grpo is the evaluation of the policy grpo."""
ABOUT_POLICY = {EVALUATION: "eval", SENSITIVITY: "sensitivity"}
"""Their names in the registry."""


class StaleError(ArtifactError):
    """A stage was made from inputs, settings or prompts other than the current ones."""


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
    """What happens, for the line printed when it begins."""
    reads: tuple[str, ...] = ()
    """Stages it is made from, if the settings want them; they are made first."""
    needs: tuple[str, ...] = ()
    """Stages it is made from, whatever the settings say."""
    of_policy: bool = False
    """Whether it is made from the policy that `serving.policy` names."""
    may_read: tuple[str, ...] = ()
    """Stages it uses if they exist; never made for it."""
    settings: tuple[str, ...] = ()
    """Settings that decide the content; `-ufm.grpo.trackers` takes one out again."""
    roles: tuple[str, ...] = ()
    """Language-model roles it asks: their model and parameters decide the content, the endpoint's name does not."""
    prompts: tuple[str, ...] = ()
    """Prompt templates it fills."""
    outside: tuple[tuple[str, str], ...] = ()
    """(name, function of the `sections`) per input outside the run; the function returns its identity."""
    sections: tuple[str, ...] = ()
    """Settings sections that its functions get, each under the last part of its name."""
    wanted: Callable[[Settings], bool] = _always
    """Whether stages that read it need it, under the settings."""
    asks: Callable[[Settings], bool] = _always
    """Whether `roles` and `prompts` count, under the settings."""
    preflight: str = ""
    """Checks what needs no data, before anything is made; gets the sections."""
    ray: bool = True
    """Whether its maker needs Ray in any case; makers that need it for large data only start it themselves."""
    page: str = ""
    """Writes its page; gets the run, returns the page's path."""
    resumable: bool = False
    """Whether the next attempt resumes a killed one."""
    version: int = 1
    """Raise it when the maker's result changes for the same recipe."""
    kind: str = ""
    """Name in the registry, for a stage under another name (`named`)."""


def _simulated(s: Settings) -> bool:
    return s.source.kind == "synthetic"


def _annotated(s: Settings) -> bool:
    return s.teachers.author == "annotator"


def _reasons_asked(s: Settings) -> bool:
    causes_given = "teacher" not in (s.teachers.train_labels, s.teachers.test_labels)
    return _annotated(s) and not (causes_given and _simulated(s))


_TEACHERS = ("history_items", "max_text", "author")
_TRAINING = (
    *("seed", "ufm.seed", "ufm.held_out", "ufm.inputs", "ufm.model.dtype", "ufm.rollout.min_new_tokens"),
    "ufm.workers.count",
)
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
        sections=("synthetic", "seed", "data"),
        wanted=_simulated,
        ray=False,
        version=2,
    ),
    Stage(
        "raw",
        make="gubs.data.ingest:make",
        command="gubs ingest",
        doing="read logs",
        settings=("source", "-source.path"),
        outside=(("source", "gubs.data.ingest:source_identity"),),
        sections=("source", "data", "ray"),
        wanted=lambda s: not _simulated(s),
        ray=False,
        resumable=True,
        version=2,
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
        sections=("filters", "splits", "seed", "data", "ray"),
        ray=False,
        resumable=True,
        version=3,
    ),
    Stage(
        "frames",
        make="gubs.video.frames:make",
        command="gubs frames",
        doing="decode videos",
        reads=("ifvr", "videos"),
        settings=("frames", "-frames.timeout_s", "-frames.max_memory_mb", "-frames.workers", "-frames.store"),
        outside=(("video files", "gubs.video.frames:files_identity"),),
        sections=("frames", "source"),
        page="gubs.report.data:write_page",
        version=3,
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
        wanted=lambda s: s.ufm.grpo.groups and s.ufm.grpo.profiles != "oracle",
        asks=lambda s: s.ugm.author != "evidence",
        page="gubs.report.groups:write_page",
        version=2,
    ),
    Stage(
        "oracle",
        make="gubs.ugm.oracle:make",
        command="gubs grpo",
        doing="group users by what the simulation knows",
        reads=("truth",),
        sections=("source.kind",),
        wanted=lambda s: s.ufm.grpo.groups and s.ufm.grpo.profiles == "oracle",
        preflight="gubs.ugm.oracle:preflight",
        ray=False,
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
            "sft_views",
            "script_digest",
            "sft_click_users",
            "sft_click_each",
            "think_chars",
            "script_mistakes",
            "script_flaws",
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
        settings=_teachers("train_labels", "test_labels", "train_skips", "test_skips", "rounds", "reason_chars"),
        roles=("annotator",),
        prompts=("teachers/label", "teachers/judge", prompts.OPTIONS),
        sections=("teachers", "llm", "seed"),
        asks=_reasons_asked,
    ),
    Stage("annotations", make="", command="gubs annotate import", doing="people's answers", reads=("labels",)),
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
        reads=("ifvr", "frames", "profiles", "labels", "ugm", "oracle", SFT),
        may_read=("annotations",),
        settings=(*_TRAINING, "ufm.grpo", "-ufm.grpo.checkpoint", "-ufm.grpo.samples_every", "-ufm.grpo.trackers"),
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
        settings=(
            *("seed", "ufm.inputs", "ufm.model.dtype", "ufm.rollout.min_new_tokens", "ufm.held_out"),
            *("evaluate.items", "evaluate.bootstrap", "evaluate.decision"),
        ),
        prompts=_UFM_PROMPTS,
        outside=(_MODEL,),
        sections=("ufm", "evaluate", "seed"),
        wanted=lambda _: False,
        resumable=True,
        version=3,
    ),
    Stage(
        "candidates",
        make="gubs.evaluate.public:make_candidates",
        command="gubs evaluate public",
        doing="draw candidates",
        reads=("raw",),
        settings=("seed", "evaluate.public"),
        sections=("evaluate", "seed"),
        wanted=lambda _: False,
        ray=False,
        version=2,
    ),
    Stage(
        "public",
        make="gubs.evaluate.public:make_public",
        command="gubs evaluate public",
        doing="answer the candidates by every baseline",
        reads=("raw",),
        needs=("candidates",),
        settings=("seed", "evaluate.bootstrap"),
        sections=("evaluate", "seed"),
        wanted=lambda _: False,
        ray=False,
        version=2,
    ),
    Stage(
        "simulated",
        make="gubs.evaluate.simulated:make",
        command="gubs evaluate simulated",
        doing="ask language models as simulated users",
        reads=("raw",),
        needs=("candidates", "public"),
        settings=("seed", "evaluate.bootstrap", "evaluate.simulate", "source.kind"),
        roles=("annotator",),
        prompts=("simulate/list", "simulate/point", "simulate/recall"),
        sections=("evaluate", "llm", "seed", "source.kind"),
        wanted=lambda _: False,
    ),
    Stage(
        "ranking",
        make="gubs.evaluate.ranking:make",
        command="gubs evaluate ranking",
        doing="rank every user's last item",
        reads=("raw",),
        settings=("seed", "evaluate.bootstrap", "evaluate.sasrec"),
        sections=("evaluate", "seed"),
        wanted=lambda _: False,
        version=2,
    ),
    Stage(
        "bars",
        make="gubs.evaluate.bars:make",
        command="gubs evaluate ifvr",
        doing="ask every baseline about the test users",
        reads=("ifvr",),
        may_read=("labels", "annotations"),
        settings=("seed", "evaluate.sasrec"),
        sections=("evaluate", "seed"),
        wanted=lambda _: False,
        version=2,
    ),
    Stage(
        "sensitivity",
        make="gubs.evaluate.sensitivity:make",
        command="gubs evaluate sensitivity",
        doing="ask with changed prompts",
        reads=("ifvr", "frames", "profiles", "labels"),
        may_read=("annotations", "ugm"),
        settings=(
            *("seed", "ufm.inputs", "ufm.model.dtype", "ufm.rollout.min_new_tokens"),
            *("evaluate.bootstrap", "evaluate.sensitivity"),
        ),
        prompts=(*_UFM_PROMPTS, *_GROUP_PROMPTS),
        outside=(_MODEL,),
        sections=("ufm", "evaluate", "seed"),
        wanted=lambda _: False,
        resumable=True,
    ),
    Stage(
        DISTIL,
        make="gubs.ufm.stage:make_distil",
        command="gubs distil",
        doing="teach the policy to answer without a thought",
        reads=("ifvr", "frames", "profiles", "labels"),
        may_read=("annotations",),
        of_policy=True,
        settings=(*_TRAINING, "ufm.distil", "-ufm.distil.checkpoint", "-ufm.distil.enabled", "ufm.grpo.tasks"),
        prompts=_UFM_PROMPTS,
        sections=("ufm", "frames", "seed", "serving.policy"),
        wanted=lambda s: s.ufm.distil.enabled,
        preflight="gubs.ufm.stage:preflight_distil",
        resumable=True,
    ),
    Stage(
        FILTER,
        make="gubs.serving.stage:make",
        command="gubs filter",
        doing="measure the policy on held-out users, pack the filter",
        reads=("ifvr", "frames", "profiles", "labels", "ugm", DISTIL),
        may_read=("annotations",),
        of_policy=True,
        settings=(
            *("seed", "ufm.inputs", "ufm.model.dtype", "ufm.held_out", "ufm.grpo.tasks"),
            *("serving.policy", "serving.score_gap", "evaluate.decision"),
        ),
        prompts=(*_UFM_PROMPTS, *_GROUP_PROMPTS),
        sections=("ufm", "evaluate", "serving", "frames", "seed"),
        wanted=lambda _: False,
        version=5,
    ),
)
"""Every stage. Of two with one name, the one that is wanted under the settings counts."""


class Status(StrEnum):
    """Whether a stage can be used."""

    CURRENT = "current"
    STALE = "stale"
    MISSING = "missing"


@dataclass(frozen=True)
class State:
    """A stage and its status in a run."""

    stage: Stage
    status: Status
    changes: tuple[str, ...] = ()
    """What is different now, if it is stale."""
    manifest: Manifest | None = None

    @property
    def reason(self) -> str:
        """What changed, in words."""
        return in_words(self.changes)

    def to_json(self) -> JsonObject:
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
    """The stage of a name; a training under another name is recognised by its artifact in `run`.

    Raises:
        SettingsError: there is no such stage.
    """
    namesakes = [s for s in STAGES if s.name == name]
    if namesakes:
        node = next((s for s in namesakes if s.wanted(settings)), namesakes[0])
        return _of_policy(node, settings.serving.policy) if node.of_policy else node
    if prefix := prefix_of(name):
        return _about_policy(prefix, name.removeprefix(prefix), settings)
    if run and run.has(name):
        return named(run.artifact(name).manifest.kind, name, settings)
    names = ", ".join(dict.fromkeys(s.name for s in STAGES))
    raise SettingsError(f"there is no stage {name!r}; the stages are {names}")


def named(kind: str, name: str, settings: Settings) -> Stage:
    """A stage under another name, so that trainings with different settings can share a run."""
    node = stage(kind, settings)
    command = f"{node.command} --name {name}" if name != kind else node.command
    return dataclasses.replace(node, name=name, kind=kind, command=command)


def prefix_of(name: str) -> str:
    """How the name of a stage about a policy begins; empty for other stages."""
    return next((prefix for prefix in ABOUT_POLICY if name.startswith(prefix)), "")


def _about_policy(prefix: str, policy: str, settings: Settings) -> Stage:
    """The evaluation of a policy, for example. A trained policy is an input; only the base model comes from outside."""
    node = stage(ABOUT_POLICY[prefix], settings)
    node = dataclasses.replace(node, name=f"{prefix}{policy}", kind=node.name, command=f"{node.command} {policy}")
    return _of_policy(node, policy)


def _of_policy(node: Stage, policy: str) -> Stage:
    """A stage about a policy: a trained one is its input, the base model comes from outside the run."""
    return (
        dataclasses.replace(node, outside=(_MODEL,))
        if policy == BASE
        else dataclasses.replace(node, needs=(policy,), outside=())
    )


class Graph:
    """Target stages and all that they are made from, in order."""

    def __init__(self, targets: Iterable[str | Stage], run: Run, settings: Settings, *, as_made: Iterable[str] = ()):
        """Resolves the graph; reads no artifact yet.

        Args:
            targets: stages to make, whether the settings want them or not; among independent ones, this order holds.
            run: the run that holds them.
            settings: all settings.
            as_made: policies to take as they are, even if the settings would train them differently now; but not if
                their data or the prompts have changed.
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
        """Stages that one is made from: `needs`, wanted `reads`, and wanted `may_read` that exist."""
        reads = [n for n in node.reads if self._stage(n).wanted(self.settings)]
        optional = [n for n in node.may_read if self.run.has(n) and self._stage(n).wanted(self.settings)]
        return [*node.needs, *reads, *optional]

    def recipe(self, node: Stage, before: Recipe | None = None) -> Recipe:
        """What decides the stage's content now.

        Args:
            node: the stage.
            before: an earlier recipe; what cannot be read now counts as unchanged since then.

        Raises:
            MissingArtifactError: an input is missing, and there is no earlier recipe.
            InputError: an input outside the run cannot be read, and there is no earlier recipe.
        """
        return Recipe(
            inputs={n: self._content(n, before) for n in self.inputs(node)},
            settings=settings_of(node, self.settings),
            prompts=prompts.hashes(node.prompts) if node.asks(self.settings) else {},
            outside={n: self._outside(node, n, function, before) for n, function in node.outside},
            version=node.version,
        )

    def _content(self, name: str, before: Recipe | None) -> str:
        if before and not self.run.has(name):
            return before.inputs.get(name, "")
        return self.run.artifact(name).content

    def _outside(self, node: Stage, name: str, function: str, before: Recipe | None) -> str:
        try:
            return str(_load(function)(**sections_of(node, self.settings)))
        except InputError as e:
            if not before:
                raise
            say(f"[{node.name}] the source cannot be read now; the data read earlier is used: {e}")
            return before.outside.get(name, "")

    def state(self, name: str) -> State:
        """The status of a stage. Whether its inputs are stale themselves does not count here."""
        node = self.stages[name]
        if not self.run.has(name):
            return State(node, Status.MISSING)
        manifest = self.run.artifact(name).manifest
        changes = self._changes(node, manifest.recipe)
        return State(node, Status.STALE if changes else Status.CURRENT, tuple(changes), manifest)

    def _changes(self, node: Stage, before: Recipe) -> list[str]:
        if node.name not in self.as_made and node.make:
            return before.changes(self.recipe(node, before))
        contents = {n: self.run.artifact(n).content if self.run.has(n) else "" for n in before.inputs}
        asked = prompts.hashes(n for n in before.prompts if n in node.prompts)
        return before.changes(before.model_copy(update={"inputs": contents, "prompts": asked}))


def make(
    targets: Iterable[str | Stage],
    run: Run,
    settings: Settings,
    *,
    force: bool = False,
    as_made: Iterable[str] = (),
    on_made: Callable[[str, float], object] | None = None,
) -> None:
    """Makes the targets and what they need; reports one line per step on stderr.

    Args:
        targets: names of stages, or stages under another name (`named`).
        run: the run that holds them.
        settings: all settings.
        force: remake the targets, even if they are current, and every stale stage that they need.
        as_made: see `Graph`.
        on_made: gets the name of each stage that was made, and the seconds that it took.

    Raises:
        StaleError: a stage is stale, and `force` is not set; no stage after it was made.
        GubsError: whatever a maker raises.
    """
    graph = Graph(targets := list(targets), run, settings, as_made=as_made)
    chosen = {t if isinstance(t, str) else t.name for t in targets}

    def forced(state: State) -> bool:
        return force and (state.stage.name in chosen or state.status is Status.STALE)

    states = [graph.state(name) for name in graph.order]
    for state in states:
        if state.stage.name in graph.as_made and state.status is Status.MISSING:
            run.artifact(state.stage.name)  # raises: it is missing
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
            began = time.monotonic()
            make_stage(state.stage, run, settings, force=forced(state), graph=graph)
            if on_made:
                on_made(name, time.monotonic() - began)


def make_stage(
    node: Stage | str, run: Run, settings: Settings, *, force: bool = False, graph: Graph | None = None
) -> Artifact:
    """Makes one stage from its inputs as they are, stale or not.

    Raises:
        ArtifactError: people make this stage.
        MissingArtifactError: an input is missing.
        GubsError: whatever the maker raises.
    """
    chosen = stage(node, settings, run) if isinstance(node, str) else node
    if not chosen.make:
        raise ArtifactError(f"{run.full(chosen.name)} is made by people: {chosen.command}")
    graph = graph or Graph([chosen], run, settings)
    job = StageJob(
        run, chosen.name, chosen.kind or chosen.name, graph.recipe(chosen), settings.model_dump(mode="json"), force
    )
    began = time.monotonic()
    _say(chosen.name, f"{chosen.doing} ...")
    summary = _load(chosen.make)(job, **sections_of(chosen, settings))
    _say(chosen.name, f"done in {time.monotonic() - began:.1f} s: {summary}")
    if chosen.page:
        say(f"[page]   {_load(chosen.page)(run)}")
    return run.artifact(chosen.name)


def states(run: Run, settings: Settings | None = None) -> Iterator[State]:
    """The status of every stage of a run, in order, and of those that the main job still lacks.

    Without settings, each stage is compared with its own settings: only inputs and prompts can differ.
    """
    base = settings or _latest_settings(run) or Settings()
    registered = {s.name for s in STAGES}
    existing = sorted(run.stages(), key=lambda n: n not in registered)
    trainings = [n for n in existing if n not in registered and not prefix_of(n)]
    graph = Graph(dict.fromkeys([*main_targets(base), *existing]), run, base, as_made=trainings)
    stale: set[str] = set()
    for name in graph.order:
        state = graph.state(name)
        if settings is None and state.manifest:
            own = _settings_of(state.manifest, base)
            state = Graph([graph.stages[name]], run, own, as_made=trainings).state(name)
        stale_inputs = [n for n in graph.inputs(state.stage) if n in stale]
        if state.status is Status.CURRENT and stale_inputs:
            changes = tuple(f"made from {n}, which is stale" for n in stale_inputs)
            state = dataclasses.replace(state, status=Status.STALE, changes=changes)
        if state.status is Status.STALE:
            stale.add(name)
        yield state


def commands_of(name: str) -> list[str]:
    """The commands that make a stage (simulated or read from logs, for example); none for a name that no stage has."""
    prefix = prefix_of(name)
    commands = [s.command for s in STAGES if s.name == (ABOUT_POLICY[prefix] if prefix else name)]
    return [f"{command} {name.removeprefix(prefix)}" if prefix else command for command in commands]


def settings_of(node: Stage, settings: Settings) -> JsonObject:
    """The values that decide a stage's content, by dotted name."""
    minus = [n[1:] for n in node.settings if n.startswith("-")]
    values: dict[str, Any] = {}
    dumped = settings.model_dump(mode="json")
    for path in (n for n in node.settings if not n.startswith("-")):
        section = value_at(settings, path)
        names = [f"{path}.{key}" for key in keys(type(section))] if isinstance(section, BaseModel) else [path]
        values |= {name: _dig(dumped, name) for name in names}
    kept = {n: v for n, v in values.items() if not any(n == m or n.startswith(f"{m}.") for m in minus)}
    if node.asks(settings):
        kept |= {f"llm.roles.{role}": settings.llm.parameters_of(role) for role in node.roles}
    return kept


def sections_of(node: Stage, settings: Settings) -> JsonObject:
    """The arguments of the stage's functions, by name."""
    return {path.rsplit(".", 1)[-1]: value_at(settings, path) for path in node.sections}


def value_at(settings: Settings, path: str) -> Any:
    """The section or value of a dotted name."""
    value: Any = settings
    for part in path.split("."):
        value = getattr(value, part)
    return value


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
    except ValueError:  # an older version wrote them
        return otherwise


def _refuse_stale(state: State, run: Run) -> None:
    if state.status is Status.STALE:
        node = state.stage
        remedy = f"`{node.command} --force` remakes it" if node.make else "move it away"
        raise StaleError(f"{run.full(node.name)} is stale: {state.reason}. {remedy}; or use another --run")


def _preflight(unmade: Sequence[Stage], run: Run, settings: Settings, stack: ExitStack) -> None:
    """Refuses what can be refused without data, before anything is made or paid for."""
    checks = [s for s in unmade if s.preflight]
    if checks:
        _check_folder(run)
        stack.enter_context(ray_session(settings.ray))
    for node in checks:
        _load(node.preflight)(**sections_of(node, settings))


def _check_folder(run: Run) -> None:
    if "://" in run.uri and not run.uri.startswith("file://"):
        raise SettingsError(f"--run {run.uri}: training needs a path that all workers see, not a URI")


def _say(name: str, text: str) -> None:
    say(f"{f'[{name}]'.ljust(8)} {text}")


def _load(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(import_module(module), function)
