import json
import multiprocessing
import os
import signal

import pyarrow as pa
import pytest

from gubs.artifacts import MANIFEST, Run, fingerprint, writing
from gubs.config import Settings
from gubs.errors import ArtifactError

TABLE = pa.table({"x": [1, 2, 3]})


def write(run, stage="raw", mark="m1", table=TABLE, **kwargs):
    with writing(run, stage, fingerprint=mark, settings=Settings(), inputs={"a": "b"}, **kwargs) as out:
        out.write_table("t", table)
        out.info = {"note": "n"}
    return run.artifact(stage)


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path):
    return Run(tmp_path / "r" if request.param == "local" else f"memory://{tmp_path.name}/r")


def test_round_trip_with_manifest(run):
    artifact = write(run)
    assert artifact.table("t").equals(TABLE)
    assert artifact.table("t", ["x"]).column_names == ["x"]
    m = artifact.manifest
    assert (m.stage, m.tables["t"].rows, m.inputs, m.info) == ("raw", 3, {"a": "b"}, {"note": "n"})
    assert m.settings["filters"]["max_gap_s"] == 120
    assert m.code_version.startswith("0.")
    assert run.stages() == ["raw"]
    assert [p.rsplit("/", 1)[-1] for p in run.fs.ls(run.root, detail=False)] == ["raw"], "no temporary folder is left"


def test_a_stage_may_be_a_link_to_that_of_another_run(tmp_path):
    """Several trainings stand on one data set without a copy of it."""
    write(Run(tmp_path / "data"))
    (tmp_path / "seed").mkdir()
    (tmp_path / "seed" / "raw").symlink_to(tmp_path / "data" / "raw")
    (tmp_path / "seed" / "gone").symlink_to(tmp_path / "nowhere")
    assert Run(tmp_path / "seed").stages() == ["raw"]
    assert Run(tmp_path / "seed").artifact("raw").table("t").equals(TABLE)


def test_finished_found_only_with_the_same_fingerprint(run):
    assert run.finished("raw", "m1") is None
    write(run)
    assert run.finished("raw", "m1").stage == "raw"
    assert run.finished("raw", "m1", force=True) is None
    with pytest.raises(ArtifactError, match="--force"):
        run.finished("raw", "m2")


def test_rewriting_replaces(run):
    write(run)
    other = write(run, mark="m2", table=pa.table({"x": [9]}))
    assert other.table("t")["x"].to_pylist() == [9]


def test_failure_leaves_no_artifact_and_keeps_the_old_one(run):
    with pytest.raises(ZeroDivisionError), writing(run, "raw", fingerprint="m", settings=Settings(), inputs={}) as out:
        out.write_table("t", TABLE)
        _ = 1 / 0
    assert run.stages() == []
    write(run)
    with pytest.raises(ZeroDivisionError), writing(run, "raw", fingerprint="m", settings=Settings(), inputs={}):
        _ = 1 / 0
    assert run.artifact("raw").table("t").equals(TABLE)


def test_resumable_keeps_what_an_interrupted_attempt_made(run):
    with (
        pytest.raises(ZeroDivisionError),
        writing(run, "v", fingerprint="m", settings=Settings(), inputs={}, resumable=True) as out,
    ):
        run.fs.pipe_file(out.path("a.mp4"), b"1")
        _ = 1 / 0
    with writing(run, "v", fingerprint="m", settings=Settings(), inputs={}, resumable=True) as out:
        assert run.fs.exists(out.path("a.mp4"))
    assert run.fs.exists(run.path("v", "a.mp4"))


def test_resumable_of_other_settings_starts_anew(run):
    with (
        pytest.raises(ZeroDivisionError),
        writing(run, "v", fingerprint="m", settings=Settings(), inputs={}, resumable=True) as out,
    ):
        run.fs.pipe_file(out.path("a.mp4"), b"1")
        _ = 1 / 0
    with writing(run, "v", fingerprint="other", settings=Settings(), inputs={}, resumable=True) as out:
        assert not run.fs.exists(out.path("a.mp4"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.fs.rm_file(run.path("raw", MANIFEST)), "unfinished"),
        (lambda run: run.fs.rm_file(run.path("raw", "t.parquet")), "damaged"),
        (lambda run: run.fs.pipe_file(run.path("raw", "t.parquet"), b"short"), "damaged"),
        (lambda run: run.fs.pipe_file(run.path("raw", MANIFEST), b"{}"), "not a manifest"),
        (lambda run: edit_manifest(run, stage="ifvr"), "another stage"),
        (lambda run: edit_manifest(run, schema_version=99), "schema version 99"),
        (lambda run: run.fs.rm(run.path("raw"), recursive=True), "no such artifact"),
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


def test_unknown_table_lists_the_known(run):
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
    with writing(run, "raw", fingerprint="m", settings=Settings(), inputs={}) as out:
        out.write_table("t", TABLE)
        os.kill(os.getpid(), signal.SIGKILL)


def test_fingerprint_depends_on_settings_and_inputs():
    base = fingerprint("s", {"a": 1}, {"i": "x"})
    assert base == fingerprint("s", {"a": 1}, {"i": "x"})
    assert (
        len(
            {
                base,
                fingerprint("t", {"a": 1}, {"i": "x"}),
                fingerprint("s", {"a": 2}, {"i": "x"}),
                fingerprint("s", {"a": 1}, {"i": "y"}),
            }
        )
        == 4
    )
