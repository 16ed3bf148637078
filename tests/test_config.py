import pytest

from gubs import config
from gubs.config import Settings, describe, keys, load_settings, preset_names
from gubs.errors import SettingsError


def test_all_presets_load():
    assert preset_names() == ["paper", "small", "tiny"]
    for name in preset_names():
        assert load_settings(name).preset == name


def test_paper_preset_has_the_papers_numbers():
    s = load_settings("paper")
    assert (s.synthetic.users, s.synthetic.videos) == (15000, 25000)
    assert (s.splits.test_users, s.splits.ugm_users) == (1000, 1000)
    assert (s.filters.max_gap_s, s.filters.min_video_views, s.filters.min_user_exposures) == (120, 10, 30)


def test_overrides_by_full_and_by_short_name():
    s = load_settings("tiny", ["synthetic.noise.app_exit=0.5", "min_video_views=3", "min_video_views=4"])
    assert s.synthetic.noise.app_exit == 0.5
    assert s.filters.min_video_views == 4, "the later override wins"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("usrs=3", "synthetic.users"),
        ("filters.min_video_view=3", "filters.min_video_views"),
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


def test_unknown_preset_and_own_preset_file(tmp_path):
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
    assert "paper" in described["filters.max_gap_s"]
