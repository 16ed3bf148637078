"""Runs of earlier versions stay current and readable: their settings had other names, and fewer of them."""

import pytest

from gubs import earlier, stages
from gubs.artifacts import Recipe, Run, writing
from gubs.config import load_settings
from gubs.errors import SettingsError
from gubs.stages import Graph, Status, states


def recipe_of(stage: str, *overrides: str) -> dict[str, object]:
    settings = load_settings("tiny", overrides)
    return stages.settings_of(stages.stage(stage, settings), settings)


def test_what_has_not_changed_is_recorded_as_it_was():
    """Wrong here: every run that was made before is stale, and trainings of hours are thrown away."""
    assert recipe_of("sft")["teachers.truth"] is True
    labels, grpo = recipe_of("labels"), recipe_of("grpo")
    assert labels["teachers.truth"] is True
    assert grpo["ufm.grpo.steps"] == 60, "of all tasks together, as the preset had it"
    names = {*recipe_of("sft"), *labels, *grpo, *recipe_of("sft_model")}
    assert not names & {*earlier.ADDED, "teachers.train_labels", "teachers.test_labels", "teachers.script_flaws"}


@pytest.mark.parametrize(
    ("stage", "override"),
    [
        ("labels", "teachers.train_labels=naive"),
        ("labels", "teachers.test_labels=meant"),
        ("labels", "teachers.train_labels=teacher"),
        ("sft", "teachers.script_flaws=false"),
        ("grpo", "ufm.grpo.profiles=shuffled"),
        ("grpo", "ufm.grpo.similar=random"),
        ("grpo", "ufm.grpo.similar_gold=own"),
        ("grpo", "ufm.grpo.doubt=0.8"),
        ("grpo", "ufm.grpo.steps=30"),
        ("grpo", "ufm.seed=1"),
        ("sft_model", "ufm.seed=1"),
    ],
)
def test_what_has_changed_changes_the_recipe(stage, override):
    assert recipe_of(stage, override) != recipe_of(stage)


@pytest.mark.parametrize("override", ["ufm.seed=1", "teachers.train_labels=naive", "ufm.grpo.steps=3"])
def test_the_noise_laboratory_shares_what_it_can(override):
    assert recipe_of("sft", override) == recipe_of("sft")
    assert recipe_of("ugm", override) == recipe_of("ugm")


@pytest.mark.parametrize("key", ["teachers.truth", "truth"])
def test_the_old_name_says_what_to_write(key):
    with pytest.raises(SettingsError, match=r"teachers\.truth is now three settings: teachers\.train_labels=truth"):
        load_settings("tiny", [f"{key}=true"])


def test_the_old_name_in_a_preset_says_so_too(tmp_path):
    (tmp_path / "my.yaml").write_text("base: tiny\nteachers: {truth: true}\n")
    with pytest.raises(SettingsError, match=r"teachers\.truth is now three settings"):
        load_settings(str(tmp_path / "my.yaml"))


def test_changes_are_told_by_the_names_of_today():
    before, now = Recipe(settings=recipe_of("labels")), Recipe(settings=recipe_of("labels", "train_labels=naive"))
    assert stages._changes_in_words(before, now) == ["teachers.train_labels=truth, now naive"]
    before, now = Recipe(settings=recipe_of("grpo")), Recipe(settings=recipe_of("grpo", "doubt=0.8", "grpo.steps=30"))
    assert stages._changes_in_words(before, now) == [
        "ufm.grpo.doubt=0.0, now 0.8",
        "ufm.grpo.steps of all tasks together=60, now 40",
    ]
    assert not stages._changes_in_words(before, before)


def test_a_run_of_an_earlier_version_is_held_against_its_own_settings(tmp_path):
    """`gubs status` without settings; wrong here: it compares with the defaults, and all is stale."""
    run, settings = Run(tmp_path / "r"), load_settings("tiny", ["seed=5", "teachers.profiles=false"])
    stages.make(["raw", "truth"], run, load_settings("tiny", ["seed=5", "users=40", "videos=20"]))
    old = load_settings("tiny", ["seed=5", "users=40", "videos=20"]).model_dump(mode="json")
    for name in ("train_labels", "test_labels", "script_flaws"):
        del old["teachers"][name]
    for name in ("profiles", "similar", "similar_gold", "doubt"):
        del old["ufm"]["grpo"][name]
    old["teachers"]["truth"], old["ufm"]["grpo"]["steps"] = True, 60
    recipe = Graph(["truth"], run, settings).recipe(stages.stage("truth", settings))
    recipe = recipe.model_copy(update={"settings": run.artifact("truth").manifest.recipe.settings})
    with writing(run, "truth", recipe=recipe, settings=old) as out:
        for table in ("skips", "users", "videos"):
            out.write_table(table, Run(tmp_path / "r").artifact("raw").table("users"))
    state = next(s for s in states(run) if s.stage.name == "truth")
    assert (state.status, state.reason) == (Status.CURRENT, "")
    now = earlier.as_now(old)
    assert now["ufm"]["grpo"]["steps"] == 45
    assert {now["teachers"][n] for n in ("train_labels", "test_labels")} == {"truth"}
    assert now["teachers"]["script_flaws"] is True
    load_settings("tiny").model_validate(now)
