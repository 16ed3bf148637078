"""The grids: every arm loads, differs from the others, and names what the paper's tables vary."""

import collections

import pytest

from gubs.ablate.grid import Arm, Choice, Grid, Times, _as_overrides, cells, find_grid, grids
from gubs.config import Settings, load_settings
from gubs.errors import SettingsError
from gubs.evaluate.conditions import Condition
from gubs.simulator.behaviour import UNMEANT, simulate
from gubs.stages import value_at

ONE = Choice((0,), (0,))


def by_arm(name: str, preset: str = "tiny", *overrides: str) -> dict[str, Settings]:
    return {c.arm: c.settings for c in cells(name, ONE, preset, overrides)}


@pytest.mark.parametrize("name", grids())
def test_every_arm_loads_and_differs_from_the_others(name):
    """Wrong here: a typing error ends an ablation after hours, or two arms are one."""
    made = cells(name, ONE, "tiny")
    assert len({(c.level, c.policy, c.settings.model_dump_json()) for c in made}) == len(made)
    assert len({c.name for c in made}) == len(made)


def test_the_papers_tables_are_there_with_the_papers_values():
    assert {f"T{n}" for n in range(4, 12)} | {"rule", "groups", "noise", "order"} == set(grids())
    assert {s.ugm.groups for s in by_arm("T4", "paper").values()} == {10, 20, 30, 40}
    assert {s.ugm.groups for s in by_arm("T4").values()} == {3, 6, 9, 12}, "48 users are too few for the paper's"
    assert {s.ugm.mode for s in by_arm("T5").values()} == {"interest", "demographics", "both"}
    assert {s.ugm.method for s in by_arm("T6").values()} == {"tfidf", "bert", "kmeans"}
    weights = [s.ufm.grpo.advantage for s in by_arm("T11").values()]
    assert sorted(w.weight_user for w in weights) == [0.5, 0.6, 0.7, 0.8]
    assert all(w.weight_user + w.weight_group + w.weight_similar == pytest.approx(1) for w in weights)
    assert {c.policy for c in cells("T7", ONE, "tiny")} == {"base", "sft_model", "grpo"}
    assert len(by_arm("T7")) == 6
    assert next(iter(grids()["T11"].arms)) == "0.7", "the paper's own setting is what others are compared with"


def test_worlds_are_seeds_of_data_and_trainings_seeds_of_their_own():
    made = cells("rule", Choice((3, 4), (0, 7), ("plain", "paper")), "tiny")
    assert [(c.settings.seed, c.settings.ufm.seed, c.arm) for c in made] == [
        (w, s, a) for w in (3, 4) for s in (0, 7) for a in ("plain", "paper")
    ], "a world's first comparison is complete first"


def test_users_settings_are_kept_but_never_what_is_varied():
    settings = by_arm("T5", "tiny", "ugm.groups=4", "ugm.mode=both")
    assert {(arm, s.ugm.mode, s.ugm.groups) for arm, s in settings.items()} == {
        (mode, mode, 4) for mode in ("interest", "demographics", "both")
    }
    assert {s.ugm.groups for s in by_arm("T4", "tiny", "ugm.groups=8").values()} == {4, 8, 12, 16}


@pytest.mark.parametrize(
    ("name", "choice", "overrides", "message"),
    [
        ("T3", ONE, [], "no ablation 'T3'; there are T4"),
        ("rule", Choice(arms=("papers",)), [], "no arm 'papers'; it has 'plain', 'paper'"),
        ("noise", Choice(levels=("30 %",)), [], "no level '30 %'"),
        ("rule", Choice(seeds=()), [], "at least one world"),
        ("rule", ONE, ["seed=3"], "--worlds"),
        ("rule", ONE, ["usrs=3"], "did you mean"),
    ],
)
def test_what_cannot_be_is_refused(name, choice, overrides, message):
    with pytest.raises(SettingsError, match=message):
        cells(name, choice, "tiny", overrides)


def test_an_entry_is_all_that_a_new_ablation_needs(monkeypatch):
    made = Grid(title="t", arms={"a": {}, "b": {"ufm.grpo.beta": 0.1, "policy": "sft_model"}})  # type: ignore[dict-item]
    assert made.arms["b"] == Arm(policy="sft_model", **{"ufm.grpo.beta": 0.1})
    assert made.levels == {"": {}}
    changes = {"ugm.groups": Times(times=0.5), "ufm.grpo.tasks": ["click"], "ugm.overlap": True}
    assert list(_as_overrides(changes, load_settings("tiny"))) == [
        "ugm.groups=3",
        'ufm.grpo.tasks=["click"]',
        "ugm.overlap=true",
    ]
    with pytest.raises(ValueError, match="nonsense"):
        Grid(title="t", arms={}, nonsense=1)  # type: ignore[call-arg]


def test_arms_of_the_noise_laboratory_have_six_samples_each_and_see_the_same_log():
    grid = find_grid("noise")
    for level in grid.levels:
        made = cells("noise", Choice((0,), (0,), levels=(level,)), "tiny")
        assert {c.settings.ufm.grpo.user_samples for c in made} == {4}
        authors = {c.arm: c.settings.ugm.author for c in made}
        assert {arm for arm, author in authors.items() if author == "both"} == {"weighted, LLM", "anchored, LLM"}
        data = {c.settings.model_copy(update={"ufm": None, "ugm": None}).model_dump_json() for c in made}
        assert len(data) == 1, "arms differ in the training and in who writes the profiles"
        teachers = made[0].settings.teachers
        assert (teachers.train_labels, teachers.test_labels) == ("naive", "meant")
        assert not made[0].settings.filters.noise


@pytest.mark.parametrize(("level", "share"), [("0 %", 0.0), ("10 %", 0.1), ("20 %", 0.2), ("40 %", 0.4)])
def test_levels_of_noise_are_what_they_say(level, share):
    """Of the skips of the simulated log, with preset tiny."""
    settings = cells("noise", Choice((1,), (0,), ("plain",), (level,)), "tiny")[0].settings
    smaller = settings.synthetic.model_copy(update={"users": 400})
    skips = simulate(smaller, settings.seed).truth["skips"]["mechanism"].to_pylist()
    kinds = collections.Counter(skips)
    assert sum(kinds[m] for m in UNMEANT) / len(skips) == pytest.approx(share, abs=0.03)
    assert kinds["interruption"] == 0


def test_pairs_name_arms_and_oracle_stands_against_shuffled():
    for name in ("noise", "groups"):
        grid = find_grid(name)
        assert all("oracle" in p.first and "shuffled" in p.second for p in grid.pairs)
        assert {p.otherwise for p in grid.pairs} == {"samples about groups are augmentation only"}
    with pytest.raises(ValueError, match="pairs name no arm: b"):
        Grid(title="t", arms={"a": {}}, pairs=({"first": "a", "second": "b"},))  # type: ignore[dict-item, arg-type]


def test_the_order_is_asked_of_the_policies_of_the_rules():
    """Wrong here: it trains policies of its own, or asks about other changes."""
    asked, trained = cells("order", ONE, "tiny"), cells("rule", ONE, "tiny")
    assert [c.name for c in asked] == [c.name for c in trained]
    assert [c.settings for c in asked] == [c.settings for c in trained]
    assert find_grid("order").conditions == (Condition.LETTERS, Condition.REVERSED)


def test_a_multiple_is_of_the_presets_value():
    assert value_at(load_settings("paper"), "ugm.groups") == 20
