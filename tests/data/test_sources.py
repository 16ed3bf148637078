"""The sources of logs: bad input of every kind, the meaning of each source, and the real data where it exists."""

import gzip
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables, movielens, read_source
from gubs.data.sources.formats import TextFormat, open_table
from gubs.data.sources.log import Findings, first_times
from gubs.data.sources.reading import Column, Sheet, clicks, codes, constant, duplicated, read_sheet
from gubs.errors import InputError
from gubs.records import SCHEMAS

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real data (../shared/data) is missing")

COLUMNS = (
    Column("user_id", "id", nullable=False),
    Column("watch_s", "number", minimum=0),
    Column("title"),
)


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(path: Path, columns=COLUMNS, max_bad: float = 1.0, **more) -> Sheet:
    sheet = read_sheet(path, columns, max_bad, **more)
    assert sheet.rows_in == sheet.table.num_rows + sum(sheet.rejected.values())
    return sheet


def rejects(tables: Sheet | SourceTables) -> list[tuple]:
    table = pa.concat_tables(tables.rejects) if isinstance(tables, Sheet) else tables.rejects
    return [(r["row"], r["column"], r["cause"]) for r in table.to_pylist()]


def rows(table: pa.Table, *names: str) -> list[tuple]:
    return list(zip(*(table[n].to_pylist() for n in names), strict=True))


def refused(call, *words: str) -> str:
    """Checks that the call raises an InputError whose message contains all the words; case matters."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message
    return message


# Reading: what must be accepted


def test_text_with_bom_crlf_quotes_and_line_breaks_is_read_with_true_line_numbers(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffuser_id,watch_s,title\r\n1,2.5,"a, ""b""\r\nc"\r\n2,x,d\r\n\r\n3,,\r\n')
    sheet = read(path)
    assert rows(sheet.table, *(c.name for c in COLUMNS)) == [("1", 2.5, 'a, "b"\r\nc'), ("3", None, None)]
    assert sorted(rejects(sheet)) == [(4, "watch_s", "not a finite number"), (5, None, "blank line")]
    assert sheet.lines.tolist() == [2, 6]


def test_ragged_rows_are_kept_apart_with_their_line_and_text(tmp_path):
    path = write(tmp_path / "a.csv", "user_id,watch_s,title\n1,2,a\n2,3\n3,4,b,c,d\n4,5,e\n")
    sheet = read(path)
    assert sheet.column("user_id").to_pylist() == ["1", "4"]
    assert rejects(sheet) == [(3, None, "too few values"), (4, None, "too many values")]
    assert sheet.rejects[1]["value"].to_pylist() == ["3,4,b,c,d"]
    assert sheet.lines.tolist() == [2, 5]


@pytest.mark.parametrize("opening", ['2,3,"open\n3,4,c\n4,5,d\n', '2,3,"open\n3,4,c\n4,5,"d"\n'])
def test_an_open_quote_does_not_swallow_rows_silently(tmp_path, opening):
    sheet = read(write(tmp_path / "a.csv", "user_id,watch_s,title\n1,2,a\n" + opening))
    assert sheet.column("user_id").to_pylist() == ["1"]
    assert rejects(sheet) == [(3, None, "quote left open")]
    assert "4,5" in sheet.rejects[0]["value"][0].as_py()


def test_an_empty_quoted_value_at_the_end_is_not_an_open_quote(tmp_path):
    sheet = read(write(tmp_path / "a.csv", 'user_id,watch_s,title\n1,2,""'))
    assert sheet.rejected == {}


def test_one_bad_byte_costs_one_row(tmp_path):
    good = b"".join(b"%d,1,t%d\n" % (i, i) for i in range(1000))
    sheet = read(write(tmp_path / "a.csv", b"user_id,watch_s,title\n" + good + b"x,1,caf\xe9\n" + good))
    assert rejects(sheet) == [(1002, "title", "not UTF-8 text")]
    assert sheet.rejects[0]["value"].to_pylist() == ["caf\\xe9"]
    assert sheet.table.num_rows == 2000


def test_latin_1_is_read_where_the_source_says_so(tmp_path):
    path = write(tmp_path / "a.item", "1|Les Misérables\n".encode("latin-1"))
    text = TextFormat("|", ("user_id", "title"), quoted=False, encoding="latin-1")
    sheet = read(path, (COLUMNS[0], COLUMNS[2]), text=text)
    assert sheet.column("title").to_pylist() == ["Les Misérables"]


def test_cells_that_are_no_numbers_are_rejected(tmp_path):
    cells = ["1", "nan", "inf", "-1", "1e400", "0x10", " 7 ", "1e2", "NULL", "²"]
    path = write(tmp_path / "a.csv", "user_id,watch_s,title\n" + "".join(f"u,{c},t\n" for c in cells))
    sheet = read(path)
    assert sheet.column("watch_s").to_pylist() == [1, None, 7, 100, None]
    assert sorted(rejects(sheet)) == [
        (4, "watch_s", "not a finite number"),
        (5, "watch_s", "below 0"),
        (6, "watch_s", "not a finite number"),
        (7, "watch_s", "not a finite number"),
        (11, "watch_s", "not a finite number"),
    ]


def test_ids_that_were_stored_as_floats(tmp_path):
    path = write(tmp_path / "a.csv", "user_id,watch_s,title\n12.0,1,a\n1.65e+12,1,b\n007,1,c\nNaN,1,d\n v1.10 ,1,e\n")
    sheet = read(path)
    assert sheet.column("user_id").to_pylist() == ["12", "007", "v1.10"]
    assert rejects(sheet) == [(3, "user_id", "not an identifier"), (5, "user_id", "missing value")]


def test_huge_float_ids_in_parquet_are_rejected_as_they_cannot_be_told_apart(tmp_path):
    pq.write_table(pa.table({"user_id": [1.0, 2.0**60, None], "watch_s": [1, 2, 3]}), tmp_path / "a.parquet")
    sheet = read(tmp_path / "a.parquet", COLUMNS[:2])
    assert sheet.column("user_id").to_pylist() == ["1"]
    assert sorted(rejects(sheet)) == [(2, "user_id", "not an identifier"), (3, "user_id", "missing value")]


@pytest.mark.parametrize(
    "cell",
    ["1651363200", "1651363200000", "1651363200000000", "1.6513632e9", "2022-05-01", "2022-05-01T08:00:00+08:00"],
)
def test_every_unit_gives_the_same_time(tmp_path, cell):
    path = write(tmp_path / "a.csv", f"t\n{cell}\n1651363200\nlater\n2022-13-01\n5\n")
    sheet = read(path, (Column("t", "time"),))
    assert sheet.column("t").to_pylist() == [1651363200000] * 2
    assert [r for r, _, _ in rejects(sheet)] == [4, 5, 6]


def test_whole_numbers_beyond_floats_stay_exact_beside_a_bad_one(tmp_path):
    sheet = read(write(tmp_path / "a.csv", f"n\n{2**60 + 1}\n3.0\n2.5\n"), (Column("n", "integer"),))
    assert sheet.column("n").to_pylist() == [2**60 + 1, 3]
    assert rejects(sheet) == [(4, "n", "not a whole number")]


def test_flags_and_lists(tmp_path):
    lines = ['{"f": "Yes", "l": ["a", "b"]}', '{"f": "0", "l": ["c"]}', '{"f": "maybe", "l": []}']
    sheet = read(write(tmp_path / "a.jsonl", "\n".join(lines)), (Column("f", "flag"), Column("l", "texts")))
    assert rows(sheet.table, "f", "l") == [(True, ["a", "b"]), (False, ["c"])]
    assert rejects(sheet) == [(3, "f", "neither true nor false")]
    sheet = read(write(tmp_path / "b.csv", 'l\na | b\n"[""c"",""d|e""]"\n[c\n'), (Column("l", "texts"),))
    assert sheet.column("l").to_pylist() == [["a", "b"], ["c", "d|e"]]
    assert rejects(sheet) == [(4, "l", "not a list of texts")]


def test_bad_lines_of_json_are_rejected_and_good_ones_kept(tmp_path):
    text = b'{"user_id": 1, "watch_s": 2}\n\n{"user_id": 2, "watch_s"\n[3]\n{"user_id": "\xff"}\n{"user_id": 6}\n'
    sheet = read(write(tmp_path / "a.jsonl", text), COLUMNS[:2])
    assert rows(sheet.table, "user_id", "watch_s") == [("1", 2.0), ("6", None)]
    assert [(r, c) for r, _, c in rejects(sheet)] == [
        (2, "blank line"),
        (3, "not JSON"),
        (4, "not a JSON object"),
        (5, "not UTF-8 text"),
    ]
    assert sheet.lines.tolist() == [1, 6]


@pytest.mark.parametrize("cell", [r"a\ud800", r"\uDC00b"])
def test_half_a_character_is_no_text(tmp_path, cell):
    """As in a title that was cut in the middle of an emoji. Arrow and Python differ about it, so both ways are read."""
    lines = [r'{"user_id": "1", "title": "\ud83d\ude00"}', f'{{"user_id": "2", "title": "{cell}"}}', '{"user_id": "3"}']
    for more in ([], ["[3]"]):
        sheet = read(write(tmp_path / "a.jsonl", "\n".join([*lines, *more])), (COLUMNS[0], COLUMNS[2]))
        assert rows(sheet.table, "user_id", "title") == [("1", "\U0001f600"), ("3", None)]
        assert rejects(sheet)[0][0] == 2


def test_gzipped_text_is_read(tmp_path):
    write(tmp_path / "a.csv.gz", gzip.compress(b"user_id,watch_s,title\n1,2,a\n"))
    write(tmp_path / "b.jsonl.gz", gzip.compress(b'{"user_id": "1", "watch_s": 2.0, "title": "a"}\n'))
    assert read(tmp_path / "a.csv.gz").table.to_pylist() == read(tmp_path / "b.jsonl.gz").table.to_pylist()


def test_delimiters_of_two_characters_survive_the_border_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("gubs.data.sources.formats.BLOCK_BYTES", 13)
    path = write(tmp_path / "a.dat", "".join(f"{i}::film: {i}\n" for i in range(100)))
    sheet = read(path, (COLUMNS[0], COLUMNS[2]), text=TextFormat("::", ("user_id", "title"), quoted=False))
    assert rows(sheet.table, "user_id", "title") == [(str(i), f"film: {i}") for i in range(100)]


def test_a_line_break_of_two_bytes_survives_the_border_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("gubs.data.sources.formats.BLOCK_BYTES", 101)
    text = "user_id,watch_s,title\r\n" + "".join(f'{i},1,"a\r\nb"\r\n' for i in range(200))
    sheet = read(write(tmp_path / "a.csv", text))
    assert set(sheet.column("title").to_pylist()) == {"a\r\nb"}
    assert sheet.lines.tolist() == list(range(2, 402, 2))


def test_line_numbers_hold_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("gubs.data.sources.formats.BLOCK_BYTES", 300)
    lines, bad = ["user_id,watch_s,title"], []
    for i in range(300):
        if i % 17 == 5:
            bad.append(sum(x.count("\n") + 1 for x in lines) + 1)
            lines.append(f"{i},bad,t" if i % 2 else f"{i},too,many,values")
        lines.append(f'{i},1,"two\nlines"' if i % 7 == 3 else f"{i},1,one")
    sheet = read(write(tmp_path / "a.csv", "\n".join(lines) + "\n"))
    assert sheet.table.num_rows == 300
    assert sorted(r for r, _, _ in rejects(sheet)) == bad


def test_duplicates_are_the_later_rows_and_nulls_are_equal():
    a, b = pa.chunked_array([["x", "x"], ["x", None, None]]), pa.chunked_array([[1, 2, 1, None, None]])
    assert duplicated([a, b]).tolist() == [False, False, True, False, True]


def test_a_column_in_many_pieces_costs_little_more_than_a_whole_one():
    """A part of a large log is put together from as many pieces as the log has files."""
    values = [f"v{n * 7919 % 400_000}" for n in range(400_000)]
    pieces = pa.chunked_array([pa.array(values[n : n + 2000]) for n in range(0, len(values), 2000)])
    began = time.process_time()
    assert len(set(codes(pieces).tolist())) == 400_000
    assert time.process_time() - began < 3, "with a dictionary for each piece it takes more than ten times as long"


# Reading: what must be refused, with file, row, column and remedy


def test_refuses_a_missing_file(tmp_path):
    refused(lambda: read(tmp_path / "a.csv"), "a.csv", "no such file", "source.path")


@pytest.mark.parametrize("text", [b"", b"\n\n", gzip.compress(b"")], ids=["nothing", "blank lines", "gzipped nothing"])
def test_refuses_an_empty_file(tmp_path, text):
    path = write(tmp_path / ("a.csv.gz" if text[:1] == b"\x1f" else "a.csv"), text)
    refused(lambda: read(path), path.name, "empty", "copy it again")


@pytest.mark.parametrize("text", ["user_id,watch_s,title", "user_id,watch_s,title\n"])
def test_refuses_a_header_alone(tmp_path, text):
    refused(lambda: read(write(tmp_path / "a.csv", text)), "a.csv", "row 1", "no rows", "copy the file again")


def test_refuses_a_missing_column(tmp_path):
    path = write(tmp_path / "a.csv", "uid;watch_s\n1;2\n")
    refused(lambda: read(path), "a.csv", "row 1", "'user_id'", "'uid;watch_s'", "source.columns.user_id")


def test_refuses_a_header_that_names_a_column_twice(tmp_path):
    path = write(tmp_path / "a.csv", "user_id,watch_s,watch_s\n1,2,3\n")
    refused(lambda: read(path), "a.csv", "row 1", "'watch_s'", "twice", "rename")


def test_refuses_utf_16_and_binaries(tmp_path):
    path = write(tmp_path / "a.csv", "user_id\n1\n".encode("utf-16"))
    refused(lambda: read(path), "a.csv", "row 1", "UTF-16", "save it as UTF-8")
    path = write(tmp_path / "b.csv", b"PK\x03\x04\0\0\0")
    refused(lambda: read(path), "b.csv", "row 1", "not a text file", ".parquet")
    path = write(tmp_path / "c.csv", b"user\xe9,b\n1,2\n")
    refused(lambda: read(path), "c.csv", "row 1", "header", "save the file as UTF-8")


def test_a_nul_byte_costs_its_row_and_not_the_file(tmp_path):
    path = write(tmp_path / "a.csv", b"user_id,watch_s,title\n" + b"1,2,a\n" * 60 + b"1,2,a\0b\n" + b"1,2,c\n" * 60)
    opened = open_table(path)
    batches = [(batch.num_rows, flags) for batch, flags in opened.batches(opened.header)]
    assert sum(rows for rows, _ in batches) == 121
    marked = np.concatenate([np.broadcast_to(flags["NUL byte"], rows) for rows, flags in batches])
    assert np.flatnonzero(marked).tolist() == [60]


def test_refuses_damaged_files(tmp_path):
    path = write(tmp_path / "a.csv.gz", gzip.compress(b"user_id,watch_s,title\n" + b"1,2,a\n" * 99999)[:-200])
    refused(lambda: read(path), "a.csv.gz", "copy it again")
    path = write(tmp_path / "a.parquet", b"PAR1 and no more")
    refused(lambda: read(path), "a.parquet", "not a Parquet file", "copy it again")
    path = write(tmp_path / "a.jsonl", b"no json\n")
    refused(lambda: read(path), "a.jsonl", "row 1", "no json", "one object per line")
    refused(lambda: read(write(tmp_path / "a.xls", b"x")), "a.xls", "unknown file type", ".parquet")


def test_refuses_more_malformed_rows_than_allowed_and_shows_the_first(tmp_path):
    path = write(tmp_path / "a.csv", "user_id,watch_s,title\n" + "1,2,a\n" * 97 + "1,soon,a\n,2,a\n1,2\n")
    assert read(path, max_bad=0.03).table.num_rows == 97
    refused(
        lambda: read(path, max_bad=0.029),
        "a.csv",
        "3 of 100 rows",
        "row 99, column 'watch_s': not a finite number ('soon')",
        "row 100, column 'user_id': missing value",
        "row 101: too few values",
        "raise source.max_bad_rows",
    )


# MovieLens


def ml(folder: Path, **more) -> SourceTables:
    return read_source(SourceSettings(kind="movielens", path=str(folder), **more))


def ml_100k(folder: Path) -> Path:
    write(folder / "u.data", "1\t10\t4\t881250949\n1\t11\t2\t881250950\n2\t10\t3\t881250951\n1\t10\t1\t881250999\n")
    flags = ["0"] * 19
    drama, none = flags.copy(), flags.copy()
    drama[8] = drama[14] = none[0] = "1"
    films = [["10", "Misérables, Les (1995)", "01-Jan-1995", "", "http://x", *drama]]
    films += [["11", "unknown", "", "", "", *none]]
    write(folder / "u.item", "\n".join("|".join(f) for f in films).encode("latin-1") + b"\n")
    write(folder / "u.user", "1|24|M|technician|85711\n2|53|F|other|94043\n")
    return folder


def test_movielens_100k(tmp_path):
    tables = ml(ml_100k(tmp_path))
    assert rows(tables.videos, "title", "tags") == [("Misérables, Les (1995)", ["Drama", "Romance"]), (None, [])]
    assert rows(tables.users, "age", "gender", "occupation") == [(24, "male", "technician"), (53, "female", "other")]
    assert rows(tables.interactions, "video_id", "timestamp", "rating", "liked", "disliked", "clicked", "task") == [
        ("10", 881250949000, 4, True, False, True, "click"),
        ("11", 881250950000, 2, False, True, True, "click"),
        ("10", 881250951000, 3, False, False, True, "click"),
    ]
    assert rejects(tables) == [(4, "video_id", "duplicate")]
    assert tables.files["u.data"].rejected == {"duplicate": 1}


def test_movielens_1m_decodes_ages_and_occupations(tmp_path):
    write(tmp_path / "ratings.dat", "1::10::5::978300760\n9::12::1::978300761\n")
    write(tmp_path / "movies.dat", "10::Star Wars: A (1977)::Action|Sci-Fi\n11::É (1999)::Drama\n".encode("latin-1"))
    write(tmp_path / "users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n")
    tables = ml(tmp_path)
    assert rows(tables.users, "user_id", "age", "gender", "occupation") == [
        ("1", 16, "female", "K-12 student"),
        ("2", 60, "male", "self-employed"),
        ("9", None, None, None),
    ]
    assert dict(tables.users["other"][0].as_py())["age range"] == "under 18"
    assert rows(tables.videos, "video_id", "title", "tags") == [
        ("10", "Star Wars: A (1977)", ["Action", "Sci-Fi"]),
        ("11", "É (1999)", ["Drama"]),
        ("12", None, []),
    ]
    assert "1 users occur in interactions only: they are known by their id alone." in tables.notes
    write(tmp_path / "users.dat", "1::F::7::10::48067\n")
    assert rejects(ml(tmp_path, max_bad_rows=1)) == [(1, "age", "unknown age code")]
    refused(lambda: ml(tmp_path), "users.dat", "row 1", "'age'", "unknown age code", "source.max_bad_rows")


def test_movielens_csv_edition_has_no_demographics(tmp_path):
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.5,1147880044\n1,10,x,1147880044\n")
    write(tmp_path / "movies.csv", 'movieId,title,genres\n10,"A, ""B"" (2000)",Drama|War\n11,C,(no genres listed)\n')
    tables = ml(tmp_path, max_bad_rows=0.5)
    assert rows(tables.videos, "title", "tags") == [('A, "B" (2000)', ["Drama", "War"]), ("C", [])]
    assert rows(tables.users, "user_id", "age", "tags") == [("1", None, [])]
    assert any("no demographics" in n for n in tables.notes)
    assert rejects(tables) == [(3, "rating", "not a finite number")]


def test_movielens_refuses_another_folder_and_a_rating_out_of_range(tmp_path):
    refused(lambda: ml(tmp_path), str(tmp_path), "no MovieLens edition", "source.path")
    write(ml_100k(tmp_path) / "u.data", "1\t10\t9\t881250949\n")
    refused(lambda: ml(tmp_path), "u.data", "row 1", "'rating'", "above 5", "source.max_bad_rows")


def test_constant_columns_cost_no_memory():
    before = pa.total_allocated_bytes()
    column = constant(None, 50_000_000, pa.float64())
    assert len(column) == 50_000_000
    assert column.null_count == 50_000_000
    assert pa.total_allocated_bytes() - before < 10_000_000


@needs_real
def test_movielens_100k_real():
    tables = ml(REAL / "ml-100k")
    assert (tables.users.num_rows, tables.videos.num_rows, tables.interactions.num_rows) == (943, 1682, 100_000)
    assert tables.rejects.num_rows == 0
    stars = tables.interactions
    rated = stars.group_by("user_id").aggregate([("rating", "count"), ("liked", "sum"), ("disliked", "sum")])
    assert pc.sum(pc.greater_equal(rated["rating_count"], 50)).as_py() == 568
    liked, disliked = pc.greater_equal(rated["liked_sum"], 10), pc.greater_equal(rated["disliked_sum"], 10)
    assert pc.sum(liked).as_py() == 897
    assert pc.sum(pc.and_(liked, disliked)).as_py() == 436
    assert any("é" in (t or "") for t in tables.videos["title"].to_pylist())


# Amazon


def az(folder: Path, **more) -> SourceTables:
    return read_source(SourceSettings(kind="amazon", path=str(folder), **more))


REVIEWS = (
    "Id,Title,Price,User_id,profileName,review/helpfulness,review/score,review/time,review/summary,review/text\n"
    'B1,"One, two",,A1,x,0/0,5.0,940636800,s,"long\ntext"\n'
    "B2,Three,,A1,x,0/0,1.0,940636801,s,t\n"
    "B2,Three,,,x,0/0,1.0,940636801,s,t\n"
    "B2,Three,,A1,x,0/0,1.0,940636801,s,t\n"
)


def test_amazon_reviews(tmp_path):
    write(tmp_path / "Books_rating.csv", REVIEWS)
    books = "Title,categories\n\"One, two\",['Fiction']\nFour,['War']\n,['War']\nThree,\n"
    write(tmp_path / "books_data.csv", books)
    tables = az(tmp_path)
    assert rows(tables.interactions, "user_id", "video_id", "rating", "liked", "disliked", "timestamp") == [
        ("A1", "B1", 5, True, False, 940636800000),
        ("A1", "B2", 1, False, True, 940636801000),
    ]
    assert rows(tables.videos, "video_id", "title", "tags") == [("B1", "One, two", ["Fiction"]), ("B2", "Three", [])]
    assert sorted(rejects(tables)) == [
        (3, "title", "not reviewed"),
        (4, "title", "no title"),
        (5, "user_id", "no user"),
        (6, "video_id", "duplicate"),
    ]


def windows(folder: Path, train: str, test: str = '7,"[5, 6]",1519603200\n') -> Path:
    head = "user_id,item_ids,timestamp\n"
    write(folder / "train.csv", head + train)
    write(folder / "test.csv", head + test)
    write(folder / "id2name4Rec.json", json.dumps({str(i): f"Book {i} &amp; more" for i in range(1, 10)}))
    return folder


def test_amazon_windows_are_joined_to_one_sequence_per_user(tmp_path):
    train = '7,"[1, 2, 3]",940636800\n8,"[9, 9]",940636800\n7,"[2, 3, 4]",950636800\n7,"[2, 3, 4]",950636800\n'
    tables = az(windows(tmp_path, train))
    assert rows(tables.interactions, "interaction_id", "user_id", "video_id")[:4] == [
        ("7-0", "7", "1"),
        ("7-1", "7", "2"),
        ("7-2", "7", "3"),
        ("7-3", "7", "4"),
    ]
    books = [v for u, v in rows(tables.interactions, "user_id", "video_id") if u == "7"]
    assert books == ["1", "2", "3", "4", "5", "6"]
    assert rejects(tables) == [(5, "items", "duplicate")]
    assert tables.interactions["timestamp"].null_count == tables.interactions.num_rows
    assert tables.videos["title"][0].as_py() == "Book 1 & more"
    assert any(n.startswith("1 windows do not overlap") for n in tables.notes)


def test_amazon_refuses(tmp_path):
    refused(lambda: az(tmp_path), str(tmp_path), "Books_rating.csv", "train.csv", "source.path")
    windows(tmp_path, '7,"[1, 2",940636800\n')
    refused(lambda: az(tmp_path), "train.csv", "row 2", "'item_ids'", "not a list of texts", "source.max_bad_rows")
    windows(tmp_path, '7,"[1, 2]",940636800\n')
    write(tmp_path / "id2name4Rec.json", '{"1":\n "a" "b"}')
    refused(lambda: az(tmp_path), "id2name4Rec.json", "row 2", "not JSON", "copy it again")
    write(tmp_path / "Books_rating.csv", REVIEWS)
    refused(lambda: az(tmp_path), "both reviews", "train.csv", "folder of their own")


def linked(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).symlink_to(REAL / "amazon-books" / name)
    return folder


@needs_real
def test_amazon_reviews_real(tmp_path):
    tables = az(linked(tmp_path, ["Books_rating.csv", "books_data.csv"]))
    assert tables.files["Books_rating.csv"].rejected == {"no user": 313, "duplicate": 5, "quote left open": 1}
    assert tables.files["Books_rating.csv"].rows_in == 1424
    assert tables.interactions.num_rows == 1105
    assert (1425, None, "quote left open") in rejects(tables)  # the file is cut in the middle of its last review


@needs_real
def test_amazon_sequences_real(tmp_path):
    tables = az(linked(tmp_path, ["train.csv", "test.csv", "id2name4Rec.json"]))
    assert (tables.users.num_rows, tables.videos.num_rows) == (14_585, 6_344)
    assert tables.interactions.num_rows == 136_952
    assert sum(c.rows_in for c in tables.files.values()) == 39_443
    assert tables.files["train.csv"].rejected == {"duplicate": 4}


# KuaiRand

LOG = "user_id,video_id,time_ms,is_click,is_like,is_hate,play_time_ms,duration_ms,tab\n"


def kr_folder(folder: Path, log: str) -> Path:
    write(folder / "log_standard_4_22_to_5_08_pure.csv", LOG + log)
    head = "video_id,author_id,video_type,upload_type,video_duration,music_type,tag\n"
    write(
        folder / "video_features_basic_pure.csv",
        head + '5,77,AD,LongImport,10000.0,9.0,"39,68"\n6,78,NORMAL,UNKNOWN,,,\n',
    )
    head = "user_id,user_active_degree,is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range"
    body = '1,full_active,-124,1,500+,"[1w,10w)","[5,30)",730+\n2,UNKNOWN,1,0,"(10,50]",0,0,8-14\n'
    write(folder / "user_features_pure.csv", f"{head},friend_user_num_range,register_days_range\n{body}")
    return folder


def kr(folder: Path, **more) -> SourceTables:
    return read_source(SourceSettings(kind="kuairand", path=str(folder), **more))


GOOD_LOG = (
    "1,5,1650812741436,1,0,0,30000,10000,1\n"
    "1,5,1650812741436,1,0,0,30000,10000,1\n"
    "1,6,1650812751436,0,0,1,1000,10000,4\n"
    "2,5,1650812741436,1,1,0,0,10000,0\n"
    "2,6,1650812741437,1,1,0,0,0,1\n"
    "2,6,1650812741438,1,1,0,0,5000,8\n"
)


def test_kuairand_tabs_play_rates_and_causes(tmp_path):
    tables = kr(kr_folder(tmp_path, GOOD_LOG))
    assert rows(tables.interactions, "user_id", "task", "play_rate", "watch_s", "clicked", "liked", "disliked") == [
        ("1", "sequential", 1.0, 30.0, None, False, False),
        ("1", "sequential", 0.1, 1.0, None, False, True),
        ("2", "click", 0.0, 0.0, True, True, False),
    ]
    assert rejects(tables) == [
        (3, "time_ms", "duplicate"),
        (6, "duration_ms", "no duration"),
        (7, "tab", "tab not used"),
    ]
    assert any("two-minute filter cannot be applied" in n for n in tables.notes)
    assert tables.interactions["prev_op_gap_s"].null_count == 3


def test_kuairand_describes_users_and_videos_readably(tmp_path):
    tables = kr(kr_folder(tmp_path, GOOD_LOG))
    tags = tables.videos["tags"].to_pylist()
    assert tags == [
        ["tag 39", "tag 68", "advertisement", "upload: long import", "music type 9", "author 77"],
        ["author 78"],
    ]
    assert rows(tables.videos, "title", "duration_s") == [(None, 10.0), (None, None)]
    first, second = (dict(o) for o in tables.users["other"].to_pylist())
    assert first["fans"] == "10k to under 100k"
    assert first["accounts followed"] == "over 500"
    assert first["makes"] == "videos"
    assert "activity" not in second
    assert second["accounts followed"] == "over 10, up to 50"


def test_kuairand_interest_tags_come_from_before_the_log_only(tmp_path):
    kr_folder(tmp_path, GOOD_LOG)
    columns = {"user_id": [1, 2], "last_time_ms": [1650812741435, 1650812741436]}
    lists = {"like_seq": [[5], [5]], "long_watch_seq": [[5, 6], [5]]}
    pq.write_table(pa.table(columns | lists), tmp_path / "pure_user_sequences.parquet")
    tables = kr(tmp_path)
    assert tables.users["tags"].to_pylist() == [["tag 39", "tag 68"], []]
    assert tables.files["pure_user_sequences.parquet"].rejected == {"history overlaps the log": 1}


def test_kuairand_refuses(tmp_path):
    refused(lambda: kr(tmp_path), str(tmp_path), "no log here", "source.path")
    kr_folder(tmp_path, "1,5,1650812741436,1,0,0,-5,10000,1\n")
    refused(lambda: kr(tmp_path), "pure.csv", "row 2", "'play_time_ms'", "below 0", "source.max_bad_rows")


@needs_real
def test_kuairand_real():
    tables = kr(REAL / "kuairand")
    logged = [c for f, c in tables.files.items() if f.startswith("pure_log")]
    assert sum(c.rows_in for c in logged) == 94_784 + 133_545
    lost = {
        cause: sum(c.rejected.get(cause, 0) for c in logged) for cause in ("duplicate", "no duration", "tab not used")
    }
    assert lost["duplicate"] == 5_885
    assert lost["no duration"] == 3_568
    clean = sum(c.rows_in for c in logged) - lost["duplicate"] - lost["no duration"]
    assert clean == 218_876
    assert tables.interactions.num_rows == clean - lost["tab not used"]
    sequential = tables.interactions.filter(pc.equal(tables.interactions["task"], "sequential"))
    assert sequential.num_rows == 196_344
    skipped = pc.mean(pc.less(sequential["play_rate"], 0.3).cast(pa.float64())).as_py()
    assert round(skipped, 3) == 0.636
    assert pc.max(sequential["play_rate"]).as_py() == 1.0
    clicks = tables.interactions.filter(pc.equal(tables.interactions["task"], "click"))
    assert clicks.num_rows == 19_557
    assert (tables.users.num_rows, tables.videos.num_rows) == (27_285, 7_583)


# MicroLens


def mlens(folder: Path, **more) -> SourceTables:
    return read_source(SourceSettings(kind="microlens", path=str(folder), **more))


def mlens_folder(folder: Path) -> Path:
    write(folder / "MicroLens-100k_title_en.csv", 'item,title\n1,"A, ""quoted"" title"\n2,bare, with comma\n3,\n')
    write(folder / "covers" / "1.jpg", b"x")
    write(folder / "videos" / "part" / "2.mp4", b"x")
    return folder


def test_microlens_pairs_titles_covers_and_videos(tmp_path):
    mlens_folder(tmp_path)
    pairs = "user,item,timestamp\n1,2,1583378629552\n1,2,1583378629552\n2,4,1583378629553\n"
    write(tmp_path / "MicroLens-100k_pairs.csv", pairs)
    write(tmp_path / "tags_to_summary.csv", "2,Travel\n")
    tables = mlens(tmp_path)
    assert rows(tables.videos, "video_id", "title", "tags") == [
        ("1", 'A, "quoted" title', []),
        ("2", "bare, with comma", ["Travel"]),
        ("3", None, []),
        ("4", None, []),
    ]
    assert tables.videos["uri"].to_pylist() == [None, str((tmp_path / "videos/part/2.mp4").resolve()), None, None]
    assert tables.videos["cover_uri"][0].as_py() == str((tmp_path / "covers/1.jpg").resolve())
    assert rows(tables.interactions, "user_id", "video_id", "timestamp", "clicked") == [
        ("1", "2", 1583378629552, True),
        ("2", "4", 1583378629553, True),
    ]
    assert (3, "video_id", "duplicate") in rejects(tables)
    assert tables.files["MicroLens-100k_title_en.csv"].rejected == {"header line": 1}


def test_microlens_lists_keep_their_order(tmp_path):
    write(mlens_folder(tmp_path) / "MicroLens-100k_pairs.tsv", "1\t3 1 2\n2\t2\n")
    tables = mlens(tmp_path)
    assert rows(tables.interactions, "interaction_id", "user_id", "video_id", "timestamp") == [
        ("1-0", "1", "3", None),
        ("1-1", "1", "1", None),
        ("1-2", "1", "2", None),
        ("2-0", "2", "2", None),
    ]


def test_microlens_refuses(tmp_path):
    refused(lambda: mlens(tmp_path), str(tmp_path), "*_pairs.csv", "source.path")
    write(mlens_folder(tmp_path) / "MicroLens-100k_pairs.csv", "user,item,timestamp\n1,2,yesterday\n")
    refused(lambda: mlens(tmp_path), "pairs.csv", "row 2", "'timestamp'", "not a time", "source.max_bad_rows")
    write(tmp_path / "MicroLens-100k_pairs.csv", "user,item,timestamp\n1,2,1583378629552\n")
    refused(lambda: mlens(tmp_path, videos_dir=str(tmp_path / "no")), "no such folder", "source.videos_dir")
    write(tmp_path / "videos" / "2.webm", b"x")
    refused(lambda: mlens(tmp_path), "2.webm", "same stem", "keep one")


# Your own logs


def own(folder: Path, **more) -> SourceTables:
    return read_source(SourceSettings(kind="logs", path=str(folder), **more))


def test_logs_compute_play_rates_and_tell_tasks_apart(tmp_path):
    lines = ["u1,v1,1651363200,5,,", "u1,v1,1651363300,20,,", "u2,v2,1651363200,,p1,yes", "u2,v3,1651363201,5,,"]
    header = "user_id,video_id,timestamp,watch_s,page_id,clicked\n"
    write(tmp_path / "interactions.csv", header + "\n".join(lines) + "\nu1,v1,1651363300,20,,\nu9,v1,1651363200,,,\n")
    write(tmp_path / "videos.csv", "video_id,title,duration_s,tags\nv1,One,10,a|b\nv2,Two,0,\n")
    write(tmp_path / "users.jsonl", '{"user_id": "u1", "age": 30, "city size": "large"}\n')
    write(tmp_path / "films" / "v2.mp4", b"x")
    tables = own(tmp_path, videos_dir=str(tmp_path / "films"))
    assert rows(tables.interactions, "user_id", "task", "play_rate", "clicked", "timestamp") == [
        ("u1", "sequential", 0.5, None, 1651363200000),
        ("u1", "sequential", 1.0, None, 1651363300000),
        ("u2", "click", None, True, 1651363200000),
    ]
    assert rejects(tables) == [(6, "timestamp", "duplicate"), (7, "user_id", "no task"), (5, "watch_s", "no play rate")]
    assert rows(tables.videos, "video_id", "duration_s", "tags") == [("v1", 10.0, ["a", "b"]), ("v2", None, [])]
    assert tables.videos["uri"].to_pylist() == [None, str((tmp_path / "films/v2.mp4").resolve())]
    assert rows(tables.users, "user_id", "age") == [("u1", 30), ("u2", None)]
    assert tables.users["other"][0].as_py() == [("city size", "large")]
    assert "1 play rates above 1 (repeated views) are capped at 1." in tables.notes
    assert any("'prev_op_gap_s'" in n for n in tables.notes)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_logs_of_every_format_with_mapped_columns_give_the_same_tables(tmp_path, suffix):
    data = [{"uid": "u1", "vid": "v1", "ts": 1651363200123, "play_ms": 2500, "len_ms": 10000, "bye": True}]
    path = tmp_path / f"interactions.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(data), path)
    elif suffix == "jsonl":
        write(path, "\n".join(map(json.dumps, data)))
    else:
        mark = "," if suffix == "csv" else "\t"
        write(path, "\n".join(mark.join(map(str, line)) for line in (data[0], data[0].values())))
    names = {"user_id": "uid", "video_id": "vid", "timestamp": "ts", "watch_s": "play_ms", "duration_s": "len_ms"}
    tables = own(tmp_path, columns=names | {"exited_app": "bye"})
    assert rows(
        tables.interactions, "interaction_id", "user_id", "timestamp", "watch_s", "play_rate", "exited_app"
    ) == [("1" if suffix in ("jsonl", "parquet") else "2", "u1", 1651363200123, 2.5, 0.25, True)]


def test_logs_have_gaps_only_if_declared_complete(tmp_path):
    body = "u1,v1,1651363260,0.5\nu2,v1,1651363200,0.5\nu1,v2,1651363200,0.1\n"
    write(tmp_path / "interactions.csv", "user_id,video_id,timestamp,play_rate\n" + body)
    assert own(tmp_path).interactions["prev_op_gap_s"].null_count == 3
    declared = own(tmp_path, columns={"prev_op_gap_s": "timestamp", "next_op_gap_s": "timestamp"})
    assert rows(declared.interactions, "prev_op_gap_s", "next_op_gap_s") == [(60, None), (None, None), (None, 60)]
    assert any("declared complete" in n for n in declared.notes)


def test_logs_refuse_settings_and_columns_that_do_not_fit(tmp_path):
    refused(lambda: own(tmp_path), str(tmp_path), "no interactions file", "interactions.parquet")
    path = write(tmp_path / "interactions.csv", "user_id,video_id,play_rate\nu1,v1,85\nu1,v2,40\n")
    refused(lambda: own(tmp_path), "interactions.csv", "row 2", "'play_rate'", "0 to 1")
    refused(lambda: own(tmp_path, columns={"usr": "x"}), "source.columns.usr", "user_id")
    refused(lambda: own(tmp_path, columns={"user_id": "x"}), "source.columns.user_id=x", "interactions.csv", "row 1")
    write(path, "user_id,video_id,watch_s\nu1,v1,85\n")
    refused(lambda: own(tmp_path), "interactions.csv", "row 2", "no play rate", "'duration_s'")
    write(path, "user_id,video_id,task,play_rate\nu1,v1,scroll,0.5\nu1,v2,sequential,0.5\n")
    assert rejects(own(tmp_path, max_bad_rows=0.5)) == [(2, "task", "unknown task")]
    refused(lambda: own(tmp_path), "interactions.csv", "row 2", "'task'", "unknown task ('scroll')")
    write(tmp_path / "interactions.jsonl", "{}")
    refused(lambda: own(tmp_path), "interactions.csv", "interactions.jsonl", "keep one")


def test_logs_take_a_file_and_keep_their_own_interaction_ids(tmp_path):
    path = write(tmp_path / "may.csv", "interaction_id,user_id,video_id,play_rate\ni7,u,v,0.5\ni7,u,w,0.5\n")
    tables = own(path)
    assert tables.interactions["interaction_id"].to_pylist() == ["i7"]
    assert rejects(tables) == [(3, "interaction_id", "duplicate")]


def test_logs_users_written_in_our_own_schema_come_back(tmp_path):
    write(tmp_path / "interactions.csv", "user_id,video_id,play_rate\nu,v,0.5\n")
    users = [{"user_id": "u", "age": 3, "other": [("city", "big")], "tags": ["a"]}, {"user_id": "w", "other": None}]
    pq.write_table(pa.Table.from_pylist(users, SCHEMAS["users"]), tmp_path / "users.parquet")
    tables = own(tmp_path)
    assert rows(tables.users, "user_id", "age", "other", "tags") == [
        ("u", 3, [("city", "big")], ["a"]),
        ("w", None, [], []),
    ]
    (tmp_path / "users.parquet").unlink()
    write(tmp_path / "users.jsonl", '{"user_id": "u", "other": {"city": "big"}}\n{"user_id": "w", "other": null}\n')
    assert own(tmp_path).users["other"].to_pylist() == [[("city", "big")], []]
    write(tmp_path / "users.jsonl", '{"user_id": "u", "other": "[city"}\n')
    assert rejects(own(tmp_path, max_bad_rows=1)) == [(1, "other", "not a JSON object")]


def test_logs_of_clicks_alone_are_click_rows(tmp_path):
    write(tmp_path / "interactions.tsv", "user_id\tvideo_id\tclicked\nu\tv\t1\nu\tw\t0\n")
    assert rows(own(tmp_path).interactions, "task", "clicked", "play_rate") == [
        ("click", True, None),
        ("click", False, None),
    ]


def test_unseen_films_were_there_and_are_no_clicks():
    """Negatives from films that came later would be told apart by their date alone."""
    times = {"a": 10, "b": 20, "c": 30, "d": 40, "e": 50}
    rated = [("u1", "a", 10), ("u1", "b", 20), ("u2", "c", 30), ("u2", "d", 40), ("u3", "e", 50), ("u3", "a", 55)]
    users, films, when = (list(column) for column in zip(*rated, strict=True))
    rows = pa.table({"user_id": users, "video_id": films, "timestamp": when, "rating": [5.0] * len(rated)})
    first = pa.table({"video_id": list(times), "timestamp": list(times.values())})
    records = movielens.with_unseen(clicks(rows, "user_id", "video_id"), first, 1).to_pylist()
    assert [(r["user_id"], r["video_id"]) for r in records if r["clicked"]] == [(u, v) for u, v, _ in rated]
    unseen = [r for r in records if not r["clicked"]]
    assert {r["user_id"] for r in unseen} >= {"u2", "u3"}
    for row in unseen:
        assert (row["user_id"], row["video_id"]) not in {(u, v) for u, v, _ in rated}
        assert times[row["video_id"]] <= row["timestamp"]
    assert len({(r["user_id"], r["video_id"]) for r in unseen}) == len(unseen)
    assert {(r["rating"], r["liked"], r["disliked"]) for r in records} == {(None, None, None)}


def test_the_unseen_films_of_a_user_do_not_depend_on_other_users():
    films, users = [f"v{i}" for i in range(200)], [f"u{i % 5}" for i in range(40)]
    first = pa.table({"video_id": films, "timestamp": list(range(200))})
    rows = pa.table({"user_id": users, "video_id": films[160:], "timestamp": list(range(160, 200))})
    together = movielens.with_unseen(clicks(rows, "user_id", "video_id"), first, 2).to_pylist()
    for user in set(users):
        own = clicks(rows.filter(pc.equal(rows["user_id"], user)), "user_id", "video_id")
        alone = movielens.with_unseen(own, first, 2).to_pylist()
        assert len(alone) == 3 * own.num_rows
        assert alone == [r for r in together if r["user_id"] == user]


def test_the_first_time_of_a_film_is_that_of_all_pieces_of_a_log():
    pieces = [{"a": 30, "b": 20, "c": None}, {"a": 10, "d": 40}, {"b": 25, "d": 35}]
    tables = (pa.table({"video_id": list(p), "timestamp": pa.array(p.values(), pa.int64())}) for p in pieces)
    first = sum((Findings(first=first_times(t)) for t in tables), Findings()).first
    assert dict(zip(*(first[c].to_pylist() for c in first.column_names), strict=True)) == {"a": 10, "b": 20, "d": 35}
