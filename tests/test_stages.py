"""The registry of stages: order, and what is current, stale or missing. Cheap stages are made for real."""

import pyarrow as pa
import pytest
from artifact_helpers import put

from gubs import prompts, stages
from gubs.artifacts import Recipe, Run, writing
from gubs.config import Settings, load_settings
from gubs.errors import InputError, MissingArtifactError, SettingsError
from gubs.stages import Graph, StaleError, Status, make, make_stage, named, states

SMALL = [
    "synthetic.users=60",
    "synthetic.videos=30",
    "views_per_user=20",
    "min_video_views=2",
    "min_user_exposures=8",
    "splits.test_users=8",
    "splits.ugm_users=20",
]
DATA = ["raw", "truth", "ifvr"]


def settings(*overrides: str) -> Settings:
    return load_settings("tiny", [*SMALL, *overrides])


def order(*targets: str, run: Run | None = None, **more: str) -> list[str]:
    chosen = settings(*(f"{k.replace('__', '.')}={v}" for k, v in more.items()))
    return Graph(targets, run or Run("memory://empty"), chosen).order


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "r")


@pytest.fixture
def data(run) -> Run:
    make(DATA, run, settings())
    return run


def status(run: Run, name: str, *overrides: str) -> Status:
    return Graph([name], run, settings(*overrides)).state(name).status


# Order


def test_everything_is_made_after_what_it_is_made_from():
    place = {name: i for i, name in enumerate(order(*stages.main_targets(settings())))}
    for name in place:
        graph = Graph([name], Run("memory://empty"), settings())
        assert all(place[n] < place[name] for n in graph.inputs(graph.stages[name]))
    assert {"raw", "truth", "videos", "ifvr", "frames", "ugm", "sft", "labels", "sft_model", "grpo"} <= set(place)
    assert place["eval-sft_model"] < place["grpo"] < place["eval-grpo"]


def test_settings_say_what_is_wanted(tmp_path):
    def behind_grpo(**more):
        return set(order("grpo", **more))

    assert "ugm" not in behind_grpo(ufm__grpo__groups="false")
    assert not {"sft", "sft_model"} & behind_grpo(ufm__grpo__start="base")
    assert "profiles" not in behind_grpo(teachers__profiles="false")
    logs = behind_grpo(source__kind="logs", source__path=str(tmp_path))
    assert not {"truth", "videos"} & logs
    assert "ugm" in order("ugm", ufm__grpo__groups="false"), "what is asked for by name is made in any case"


def test_a_source_decides_what_makes_its_raw_tables(tmp_path):
    assert stages.stage("raw", settings()).command == "gubs synth"
    logs = settings("source.kind=logs", f"source.path={tmp_path}")
    assert stages.stage("raw", logs).command == "gubs ingest"


def test_every_name_in_the_registry_exists():
    """Makers, page writers, prompts, settings: a name that leads nowhere would be found only when it is used."""
    for stage in stages.STAGES:
        for place in filter(None, (stage.make, stage.page, stage.preflight, *(f for _, f in stage.outside))):
            assert callable(stages._load(place)), place
        assert len(prompts.hashes(stage.prompts)) == len(stage.prompts)
        assert all(name in {s.name for s in stages.STAGES} for name in (*stage.reads, *stage.may_read))
        stages.settings_of(stage, settings())
        stages.sections_of(stage, settings())
    with pytest.raises(SettingsError, match="there is no stage 'nonsense'"):
        stages.stage("nonsense", settings())


# Current, missing, stale


def test_what_is_missing_is_made_and_what_is_current_is_kept(data, capsys):
    made = {n: data.artifact(n).manifest.created for n in DATA}
    assert all(status(data, n) is Status.CURRENT for n in DATA)
    capsys.readouterr()
    make(["ifvr"], data, settings())
    assert capsys.readouterr().err.count("current: ") == 2
    assert {n: data.artifact(n).manifest.created for n in DATA} == made
    data.fs.rm(data.path("ifvr"), recursive=True)
    assert status(data, "ifvr") is Status.MISSING
    make(["ifvr"], data, settings())
    assert status(data, "ifvr") is Status.CURRENT


def test_groups_of_other_users_are_never_used(data):
    """After `gubs build --force` with other test users, the groups were made from users who are test users now."""
    groups = pa.table({"group_id": ["g00"]})
    put(data, "ugm", {"groups": groups}, settings=settings(), inputs=["ifvr"])
    before = set(data.artifact("ifvr").table("user_splits").filter(pa.compute.field("ugm"))["user_id"].to_pylist())
    changed = settings("splits.test_users=12", "seed=3")
    make(["raw", "truth", "ifvr"], data, changed, force=True)
    splits = data.artifact("ifvr").table("user_splits").filter(pa.compute.field("split") == "test")
    assert before & set(splits["user_id"].to_pylist()), "the case is worth a test: some of them are test users now"
    with pytest.raises(StaleError, match="ugm is stale: made from another ifvr") as refused:
        make(stages.main_targets(changed), data, changed)
    assert "`gubs ugm --force` remakes it" in str(refused.value)
    assert not data.has("sft"), "nothing is made on the way to something that is refused"


def test_other_settings_are_refused_with_what_changed_and_the_remedy(data):
    with pytest.raises(StaleError, match=r"ifvr is stale: splits\.test_users=8, now 12\. `gubs build --force`"):
        make(["ifvr"], data, settings("splits.test_users=12"))
    make(["ifvr"], data, settings("frames.workers=3"))  # settings of other stages do not matter


def test_force_makes_the_target_and_what_is_stale_on_the_way(data):
    before = data.artifact("raw").content
    make(["ifvr"], data, settings("synthetic.users=70"), force=True)
    assert data.artifact("raw").content != before
    assert data.artifact("raw").table("users").num_rows == 70
    assert data.artifact("ifvr").manifest.recipe.inputs == {"raw": data.artifact("raw").content}


def test_force_leaves_what_is_current_on_the_way_alone(data):
    mark = data.path("raw", "mark")
    data.fs.touch(mark)
    make(["ifvr"], data, settings(), force=True)
    assert data.fs.exists(mark)


def test_equal_content_needs_no_remaking(data):
    """Raw tables made anew, to the same rows: what stands on them is current."""
    make(["raw"], data, settings(), force=True)
    assert status(data, "ifvr") is Status.CURRENT


def test_a_changed_prompt_makes_stale(data, monkeypatch):
    stage = stages.stage("ugm", settings())
    recipe = Graph(["ugm"], data, settings("teachers.profiles=false")).recipe(stage)
    with writing(data, "ugm", recipe=recipe, settings={}) as out:
        out.write_table("groups", pa.table({"x": [1]}))
    assert status(data, "ugm", "teachers.profiles=false") is Status.CURRENT
    monkeypatch.setattr(prompts, "hashes", lambda names: dict.fromkeys(names, "other"))
    state = Graph(["ugm"], data, settings("teachers.profiles=false")).state("ugm")
    assert state.status is Status.STALE
    assert "the prompt ugm/match changed" in state.reason


def test_a_model_by_another_name_is_the_same_model(data):
    """The model answers, whatever the endpoint that leads to it is called."""
    one = ["llm.endpoints.default.base_url=http://a/v1", "llm.endpoints.default.model=m"]
    other = ["llm.endpoints.second.base_url=http://b/v1", "llm.endpoints.second.model=m"]
    other += [f"llm.roles.{r}.endpoint=second" for r in ("summarizer", "profiler", "matcher", "annotator")]
    stage = stages.stage("ugm", settings())
    assert stages.settings_of(stage, settings(*one)) == stages.settings_of(stage, settings(*other))
    another = settings(*one[:1], "llm.endpoints.default.model=n")
    assert stages.settings_of(stage, settings(*one)) != stages.settings_of(stage, another)


def test_the_scripted_teacher_does_not_depend_on_a_language_model():
    stage = stages.stage("sft", settings())
    keys = stages.settings_of(stage, settings())
    assert "llm.roles.annotator" not in keys
    by_annotator = settings("teachers.author=annotator", "sft_views=0", "script_digest=false")
    assert "llm.roles.annotator" in stages.settings_of(stage, by_annotator)


def test_training_may_be_given_other_checkpoints_and_trackers():
    stage = stages.stage("grpo", settings())
    keys = stages.settings_of(stage, settings())
    assert {"ufm.grpo.beta", "ufm.grpo.optimizer.learning_rate", "ufm.inputs.style"} <= set(keys)
    assert not {"ufm.grpo.trackers", "ufm.grpo.samples_every", "ufm.grpo.checkpoint.every"} & set(keys)


# Sources that move


def logs(folder) -> list[str]:
    folder.mkdir(exist_ok=True)
    rows = "".join(f"u{u},v{v},{v},{1_700_000_000 + 10 * v + u}\n" for u in range(6) for v in range(12))
    (folder / "interactions.csv").write_text("user_id,video_id,watch_s,timestamp\n" + rows)
    (folder / "videos.csv").write_text("video_id,duration_s\n" + "".join(f"v{v},20\n" for v in range(12)))
    return ["source.kind=logs", f"source.path={folder}"]


def test_changed_logs_make_stale_and_logs_that_are_gone_do_not(tmp_path, capsys):
    run, source = Run(tmp_path / "r"), logs(tmp_path / "logs")
    make(["raw"], run, settings(*source))
    with (tmp_path / "logs" / "interactions.csv").open("a") as f:
        f.write("u1,v1,3,1700009999\n")
    with pytest.raises(StaleError, match="raw is stale: another source"):
        make(["raw"], run, settings(*source))
    make(["raw"], run, settings(*source), force=True)
    (tmp_path / "logs" / "interactions.csv").unlink()
    (tmp_path / "logs" / "videos.csv").unlink()
    capsys.readouterr()
    make(["raw"], run, settings(*source))
    said = " ".join(capsys.readouterr().err.split())
    assert "the data read earlier is used" in said
    with pytest.raises(InputError):
        make(["raw"], Run(tmp_path / "other"), settings(*source))


# Trainings under other names, and policies taken as they are


def test_policies_are_judged_as_they_were_trained(data):
    """Variants stand side by side: their training's settings are not those of the run. Their data must be."""
    plain = named("grpo", "plain", settings())
    assert (plain.name, plain.kind, plain.make) == ("plain", "grpo", "gubs.ufm.stage:make_grpo")
    put(data, "plain", {"steps": pa.table({"step": [0]})}, settings=settings(), inputs=["ifvr"], kind="grpo")
    graph = Graph(["eval-plain"], data, settings(), as_made=["plain"])
    assert graph.state("plain").status is Status.CURRENT
    assert "grpo" not in graph.order
    assert graph.order.index("plain") < graph.order.index("eval-plain")
    make(["raw", "truth", "ifvr"], data, settings("seed=5"), force=True)
    with pytest.raises(StaleError, match="plain is stale: made from another ifvr"):
        make(["eval-plain"], data, settings("seed=5"), as_made=["plain"])
    with pytest.raises(MissingArtifactError, match="grpo does not exist"):
        make(["eval-grpo"], data, settings("seed=5"), as_made=["grpo"])


def test_a_policy_is_not_asked_with_other_prompts_than_it_learned(data, monkeypatch):
    recipe = Graph(["grpo"], data, settings()).recipe(stages.stage("grpo", settings()), Recipe(inputs={}))
    with writing(data, "plain", recipe=recipe.model_copy(update={"inputs": {}}), settings={}, kind="grpo") as out:
        out.write_table("steps", pa.table({"step": [0]}))
    graph = Graph(["eval-plain"], data, settings(), as_made=["plain"])
    assert graph.state("plain").status is Status.CURRENT
    before = prompts.hashes
    monkeypatch.setattr(
        prompts, "hashes", lambda names: {n: "new" if "brief" in n else h for n, h in before(names).items()}
    )
    assert graph.state("plain").changes == ("the prompt ufm/brief_group changed", "the prompt ufm/brief_user changed")


# Looking at a run


def test_status_tells_how_every_stage_stands(data):
    put(data, "sft", {"examples": pa.table({"x": [1]})}, settings=settings(), inputs=["ifvr"])
    state_of = {s.stage.name: s for s in states(data)}
    assert [state_of[n].status for n in DATA] == [Status.CURRENT] * 3
    assert state_of["grpo"].status is Status.MISSING
    make(["raw", "truth", "ifvr"], data, settings("seed=5"), force=True)
    data.fs.rm(data.path("raw"), recursive=True)
    make_stage("raw", data, settings("seed=6"))
    state_of = {s.stage.name: s for s in states(data)}
    assert state_of["raw"].status is Status.CURRENT, "held against its own settings"
    assert (state_of["ifvr"].status, state_of["ifvr"].reason) == (Status.STALE, "made from another raw")
    assert state_of["sft"].status is Status.STALE
    against = {s.stage.name: s for s in states(data, settings("seed=7"))}
    assert against["raw"].reason == "seed=6, now 7"
    assert against["truth"].status is Status.STALE
    assert {s.stage.name for s in states(Run("memory://nothing"))} >= {"raw", "grpo"}


def test_what_stands_on_something_stale_is_stale(data):
    put(data, "sft", {"examples": pa.table({"x": [1]})}, settings=settings("teachers.profiles=false"), inputs=["ifvr"])
    state_of = {s.stage.name: s for s in states(data, settings("teachers.profiles=false", "splits.test_users=9"))}
    assert state_of["ifvr"].status is Status.STALE
    assert "made from ifvr, which is stale" in state_of["sft"].reason or state_of["sft"].status is Status.STALE


def test_commands():
    assert stages.commands_of("raw") == ["gubs synth", "gubs ingest"]
    assert stages.commands_of("ifvr") == ["gubs build"]
    assert stages.commands_of("eval-grpo") == ["gubs judge grpo"]
    assert stages.commands_of("sensitivity-plain") == ["gubs evaluate sensitivity plain"]
    assert stages.commands_of("plain") == []
