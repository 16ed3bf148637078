"""A filter that lies elsewhere: the same as beside its run, its policy copied to this machine once per version."""

from pathlib import Path

import pytest
from serving_helpers import make_filter

from gubs import prompts
from gubs.artifacts import Run
from gubs.errors import ArtifactError
from gubs.records import Task
from gubs.serving.bundle import CONFIG, Bundle, content_of, write_config
from gubs.ufm.checkpoint import POLICY
from gubs.ugm.placement import Placement

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256))}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Makes a filter with a policy at a URI, and opens it; copies go below this test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = Run(f"memory://{tmp_path.name}")

    def make(name="filter"):
        make_filter(run.uri, name=name)
        for file, data in FILES.items():
            run.fs.pipe_file(run.path(name, POLICY, file), data)
        return Bundle(run.full(name))

    yield make
    run.fs.rm(run.root, recursive=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_filter_at_a_uri_is_the_same_as_in_a_folder(elsewhere, tmp_path):
    far = elsewhere()
    for near in (Bundle(make_filter(tmp_path / "run")), Bundle(f"file://{tmp_path}/run/filter")):
        assert far.version == near.version
        assert far.config == near.config
        assert (far.user_ids, far.video_ids) == (near.user_ids, near.video_ids)
        assert far.person("u0", Task.SEQUENTIAL) == near.person("u0", Task.SEQUENTIAL)
        assert far.groups_of("u1") == near.groups_of("u1") == ["g00"]
        assert far.place(far.person("u0", Task.CLICK)) == near.place(near.person("u0", Task.CLICK)) == "g00"
        assert near.local_policy() == tmp_path / "run" / "filter" / POLICY, "it is here already"


def test_its_policy_is_copied_once_per_version(elsewhere, tmp_path):
    bundle = elsewhere()
    folder = bundle.local_policy()
    assert folder.is_relative_to(tmp_path / "cache")
    assert files_in(folder) == FILES
    fs = bundle.artifact.run.fs
    fs.rm(bundle.artifact.run.path("filter", POLICY), recursive=True)
    assert Bundle(bundle.artifact.uri).local_policy() == folder, "it was copied before"
    other = elsewhere("second")
    assert other.local_policy() != folder
    assert files_in(other.local_policy()) == FILES


def test_a_copy_that_was_cut_short_is_no_policy(elsewhere, tmp_path, monkeypatch):
    bundle = elsewhere()

    def cut(_, to, **__):
        Path(to).mkdir()
        Path(to, "config.json").write_bytes(b"{}")
        raise OSError("the network is gone")

    with monkeypatch.context() as m:
        m.setattr(bundle.artifact.run.fs, "get", cut)
        with pytest.raises(OSError, match="the network is gone"):
            bundle.local_policy()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()], "nothing is left behind"
    assert files_in(bundle.local_policy()) == FILES


def test_of_two_replicas_that_copy_one_is_first(elsewhere, monkeypatch):
    """The other finds that copy, and neither puts its own into it nor fails."""
    bundle = elsewhere()
    fs, get = bundle.artifact.run.fs, bundle.artifact.run.fs.get
    first: list[Path] = []

    def overtaken(*arguments, **options):
        get(*arguments, **options)
        if not first:
            first.append(Path())
            first[0] = Bundle(bundle.artifact.uri).local_policy()

    monkeypatch.setattr(fs, "get", overtaken)
    assert bundle.local_policy() == first[0]
    assert files_in(first[0]) == FILES


def test_a_filter_is_not_served_with_other_prompts(elsewhere, monkeypatch):
    """A replica with newer templates would ask in words that the policy was not trained with."""
    bundle = elsewhere()
    config = bundle.config.model_copy(update={"prompts": prompts.hashes(["ufm/brief_user", prompts.OPTIONS])})
    path = bundle.artifact.run.path("filter", CONFIG)
    write_config(path, config, bundle.artifact.run.fs)
    assert Bundle(bundle.artifact.uri).config.prompts == config.prompts
    for changed in ({"ufm/brief_user": "another hash"}, {"ufm/no_such_template": "gone"}):
        write_config(path, config.model_copy(update={"prompts": config.prompts | changed}), bundle.artifact.run.fs)
        with pytest.raises(ArtifactError, match=f"{next(iter(changed))}.* changed"):
            Bundle(bundle.artifact.uri)


def test_a_replica_that_lacks_the_encoder_says_so_when_it_starts(elsewhere, monkeypatch):
    """Otherwise the first stranger's request, and each after it, would fail."""
    bundle = elsewhere()
    bundle.load()

    def lacking(_):
        raise OSError("no file named model.safetensors found in /models/minilm\nand more")

    other = Bundle(bundle.artifact.uri)
    monkeypatch.setattr(Placement, "read", lacking)
    with pytest.raises(ArtifactError, match=r"places users in groups cannot be loaded.*/models/minilm$"):
        other.load()
    assert bundle.place(bundle.person("u0", Task.CLICK)) == "g00", "what was loaded stays"


def test_filters_that_read_or_write_otherwise_have_other_versions(tmp_path, elsewhere):
    config, versions = elsewhere().config, []
    for name, content in (("model.safetensors", "w"), ("tokenizer.json", "a"), ("tokenizer.json", "b")):
        (tmp_path / "policy").mkdir(exist_ok=True)
        (tmp_path / "policy" / name).write_text(content)
        versions.append(content_of(tmp_path / "policy", config, {"users": "1"}))
    assert len(set(versions)) == 3
    assert content_of(tmp_path / "policy", config, {"users": "1"}) == versions[-1]
