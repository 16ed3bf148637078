"""Artifacts are whole or absent, and their recipes and contents decide what is current."""

import json
import multiprocessing
import os
import pickle
import signal
import threading

import pyarrow as pa
import pytest

from gubs.artifacts import MANIFEST, Recipe, Run, StageJob, fingerprint, in_words, write_part, writing
from gubs.config import Settings
from gubs.errors import ArtifactError, MissingArtifactError

TABLE = pa.table({"x": [1, 2, 3]})
RECIPE = Recipe(inputs={"a": "b"}, settings={"n": 1}, prompts={"ugm/match": "p"}, outside={"source": "s"})
SETTINGS = Settings().model_dump(mode="json")


def attempt(run, stage="raw", **kwargs):
    return writing(run, stage, recipe=RECIPE, settings=SETTINGS, **kwargs)


def write(run, stage="raw", table=TABLE, **kwargs):
    with attempt(run, stage, **kwargs) as out:
        out.write_table("t", table)
        out.info = {"note": "n"}
        out.summary = "three rows"
    return run.artifact(stage)


def names(run, folder):
    return sorted(p.rsplit("/", 1)[-1] for p in run.fs.ls(folder, detail=False))


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    return Run(tmp_path / "r" if request.param == "local" else f"memory://{tmp_path.name}/r")


def test_round_trip_with_manifest(run):
    artifact = write(run)
    assert artifact.table("t").equals(TABLE)
    assert artifact.table("t", ["x"]).column_names == ["x"]
    m = artifact.manifest
    assert (m.stage, m.kind, m.tables["t"].rows, m.info) == ("raw", "raw", 3, {"note": "n"})
    assert m.summary == "three rows"
    assert (m.recipe, m.fingerprint) == (RECIPE, RECIPE.fingerprint("raw"))
    assert m.settings["filters"]["max_gap_s"] == 120
    assert m.code_version.startswith("0.")
    assert run.stages() == ["raw"]
    assert names(run, run.root) == ["raw"], "no temporary folder remains"


def test_tables_are_read_by_the_calling_thread_alone(run, monkeypatch):
    """A thread of Arrow that still holds a Python file while the interpreter ends aborts the process (exit 134)."""
    rows = 200_000
    artifact = write(run, table=pa.table({c: range(rows) for c in "abcdef"}))
    readers = set()
    unpatched = run.fs.open

    def watched(*args, **kwargs):
        file = unpatched(*args, **kwargs)
        read = file.read
        monkeypatch.setattr(file, "read", lambda *a: (readers.add(threading.get_ident()), read(*a))[1], raising=False)
        return file

    monkeypatch.setattr(run.fs, "open", watched)
    assert artifact.table("t").num_rows == rows
    assert readers == {threading.get_ident()}


def test_large_tables_are_read_piece_by_piece(run):
    artifact = write(run, table=pa.table({"x": range(150_000), "y": ["a"] * 150_000}))
    pieces = list(artifact.batches("t", ["x"]))
    assert max(p.num_rows for p in pieces) <= 65_536
    assert pa.concat_tables(pieces) == artifact.table("t", ["x"])
    with pytest.raises(ArtifactError, match="no table 'u'"):
        list(artifact.batches("u"))


def write_parts(run):
    """A table in three files, which a manifest lists in their order."""
    with attempt(run) as out:
        tables = {
            "a": pa.table({"x": [1, 2]}),
            "b": pa.table({"x": [3]}),
            "c": pa.table({"x": pa.array([], pa.int64())}),
        }
        parts = [write_part(run.fs, out.folder, f"t/{k}.parquet", t, kind=k) for k, t in tables.items()]
        out.add_table("t", parts)
    return run.artifact("raw")


def test_a_table_in_parts_is_one_table(run):
    artifact = write_parts(run)
    assert artifact.table("t").equals(TABLE)
    assert artifact.table("t", ["x"], kind="b")["x"].to_pylist() == [3]
    assert artifact.table("t", kind="none").num_rows == 0
    assert artifact.table("t", other="key").equals(TABLE), "parts without a key are read"
    assert pa.concat_tables(artifact.batches("t", wanted=lambda p: p.keys["kind"] != "b"))["x"].to_pylist() == [1, 2]
    assert [(p.file, p.rows) for p in artifact.parts("t")] == [
        ("t/a.parquet", 2),
        ("t/b.parquet", 1),
        ("t/c.parquet", 0),
    ]
    assert artifact.manifest.tables["t"].rows == 3
    assert artifact.content == write_parts(run).content
    assert names(run, run.path("raw", "t")) == ["a.parquet", "b.parquet", "c.parquet"]


@pytest.mark.parametrize("damage", [lambda fs, p: fs.rm_file(p), lambda fs, p: fs.pipe_file(p, b"short")])
def test_a_damaged_part_is_found(run, damage):
    write_parts(run)
    damage(run.fs, run.path("raw", "t", "b.parquet"))
    with pytest.raises(ArtifactError, match=r"damaged: t/b\.parquet is missing"):
        run.artifact("raw")


def test_a_stage_may_be_a_link_to_a_stage_of_another_run(tmp_path):
    """So several trainings can share one data set."""
    write(Run(tmp_path / "data"))
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "raw").symlink_to(tmp_path / "data" / "raw")
    (tmp_path / "seed" / "gone").symlink_to(tmp_path / "nowhere")
    assert Run(tmp_path / "seed").stages() == ["raw"]
    assert Run(tmp_path / "seed").artifact("raw").table("t").equals(TABLE)


def test_rewriting_replaces(run):
    write(run)
    other = write(run, table=pa.table({"x": [9]}))
    assert other.table("t")["x"].to_pylist() == [9]


def test_failure_leaves_no_artifact_and_keeps_the_old_one(run):
    with pytest.raises(ZeroDivisionError), attempt(run) as out:
        out.write_table("t", TABLE)
        _ = 1 / 0
    assert run.stages() == []
    write(run)
    with pytest.raises(ZeroDivisionError), attempt(run):
        _ = 1 / 0
    assert run.artifact("raw").table("t").equals(TABLE)


def test_resumable_keeps_what_an_interrupted_attempt_made(run):
    with pytest.raises(ZeroDivisionError), attempt(run, "v", resume_key="m") as out:
        run.fs.pipe_file(out.path("a.mp4"), b"1")
        _ = 1 / 0
    with attempt(run, "v", resume_key="m") as out:
        assert run.fs.exists(out.path("a.mp4"))
    assert run.fs.exists(run.path("v", "a.mp4"))


def test_resumable_with_other_settings_starts_over(run):
    with pytest.raises(ZeroDivisionError), attempt(run, "v", resume_key="m") as out:
        run.fs.pipe_file(out.path("a.mp4"), b"1")
        _ = 1 / 0
    with attempt(run, "v", resume_key="other") as out:
        assert not run.fs.exists(out.path("a.mp4"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.fs.rm_file(run.path("raw", MANIFEST)), "unfinished"),
        (lambda run: run.fs.rm_file(run.path("raw", "t.parquet")), "damaged"),
        (lambda run: run.fs.pipe_file(run.path("raw", "t.parquet"), b"short"), "damaged"),
        (lambda run: run.fs.pipe_file(run.path("raw", MANIFEST), b"{}"), "not a manifest"),
        (lambda run: edit_manifest(run, stage="ifvr"), "another stage"),
        (lambda run: run.fs.pipe_file(run.path("raw", MANIFEST), b"[]"), "not a manifest"),
        (lambda run: run.fs.pipe_file(run.path("raw", MANIFEST), b"\xff{"), "not a manifest"),
        (lambda run: edit_manifest(run, recipe=None), "not a manifest"),
        (lambda run: edit_manifest(run, schema_version=99), "format 99, this one reads 2"),
        (lambda run: run.fs.rm(run.path("raw"), recursive=True), "does not exist"),
    ],
)
def test_incomplete_and_foreign_artifacts_are_refused(run, damage, message):
    write(run)
    damage(run)
    with pytest.raises(ArtifactError, match=message):
        run.artifact("raw")


def edit_manifest(run, **changes):
    path = run.path("raw", MANIFEST)
    run.fs.pipe_file(path, json.dumps({**json.loads(run.fs.cat_file(path)), **changes}).encode())


def test_an_error_about_an_unknown_table_lists_the_tables(run):
    with pytest.raises(ArtifactError, match="it has: t"):
        write(run).table("users")


def test_a_killed_writers_leftovers_are_cleared(tmp_path):
    run = Run(tmp_path / "r")
    child = multiprocessing.get_context("fork").Process(target=_killed_while_writing, args=(run,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    leftovers = [p.name for p in (tmp_path / "r").iterdir()]
    assert len(leftovers) == 1
    assert leftovers[0].startswith("raw.tmp-")
    assert run.stages() == []
    write(run)
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["raw"]


def _killed_while_writing(run):
    with attempt(run) as out:
        out.write_table("t", TABLE)
        os.kill(os.getpid(), signal.SIGKILL)


CHANGED = {"inputs": {"a": "c"}, "settings": {"n": 2}, "prompts": {"ugm/match": "q"}}
CHANGED |= {"outside": {"source": "t"}, "version": 2}


def test_a_fingerprint_depends_on_everything_that_decides_the_content():
    base = RECIPE.fingerprint("s")
    assert base == RECIPE.model_copy().fingerprint("s")
    others = [RECIPE.model_copy(update={part: value}).fingerprint("s") for part, value in CHANGED.items()]
    assert len({base, RECIPE.fingerprint("t"), *others}) == 2 + len(CHANGED)
    assert fingerprint("s", {"a": 1, "b": 2}) == fingerprint("s", {"b": 2, "a": 1})
    assert len(base) == 16


@pytest.mark.parametrize(
    ("part", "phrase"),
    [
        ("inputs", "made from another a"),
        ("settings", "n=1, now 2"),
        ("prompts", "the prompt ugm/match changed"),
        ("outside", "another source"),
        ("version", "made by an earlier version of this stage"),
    ],
)
def test_changes_are_described_in_words(part, phrase):
    assert RECIPE.changes(RECIPE.model_copy(update={part: CHANGED[part]})) == [phrase]


def test_equal_recipes_have_no_changes():
    assert RECIPE.changes(Recipe(**RECIPE.model_dump())) == []


def test_additions_and_removals_are_changes():
    bare = Recipe()
    gone = ["made from another a", "n=1, now None", "the prompt ugm/match changed", "another source"]
    assert RECIPE.changes(bare) == gone
    assert bare.changes(RECIPE) == [*gone[:1], "n=None, now 1", *gone[2:]]


def test_long_values_and_many_changes_are_cut_short():
    (phrase,) = Recipe(settings={"n": "x" * 500}).changes(Recipe(settings={"n": "y"}))
    assert len(phrase) < 80
    assert phrase.endswith("..., now y")
    assert in_words(["a", "b", "c", "d"]) == "a; b; c; d"
    assert in_words(["a", "b", "c", "d", "e", "f"]) == "a; b; c; d and 2 more"


def test_equal_rows_have_equal_content_and_others_do_not(run):
    """So stages stay current if an input is made again with the same result."""
    first = write(run)
    again = write(run, table=pa.table({"x": [1, 2, 3]}))
    assert again.content == first.content
    in_pieces = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1)])
    assert write(run, table=in_pieces).content == first.content, "the layout in memory does not matter"
    others = [pa.table({"x": [1, 2, 4]}), pa.table({"x": [1, 2]}), pa.table({"y": [1, 2, 3]}), TABLE.take([2, 1, 0])]
    contents = {first.content, *(write(run, table=table).content for table in others)}
    assert len(contents) == 1 + len(others)
    assert write(run, "ifvr").content not in contents, "another stage's"


def test_content_depends_on_the_tables_not_on_the_recipe(run):
    def made(note, recipe):
        with writing(run, "raw", recipe=recipe, settings=SETTINGS) as out:
            out.write_table("t", TABLE)
            out.info, out.summary = {"note": note}, note
        return run.artifact("raw")

    first, again = made("now", RECIPE), made("later", Recipe())
    assert again.content == first.content
    assert again.manifest.fingerprint != first.manifest.fingerprint


def test_a_writer_may_name_its_content_itself(run):
    """Weights are no table: a training identifies them itself."""
    with attempt(run) as out:
        out.write_table("t", TABLE)
        out.content = "weights-of-step-200"
    assert run.artifact("raw").content == "weights-of-step-200"


@pytest.mark.parametrize("unfinished", [False, True])
def test_an_error_about_a_missing_stage_survives_pickling(run, unfinished):
    """A Ray worker raises it; the command line adds the command that makes the stage."""
    if unfinished:
        run.fs.makedirs(run.path("frames"))
    with pytest.raises(MissingArtifactError) as caught:
        run.artifact("frames")
    assert caught.value.stage == "frames"
    assert run.full("frames") in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), copy.stage, str(copy)) == (MissingArtifactError, "frames", str(caught.value))
    assert not run.has("frames")


OLD_MANIFEST = {
    "stage": "raw",
    "schema_version": 1,
    "fingerprint": "0123456789abcdef",
    "inputs": {},
    "settings": {},
    "code_version": "0.1.0",
    "created": "2025-12-01T00:00:00+00:00",
    "tables": {},
    "info": {},
}
"""From before stages had recipes."""


def test_an_artifact_of_format_1_is_refused_with_the_remedy(run):
    run.fs.makedirs(run.path("raw"))
    run.fs.pipe_file(run.path("raw", MANIFEST), json.dumps(OLD_MANIFEST).encode())
    message = r"another version of gubs \(format 1, this one reads 2\).*--run.*delete"
    with pytest.raises(ArtifactError, match=message) as e:
        run.artifact("raw")
    assert not isinstance(e.value, MissingArtifactError), "running its command would not help"


# --- jobs ---


def job(run, **more):
    return StageJob(run, **{"stage": "mine", "kind": "grpo", "recipe": RECIPE, "settings": SETTINGS, **more})


def test_a_job_writes_its_manifest(run):
    with job(run).writing() as out:
        out.write_table("t", TABLE)
    m = run.artifact("mine").manifest
    assert (m.stage, m.kind, m.recipe, m.settings) == ("mine", "grpo", RECIPE, SETTINGS)
    assert m.fingerprint == RECIPE.fingerprint("grpo"), "another name does not change it"


def test_a_job_reads_what_its_recipe_says(run):
    write(run, "a")
    assert job(run).input("a").table("t").equals(TABLE)
    assert job(run).reads("a")
    assert not job(run).reads("b")


def test_a_job_resumes_under_its_key_only(run):
    def interrupted(key, name):
        with pytest.raises(KeyboardInterrupt), job(run).writing(resume_key=key) as out:
            files = [name for name in names(run, out.folder) if name.endswith(".mp4")]
            run.fs.pipe_file(out.path(name), b"1")
            raise KeyboardInterrupt
        return files

    assert interrupted("k", "a.mp4") == []
    assert interrupted("k", "b.mp4") == ["a.mp4"]
    assert interrupted("other", "c.mp4") == [], "files of another key are deleted"
    assert run.stages() == [], "half a stage does not count"
    with job(run).writing(resume_key="other") as out:
        assert run.fs.exists(out.path("c.mp4"))
    assert names(run, run.path("mine")) == ["c.mp4", MANIFEST], "the file with the key is gone"
    assert names(run, run.root) == ["mine"]


def test_a_job_without_a_key_starts_over(run):
    with pytest.raises(ZeroDivisionError), job(run).writing(resume_key="k") as out:
        run.fs.pipe_file(out.path("a.mp4"), b"1")
        _ = 1 / 0
    with job(run).writing() as out:
        assert not run.fs.exists(out.path("a.mp4"))
