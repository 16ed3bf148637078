"""Files of a log in parts may have no rows: writers leave such parts where a partition is empty."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_scale import expected_raw

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables, read_source
from gubs.errors import InputError

HEADER = "user_id,video_id,timestamp,play_rate\n"
ROWS = "".join(f"u{i % 3},v{i % 4},{1_700_000_000 + i},0.5\n" for i in range(12))

EMPTY = {
    "nothing.csv": b"",
    "nothing.jsonl": b"",
    "line.csv": b"\n",
    "mark.csv": b"\xef\xbb\xbf\n",
    "header.csv": HEADER.encode(),
    "header.tsv": HEADER.replace(",", "\t").encode(),
    "bare.csv.gz": b"",
    "nothing.csv.gz": gzip.compress(b""),
    "nothing.jsonl.gz": gzip.compress(b""),
    "header.csv.gz": gzip.compress(HEADER.encode()),
    "schema.parquet": None,
}
"""Parts without rows: contents by name; None: a Parquet file with a schema only."""


def put(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = EMPTY[name]
    if content is not None:
        (folder / name).write_bytes(content)
    else:
        schema = pa.schema({c: pa.string() for c in HEADER.strip().split(",")})
        pq.write_table(schema.empty_table(), folder / name)


def read(folder: Path, **settings: object) -> SourceTables:
    return read_source(SourceSettings(kind="logs", path=str(folder), **settings))


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, **settings)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A log in two parts; others fit between them."""
    parts = tmp_path / "logs" / "interactions"
    parts.mkdir(parents=True)
    (parts / "a.csv").write_text(HEADER + ROWS)
    (parts / "z.csv").write_text(HEADER + ROWS.replace("u", "w"))
    return parts.parent


@pytest.mark.parametrize("name", EMPTY)
def test_a_part_without_rows_is_counted_and_changes_nothing_else(folder: Path, name: str) -> None:
    without = read(folder).interactions
    put(folder / "interactions", name)
    tables = read(folder)
    assert tables.interactions.drop_columns("interaction_id").equals(without.drop_columns("interaction_id"))
    count = tables.files[f"interactions/{name}"]
    assert (count.rows_in, count.rows_out, count.rejected) == (0, 0, {})
    assert f"1 of 3 files of interactions have no rows: interactions/{name}." in tables.notes


def test_parts_without_rows_in_a_large_log(folder: Path, tmp_path: Path) -> None:
    assert_large(folder, tmp_path / "r")


def test_parts_without_rows_in_a_large_log_on_ray(folder: Path, tmp_path: Path, ray_local: None) -> None:
    assert_large(folder, tmp_path / "r", "data.ray_from_rows=0")


def assert_large(folder: Path, run: Path, *more: str) -> None:
    for name in EMPTY:
        put(folder / "interactions", name)
    settings = load_settings("tiny", ["source.kind=logs", f"source.path={folder}", "data.part_rows=12", *more])
    stages.make(["raw"], Run(run), settings)
    raw = Run(run).artifact("raw")
    for name, table in expected_raw(settings).items():
        assert raw.table(name).equals(table), name
    assert len(raw.parts("interactions")) > 1
    assert raw.manifest.info["files"]["interactions/nothing.csv"] == {"rows_in": 0, "rows_out": 0, "rejected": {}}
    assert raw.manifest.tables["interactions"].rows == 24
    assert any(note.startswith("11 of 13 files of interactions have no rows") for note in raw.manifest.info["notes"])


@pytest.mark.parametrize(
    "names", [["header.csv", "schema.parquet"], ["nothing.csv", "header.csv"], ["nothing.csv"] * 2]
)
def test_a_log_whose_parts_are_all_empty_is_refused(tmp_path: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        put(tmp_path / "interactions", name)
        (tmp_path / "interactions" / name).rename(tmp_path / "interactions" / f"{number}-{name}")
    message = refusal(tmp_path)
    assert message.startswith("interactions (2 files): ")
    assert "copy" in message
    assert ("none of them has a row" in message) or ("all files are empty" in message)


def test_an_empty_file_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("")
    assert refusal(tmp_path) == "interactions.csv: the file is empty; copy it again from its origin"
    (tmp_path / "interactions.csv").write_text(HEADER)
    assert "interactions.csv: row 1: a header and no rows below it" in refusal(tmp_path)
    (tmp_path / "interactions.csv").write_text(HEADER + ROWS)
    (tmp_path / "users.csv").write_text("")
    assert refusal(tmp_path) == "users.csv: the file is empty; copy it again from its origin"


def test_an_empty_file_is_no_parquet_file(folder: Path) -> None:
    """No writer leaves one: a Parquet file without rows has a schema."""
    (folder / "interactions" / "part.parquet").write_bytes(b"")
    assert "interactions/part.parquet: the file is empty" in refusal(folder)


def test_tables_of_users_and_videos_may_have_such_parts_too(folder: Path) -> None:
    for table in ("users", "videos"):
        (folder / table).mkdir()
        key = table.removesuffix("s")
        (folder / table / "a.csv").write_text(f"{key}_id,tags\n{key[0]}1,tea\n")
        (folder / table / "b.csv").write_text("")
        (folder / table / "c.csv").write_text(f"{key}_id,tags\n")
    tables = read(folder)
    assert [u["tags"] for u in tables.users.to_pylist() if u["user_id"] == "u1"] == [["tea"]]
    for table in ("users", "videos"):
        assert f"2 of 3 files of {table} have no rows: {table}/b.csv, {table}/c.csv." in tables.notes
        (folder / table / "a.csv").write_text("")
        assert f"{table} (3 files): none of them has a row" in refusal(folder)
        (folder / table / "a.csv").write_text(f"{table.removesuffix('s')}_id,tags\nx,tea\n")


def test_text_after_a_long_blank_start_is_not_overlooked(folder: Path) -> None:
    lines = " " * 100_000 + "\n" + '{"user_id": "u", "video_id": "v", "play_rate": 0.5}\n'
    (folder / "interactions" / "b.jsonl").write_text(lines)
    assert read(folder, max_bad_rows=1.0).files["interactions/b.jsonl"].rows_out == 1
