import dataclasses

import pyarrow as pa
import pytest

from gubs import records
from gubs.records import SCHEMAS, Example, GroupMember, GroupProfile, Interaction, SkipTruth, User, Video, conform

TABLES = {
    "users": (User, ["user_id"]),
    "videos": (Video, ["video_id"]),
    "interactions": (Interaction, ["interaction_id", "user_id", "video_id", "task"]),
    "truth": (SkipTruth, ["interaction_id", "cause", "mechanism"]),
    "groups": (GroupProfile, ["group_id"]),
    "examples": (Example, ["example_id", "task", "split", "user_id", "video_id", "interaction_id"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_records_and_schemas_have_the_same_fields(name):
    record, required = TABLES[name]
    assert [f.name for f in dataclasses.fields(record)] == SCHEMAS[name].names
    assert [f.name for f in SCHEMAS[name] if not f.nullable] == required


def test_round_trip_through_a_table():
    user = User("u1", 30, None, "nurse", {"city size": "city"}, ["cooking"])
    table = pa.Table.from_pylist([user.to_row() | {"other": list(user.other.items())}], schema=SCHEMAS["users"])
    assert list(User.from_table(table)) == [user]
    group = GroupProfile("g1", "n", "f", "u1", 0.5, "i", None, [GroupMember("u1", 1.0, True, "r")], "v1")
    table = pa.Table.from_pylist([group.to_row()], schema=SCHEMAS["groups"])
    assert list(GroupProfile.from_table(table)) == [group]


def test_conform_fills_nulls_and_refuses_missing_keys():
    table = conform(pa.table({"video_id": ["v"]}), "videos")
    assert table.schema.equals(SCHEMAS["videos"])
    assert table["title"].to_pylist() == [None]
    with pytest.raises(KeyError, match="video_id"):
        conform(pa.table({"title": ["t"]}), "videos")


def test_importing_the_package_stays_light():
    import subprocess
    import sys

    heavy = "('torch', 'ray', 'vllm', 'transformers')"
    light = "gubs.records, gubs.config, gubs.artifacts, gubs.stages, gubs.cli"
    code = f"import sys, {light}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert records.FAST_SKIP_BELOW == 0.3
