"""Presets and overrides give settings, or an error with the remedy."""

import pytest

from gubs import config
from gubs.config import Settings, describe, keys, load_settings, preset_names
from gubs.errors import SettingsError


def test_all_presets_load():
    assert preset_names() == ["logs", "paper", "small", "tiny"]
    for name in preset_names():
        assert load_settings(name).preset == name


def test_paper_preset_has_the_papers_numbers():
    s = load_settings("paper")  # the size of its data set: tests/simulator/test_behaviour.py
    assert (s.splits.test_users, s.splits.ugm_users) == (1000, 1000)
    assert (s.filters.max_gap_s, s.filters.min_video_views, s.filters.min_user_exposures) == (120, 10, 30)


def test_overrides_by_full_and_by_short_name():
    s = load_settings("tiny", ["synthetic.noise.app_exit=0.5", "min_video_views=3", "min_video_views=4"])
    assert s.synthetic.noise.app_exit == 0.5
    assert s.filters.min_video_views == 4, "the later override wins"
    assert load_settings("tiny", ["evaluate.items=8"]).evaluate.items == 8


def test_a_partly_set_section_keeps_its_other_defaults():
    """Another endpoint for the summarizer must not cut its answers to the length of other roles' answers."""
    default = Settings().llm.roles
    endpoint = ["llm.endpoints.default.base_url=http://x/v1", "llm.endpoints.default.model=m"]
    changes = ["llm.roles.summarizer.endpoint=default", "llm.roles.matcher.max_tokens=99"]
    roles = load_settings("paper", endpoint + changes).llm.roles
    assert roles.summarizer == default.summarizer.model_copy(update={"endpoint": "default"})
    assert roles.matcher == default.matcher.model_copy(update={"max_tokens": 99})
    assert (roles.profiler, roles.annotator) == (default.profiler, default.annotator)
    checkpoint = load_settings("paper", ["ufm.sft.checkpoint.keep=3"]).ufm.sft.checkpoint
    assert (checkpoint.keep, checkpoint.every) == (3, Settings().ufm.sft.checkpoint.every)


@pytest.mark.parametrize("preset", ["logs", "paper", "small", "tiny"])
def test_settings_come_back_from_json(preset):
    """They are JSON in manifests and between processes."""
    settings = load_settings(preset, ["llm.roles.matcher.seed=3"])
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert Settings(**settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("usrs=3", "synthetic.users"),
        ("filters.min_video_view=3", "filters.min_video_views"),
        ("ufm.evaluate.items=8", "evaluate.items"),
        ("ugm.until=yesterday", "ugm.until"),
        ("seed", "key=value"),
        ("seed=x", "valid integer"),
        ("frames.count=3", "multiple of 2"),
        ("source.kind=youtube", "source.kind"),
        ("frames.min_pixels=1000000", "max_pixels"),
        ("source.kind=kuairand", "source.path"),
    ],
)
def test_bad_overrides_are_refused_with_the_remedy(override, expected):
    with pytest.raises(SettingsError, match=expected.replace(".", r"\.")):
        load_settings("tiny", [override])


def test_ambiguous_short_name_lists_the_candidates(monkeypatch):
    monkeypatch.setattr(config, "keys", lambda: ["a.size", "b.size"])
    with pytest.raises(SettingsError, match=r"a\.size, b\.size"):
        config.resolve_key("size")


def test_unknown_presets_are_refused_and_preset_files_loaded(tmp_path):
    with pytest.raises(SettingsError, match="tiny"):
        load_settings("tinny")
    own = tmp_path / "own.yaml"
    own.write_text("seed: 7\nfilters: {min_video_views: 2}\n")
    assert load_settings(str(own)).seed == 7
    own.write_text("filters: {min_video_vews: 2}\n")
    with pytest.raises(SettingsError, match="min_video_views"):
        load_settings(str(own))


def test_settings_are_frozen_and_described():
    s = load_settings("tiny")
    with pytest.raises(ValueError, match="frozen"):
        s.seed = 3
    described = {key: text for key, _, text in describe(s)}
    assert set(described) == set(keys(Settings))
    assert [key for key, text in described.items() if not text.strip()] == [], "each setting says what it means"
    assert "paper" in described["filters.max_gap_s"]


def test_a_file_may_change_a_preset(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny\nugm: {groups: 4}\nllm: {budget: {money: 5}}\n")
    changed, tiny = load_settings(str(file), ["seed=3"]), load_settings("tiny")
    assert (changed.ugm.groups, changed.llm.budget.money, changed.seed) == (4, 5, 3)
    assert changed.ugm.top == tiny.ugm.top, "the rest of a section stays"
    assert changed.llm.roles == tiny.llm.roles
    assert changed.preset == str(file)
    file.write_text("ugm: {groups: 4}\n")
    assert load_settings(str(file)).synthetic.users == Settings().synthetic.users, "without a base: the defaults"
    file.write_text("base: nonsense\n")
    with pytest.raises(SettingsError, match="base=nonsense is not one of logs, paper, small, tiny"):
        load_settings(str(file))
