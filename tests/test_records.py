import dataclasses

import pyarrow as pa
import pytest

from gubs import records
from gubs.records import (
    SCHEMAS,
    Example,
    GroupMember,
    GroupProfile,
    Interaction,
    SkipTruth,
    User,
    Video,
    conform,
    play_rate,
)

TABLES = {
    "users": User,
    "videos": Video,
    "interactions": Interaction,
    "truth": SkipTruth,
    "groups": GroupProfile,
    "examples": Example,
}


@pytest.mark.parametrize(("name", "record"), TABLES.items())
def test_records_and_schemas_have_the_same_fields(name, record):
    assert [f.name for f in dataclasses.fields(record)] == SCHEMAS[name].names


def test_round_trip_through_a_table():
    user = User("u1", 30, None, "nurse", {"city size": "city"}, ["cooking"])
    table = pa.Table.from_pylist([user.to_row() | {"other": list(user.other.items())}], schema=SCHEMAS["users"])
    assert list(User.from_table(table)) == [user]
    group = GroupProfile("g1", "n", "f", "u1", 0.5, "i", None, [GroupMember("u1", 1.0, True, "r")], "v1")
    table = pa.Table.from_pylist([group.to_row()], schema=SCHEMAS["groups"])
    assert list(GroupProfile.from_table(table)) == [group]


@pytest.mark.parametrize(
    ("watched", "duration", "expected"),
    [(5, 10, 0.5), (25, 10, 1.0), (0, 10, 0.0), (5, 0, None), (5, None, None), (None, 10, None), (-1, 10, None)],
)
def test_play_rate_is_capped_and_null_where_unknown(watched, duration, expected):
    assert play_rate(watched, duration) == expected


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
    code = f"import sys, gubs.records, gubs.config, gubs.artifacts; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert records.FAST_SKIP_BELOW == 0.3
