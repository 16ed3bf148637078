"""Faults of real logs that give wrong labels without a word: each is read right, or refused with the remedy."""

import json
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables, read_source
from gubs.data.sources.columns import CellRules, Kind, convert, decode
from gubs.data.sources.formats import JsonLines
from gubs.data.sources.log_rows import Unclicked
from gubs.data.sources.units import Evidence, Sizes, named_unit, total
from gubs.errors import InputError


def read(folder: Path, **settings: object) -> SourceTables:
    return read_source(SourceSettings(kind="logs", path=str(folder), **settings))


def refusal(folder: Path, **settings: object) -> str:
    with pytest.raises(InputError) as caught:
        read(folder, **settings)
    return str(caught.value)


def write(folder: Path, name: str = "interactions", **columns: list) -> Path:
    """A CSV file; missing values are empty cells."""
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join("" if v is None else str(v) for v in row) for row in rows)]
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def log(folder: Path, n: int = 30, **columns: list) -> Path:
    """A log of n rows of three users and five videos, with these columns beside."""
    users, videos = [f"u{i % 3}" for i in range(n)], [f"v{i % 5}" for i in range(n)]
    times = [1_700_000_000 + 60 * i for i in range(n)]
    return write(folder, user_id=users, video_id=videos, timestamp=times, **columns)


def column(tables: SourceTables, name: str, table: str = "interactions") -> list:
    return getattr(tables, table)[name].to_pylist()


# Units

SECONDS = [0, 5, 6, 7, 8] * 6


@pytest.mark.parametrize(
    ("columns", "settings", "remedy"),
    [
        ({"watch_s": [s * 1000 for s in SECONDS], "duration_s": [20] * 30}, {}, "source.units.watch=ms"),
        ({"watch_s": SECONDS, "duration_s": [20_000] * 30}, {}, "source.units.interactions.duration=ms"),
        ({"watch_s": [s * 1000 for s in SECONDS], "duration_s": [20_000] * 30}, {}, "duration=ms"),
        ({"watch_s": [s * 40 for s in SECONDS], "duration_s": [20] * 30}, {}, "source.units.watch=ms"),
        ({"watch_s": SECONDS, "duration_s": [20 / 60] * 30}, {}, "source.units.interactions.duration"),
        ({"watch_s": [s / 3600 for s in SECONDS], "duration_s": [20] * 30}, {}, "source.units.watch"),
        ({"watch_s": [5, 5000] * 15, "duration_s": [20] * 30}, {}, "source.units.watch"),
        ({"watch_s": [5 / 60] * 28 + [1.0, 1.0], "duration_s": [20] * 30}, {}, "source.units.watch"),
        ({"watch_s": SECONDS, "duration_s": [20] * 24 + [20_000] * 6}, {}, "source.units.interactions.duration"),
        ({"play_rate": [0] * 25 + [25, 50, 75, 100, 100]}, {}, "source.units.play_rate=percent"),
        ({"watch_s": [s * 1e6 for s in SECONDS], "play_rate": [0.5] * 30}, {}, "source.units.watch=us"),
        ({"play_rate": [0.5] * 30, "prev_op_gap_s": [20_000] * 30}, {}, "source.units.prev_op_gap=ms"),
        ({"watch_s": SECONDS, "duration_s": [20] * 30}, {"units": {"duration": "ms"}}, "source.units"),
        ({"play_rate": [0.5] * 30}, {"units": {"play_rate": "percent"}}, "source.units.play_rate=share"),
    ],
    ids=[
        *("watch in ms", "duration in ms", "both in ms", "watch in odd units", "duration in minutes", "watch in hours"),
        *(
            "a share of the rows in ms",
            "watch in minutes, some repeated",
            "durations of one part in ms",
            "percentages with many zeros",
            "watch in us beside rates",
            "gaps in ms",
        ),
        *("seconds stated to be ms", "shares stated to be percentages"),
    ],
)
def test_a_wrong_unit_is_refused_with_the_setting(tmp_path, columns, settings, remedy):
    message = refusal(log(tmp_path, **columns), **settings)
    assert remedy in message
    assert "interactions.csv: column" in message
    assert "(row " in message


RNG = np.random.default_rng(5)
WAITS = [round(float(w), 3) for w in RNG.lognormal(0.8, 0.8, 60)]
"""Seconds between operations, 3 on average."""


def sized(n: int = 60, **columns: list) -> dict[str, list]:
    return {name: values if len(values) == n else values * (n // len(values)) for name, values in columns.items()}


@pytest.mark.parametrize("gap", ["prev_op_gap_s", "next_op_gap_s"])
@pytest.mark.parametrize(
    "fields",
    [{"play_rate": [0.5]}, {"watch_s": [2, 4], "duration_s": [20]}, {"watch_s": [0, 60], "duration_s": [80]}],
    ids=["rates", "short views", "a video of a minute"],
)
def test_short_gaps_in_milliseconds_are_refused(tmp_path, gap, fields):
    """Their mean is under 3.6 s, so as seconds they are under an hour."""
    scale = 1000 * max(1, max(fields.get("watch_s", [0])) / 6)
    message = refusal(log(tmp_path, 60, **sized(**fields, **{gap: [w * scale for w in WAITS]})))
    assert f"source.units.{gap.removesuffix('_s')}=ms" in message
    assert "longer than users wait between two operations; they look like milliseconds" in message
    tables = read(tmp_path, units={gap: "ms"})
    assert column(tables, gap) == pytest.approx([w * scale / 1000 for w in WAITS])


@pytest.mark.parametrize(
    "columns",
    [
        sized(play_rate=[0.5], prev_op_gap_s=[10 * w for w in WAITS]),
        sized(play_rate=[0.5], prev_op_gap_s=[0] * 4 + [900, 1800]),
        sized(watch_s=[600, 900], duration_s=[1200], next_op_gap_s=[650, 1000, 700]),
        sized(play_rate=[0.5], prev_op_gap_s=[None] * 50 + [2000] * 10),
        sized(play_rate=[0.5], prev_op_gap_s=[3, *[2000] * 5]),
    ],
    ids=["ten times as long", "pauses between sessions", "long videos", "a few", "some short ones"],
)
def test_gaps_in_seconds_are_read(tmp_path, columns):
    gap = next(name for name in columns if name.endswith("gap_s"))
    assert column(read(log(tmp_path, 60, **columns)), gap) == columns[gap]


def test_long_gaps_are_read_if_their_unit_is_stated(tmp_path):
    log(tmp_path, play_rate=[0.5] * 30, prev_op_gap_s=[600] * 30)
    assert "90% of the values above 0 are over 60 s" in refusal(tmp_path)
    assert set(column(read(tmp_path, units={"prev_op_gap": "s"}), "prev_op_gap_s")) == {600}


@pytest.mark.parametrize(
    "rates",
    [[0.9] * 30, [0.5] * 30, [0.05] * 30, [0] * 30, [0.25, 0.9, 0.9] * 10],
    ids=["far above", "twice", "below", "none", "two of three"],
)
def test_play_rates_that_contradict_the_watch_times_are_refused(tmp_path, rates):
    log(tmp_path, watch_s=[5] * 30, duration_s=[20] * 30, play_rate=rates)
    message = refusal(tmp_path)
    assert ("column 'watch_s'" if rates[0] == 0 else "column 'play_rate'") in message
    assert "have a play rate that is over 1.5 times the watch time / duration, or as far below it" in message
    assert "source.units.play_rate to its unit" in message
    assert column(read(tmp_path, units={"play_rate": "share"}), "play_rate") == rates
    write(tmp_path, "videos", video_id=["v0", "v1", "v2", "v3", "v4"], duration_s=[20] * 5)
    log(tmp_path, watch_s=[5] * 30, play_rate=rates)
    assert "have a play rate that is over 1.5 times" in refusal(tmp_path)


def test_play_rates_that_agree_but_for_rounding_and_repeats_are_read(tmp_path):
    lengths = [8, 15, 60] * 20
    shares = [round(float(s), 3) for s in RNG.exponential(0.5, 60)]
    whole_seconds = [int(s * d) for s, d in zip(shares, lengths, strict=True)]
    capped = [round(min(s, 1), 2) for s in shares]
    log(tmp_path, 60, watch_s=whole_seconds, duration_s=lengths, play_rate=capped)
    assert column(read(tmp_path), "play_rate") == capped
    odd = [0.9 if i % 3 == 0 else c for i, c in enumerate(capped)]
    log(tmp_path, 60, watch_s=whole_seconds, duration_s=lengths, play_rate=odd)
    assert column(read(tmp_path), "play_rate") == odd, "a minority may be exceptions"


def test_the_table_of_videos_is_checked_too_and_both_tables_must_agree(tmp_path):
    log(tmp_path, watch_s=SECONDS)
    write(tmp_path, "videos", video_id=["v0", "v1", "v2", "v3", "v4"], duration_s=[20_000] * 5)
    message = refusal(tmp_path)
    assert "videos.csv: column 'duration_s' (row 2 has 20000 s)" in message
    assert "source.units.videos.duration=ms" in message
    assert column(read(tmp_path, units={"videos": {"duration": "ms"}}), "play_rate")[:2] == [0, 0.25]
    log(tmp_path, watch_s=SECONDS, duration_s=[20] * 30)
    write(tmp_path, "videos", video_id=["v0", "v1", "v2", "v3", "v4"], duration_s=[300] * 5)
    assert "times those of the same videos" in refusal(tmp_path)


def test_stated_units_are_believed(tmp_path):
    log(tmp_path, watch_s=[3000] * 30, duration_s=[6000] * 30)
    assert "source.units.watch=s if they are seconds" in refusal(tmp_path)
    films = read(tmp_path, units={"watch": "s", "duration": "s"})
    assert set(column(films, "play_rate")) == {0.5}
    in_ms = read(tmp_path, units={"watch": "ms", "interactions": {"duration": "ms"}})
    assert set(column(in_ms, "watch_s")) == {3.0}
    log(tmp_path, play_rate=[200] * 30)
    assert set(column(read(tmp_path, units={"play_rate": "share"}), "play_rate")) == {1.0}


def test_a_mapping_meant_for_one_table_leaves_the_other_alone(tmp_path):
    log(tmp_path, watch_s=SECONDS, duration_s=[20] * 30)
    write(tmp_path, "videos", video_id=["v0", "v1"], duration_ms=[20_000, 20_000])
    for columns in ({"duration_s": "duration_ms"}, {"videos": {"duration_s": "duration_ms"}}):
        tables = read(tmp_path, columns=columns)
        assert column(tables, "play_rate")[:5] == [0, 0.25, 0.3, 0.35, 0.4]
        assert column(tables, "duration_s", "videos")[:2] == [20, 20]
    log(tmp_path, play_ms=[1000 * s for s in SECONDS], length=[20] * 30)
    write(tmp_path, "videos", video_id=["v0", "v1"], length=["short", "long"], duration_s=[20, 20])
    columns = {"watch_s": "play_ms", "interactions": {"duration_s": "length"}}
    assert column(read(tmp_path, columns=columns), "play_rate")[:2] == [0, 0.25]


def test_units_and_mappings_that_fit_nothing_are_refused(tmp_path):
    log(tmp_path, watch_s=SECONDS, duration_s=[20] * 30)
    assert "source.units.watch=days: no such unit" in refusal(tmp_path, units={"watch": "days"})
    assert "source.units.wach: no such column" in refusal(tmp_path, units={"wach": "ms"})
    assert "source.units.users: no such table" in refusal(tmp_path, units={"users": {"age": "s"}})
    assert "source.units.videos.watch: no such column" in refusal(tmp_path, units={"videos": {"watch": "s"}})
    assert "source.columns.films: no such table" in refusal(tmp_path, columns={"films": {"title": "t"}})
    assert "there is no file of videos" in refusal(tmp_path, columns={"videos": {"title": "t"}})
    message = refusal(tmp_path, columns={"interactions": {"watch_s": "t"}})
    assert "source.columns.interactions.watch_s=t: none of interactions.csv has a column 't'" in message
    assert "source.units.prev_op_gap: no file has this column" in refusal(tmp_path, units={"prev_op_gap": "ms"})


def test_names_tell_units():
    names = ("play_time_ms", "durationMillis", "len_us", "watch_minutes", "rate_percent", "items", "atoms", "duration")
    assert [named_unit(n) for n in names] == ["ms", "ms", "us", "min", "percent", None, None, None]


def test_evidence_of_blocks_adds_up_to_that_of_the_whole():
    rng = np.random.default_rng(0)
    names = ("watch_s", "duration_s", "play_rate", "prev_op_gap_s")
    table = pa.table({n: pa.array(rng.exponential(20, 1000), mask=rng.random(1000) < 0.2) for n in names})
    durations = pa.chunked_array([pa.array(rng.exponential(20, 1000))])
    starts = [0, 1, 500, 1000]
    blocks = [(table.slice(a, b - a), durations.slice(a, b - a)) for a, b in pairwise(starts)]
    parts, whole = total(Evidence.of(*block) for block in blocks), Evidence.of(table, durations)
    assert all((getattr(parts, n).counts == getattr(whole, n).counts).all() for n in vars(whole))
    assert all(getattr(parts, n).zeros == getattr(whole, n).zeros for n in vars(whole))
    assert whole.rate_agreement.n > 300
    values = np.sort(table["watch_s"].drop_null().to_numpy())
    assert whole.watch.n == len(values)
    assert whole.watch.median == pytest.approx(np.median(values), rel=0.05)
    assert whole.watch.share_above(20) == pytest.approx((values > 20).mean(), abs=0.02)
    assert np.isnan(Sizes().median)


# Cells

TEA = ["tea", "cats"]


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        *(
            (cell, TEA)
            for cell in ("['tea', 'cats']", '["tea", "cats"]', "['tea' 'cats']", "[tea, cats]", "{tea,cats}")
        ),
        *((cell, TEA) for cell in ("('tea', 'cats')", "{'tea', 'cats'}", "tea,cats", "tea | cats", "tea;cats;")),
        *(
            (cell, TEA)
            for cell in ("[u'tea', None, nan, 'cats']", "tea,,cats, N/A", '["tea", null, "cats"]', '["tea"\n "cats"]')
        ),
        ("['it\\'s', \"a 'b'\"]", ["it's", "a 'b'"]),
        ("['a,b', 'c|d']", ["a,b", "c|d"]),
        ("rock, pop|jazz", ["rock, pop", "jazz"]),
        ("[1, 2]", ["1", "2"]),
        ("[1 2]", ["1", "2"]),
        ("(live)", ["(live)"]),
        *((cell, []) for cell in ("[]", "{}", "['']", "[None]", "|")),
        *((cell, None) for cell in ("", "N/A")),
        *((cell, "not a list") for cell in ("[tea", "{'tea': 1}", "['tea'] cats")),
    ],
)
def test_lists_by_one_rule(cell, items):
    values, bad = convert(pa.array([cell]), "texts")
    assert bad is None or bad.tolist() == [items == "not a list"]
    assert values.to_pylist() == [None if items == "not a list" else items]


@pytest.mark.parametrize(
    "lists",
    [
        pa.array([["tea", None, " cats "], None, []]),
        pa.array([["tea", "nan", "cats"], None, []], pa.large_list(pa.large_string())),
        pa.array([["tea", "cats"], None, []], pa.list_view(pa.string_view())),
        pa.array([[b"tea", b"cats"], None, []]),
    ],
    ids=["list", "large", "view", "bytes"],
)
def test_native_lists_lose_missing_items_only(lists):
    decoded, _ = decode(lists)
    assert convert(decoded, "texts")[0].to_pylist() == [TEA, None, []]


HALF_PAST = 1_709_289_000_000


@pytest.mark.parametrize(
    "cell",
    [
        *("2024-03-01 10:30:00 UTC", "2024-03-01 10:30:00.000000 UTC", "2024-03-01T10:30:00Z", "2024-03-01 10:30 GMT"),
        *(
            "2024-03-01 18:30:00+08:00",
            "2024-03-01 18:30:00 +0800",
            "2024-03-01T18:30:00+08",
            "2024-03-01 18:30:00 UTC+8",
        ),
        *("2024-03-01 10:30:00,000", "2024/03/01 10:30:00", "2024-03-01 10:30:00 +0000 UTC", "2024-03-01t10:30:00z"),
        *("2024-03-01T11:30:00.000000000+01:00[Europe/Berlin]", "20240301T103000Z", "1709289000.0", "1709289000000.0"),
        "2024-03-01 07:00:00.0000000001 -03:30",
    ],
)
def test_times_in_every_spelling(cell):
    values, bad = convert(pa.array([cell, "1709289000"]), "time")
    assert (values.to_pylist(), bad) == ([HALF_PAST] * 2, None) or (values.to_pylist(), bad.any()) == (
        [HALF_PAST] * 2,
        False,
    )


@pytest.mark.parametrize(
    "cell", ["2024-03-01 10:30:00 PST", "2024-03-01 10:30:00 Europe/Berlin", "yesterday", "01/02/2024"]
)
def test_times_that_may_mean_two_things_are_rejected(cell):
    values, bad = convert(pa.array([cell, "1709289000"]), "time")
    assert (values.to_pylist(), bad.tolist()) == ([None, HALF_PAST], [True, False])


def test_fractions_of_seconds_are_kept():
    cells = ["2024-03-01 10:30:00.25 UTC", "1709289000.25", "2024-03-01T18:30:00.250+08:00"]
    assert convert(pa.array(cells), "time")[0].to_pylist() == [HALF_PAST + 250] * 3
    assert convert(pa.array([Decimal("1709289000.250")]), "time")[0].to_pylist() == [HALF_PAST + 250]


@pytest.mark.parametrize(
    "cell", ["78e51061", "1e5", "12E40", "0e10", "007", "18446744073709551617", "2024-03-01", "a-b"]
)
def test_an_id_is_kept_as_it_is_written(cell):
    assert convert(pa.array([cell, "x"]), "id")[0].to_pylist() == [cell, "x"]


@pytest.mark.parametrize("cell", ["1.65E+12", "1e+20", "1.65E12"])
def test_a_rounded_number_is_no_id(cell):
    values, bad = convert(pa.array([cell]), "id")
    assert (values.to_pylist(), bad.tolist()) == ([None], [True])


@pytest.mark.parametrize("kind", ["id", "word", "integer", "number", "flag", "time"])
def test_words_for_missing_values_are_null_in_every_kind_but_free_text(kind: Kind):
    cells = pa.array(
        ["<NA>", "N/A", "(null)", "undefined", "-", "nan", "#N/A", "\\N", " NULL ", "None", "", "1700000000"]
    )
    values, bad = convert(cells, kind)
    assert (values.null_count, bad is not None) == ((12, True) if kind == "flag" else (11, False))
    assert convert(cells, "text")[0].null_count == 1
    assert CellRules().words(cells).total() == 10
    own = CellRules(nulls=("gone",))
    assert convert(pa.array(["gone", "N/A"]), "id", own)[0].to_pylist() == [None, "N/A"]


# Files


@pytest.mark.parametrize("word", ["<NA>", "N/A", "(null)", "undefined", "-", "#N/A"])
def test_no_user_is_called_missing_and_the_words_are_counted(tmp_path, word):
    write(tmp_path, user_id=["u0"] * 200 + [word], video_id=["v"] * 201, play_rate=[0.5] * 201)
    tables = read(tmp_path)
    assert column(tables, "user_id", "users") == ["u0"]
    assert tables.files["interactions.csv"].rejected == {"missing value": 1}
    assert f"1 cells of interactions.csv count as missing, since they say {word!r} (user_id 1)." in tables.notes


def test_facts_and_tags_that_are_missing_are_left_out(tmp_path):
    log(tmp_path, play_rate=[0.5] * 30)
    write(tmp_path, "users", user_id=["u0", "u1"], gender=["N/A", "f"], tags=["-", "tea"], city=["undefined", "Rome"])
    users = read(tmp_path).users.to_pylist()
    assert [(u["gender"], u["tags"], dict(u["other"])) for u in users[:2]] == [
        (None, [], {}),
        ("f", ["tea"], {"city": "Rome"}),
    ]
    (tmp_path / "users.csv").unlink()
    (tmp_path / "users.jsonl").write_text('{"user_id": "u0", "other": {"city": "N/A", "home": "flat"}}\n')
    assert dict(read(tmp_path).users["other"][0].as_py()) == {"home": "flat"}


TAGS = {
    "users.csv": 'user_id,tags\nu0,"[""tea"", ""N/A""]"\nu1,"[\'-\', None]"\nu2,"N/A, cats|-"\nu3,N/A\n',
    "users.jsonl": "".join(
        json.dumps({"user_id": f"u{i}", "tags": tags}) + "\n"
        for i, tags in enumerate([["tea", "N/A"], ["-", "None"], ["N/A, cats", " - "], ["N/A", None, ""]])
    ),
}


@pytest.mark.parametrize("name", [*TAGS, "users.parquet"])
def test_words_for_missing_values_in_lists_are_dropped_and_counted(tmp_path, name):
    log(tmp_path, play_rate=[0.5] * 30)
    if name in TAGS:
        (tmp_path / name).write_text(TAGS[name])
    else:
        tags = pa.array([["tea", "N/A"], ["-", "None"], ["N/A, cats", "-"], ["N/A", None]], pa.list_(pa.string()))
        pq.write_table(pa.table({"user_id": [f"u{i}" for i in range(4)], "tags": tags}), tmp_path / name)
    tables = read(tmp_path)
    assert column(tables, "tags", "users") == [["tea"], [], ["N/A, cats"], []]
    note = f"5 cells of {name} count as missing, since they say 'N/A', '-', 'None' (tags 5)."
    assert note in tables.notes
    assert not any("count as missing" in n for n in read(tmp_path, nulls=("gone",)).notes)


def json_lines(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_json_lines_are_read_block_by_block_with_their_true_numbers(tmp_path, monkeypatch):
    """A column that only the last block has, blank and broken lines in one, ids beyond 64 bits in another."""
    monkeypatch.setattr("gubs.data.sources.formats._JSON_BYTES", 400)
    monkeypatch.setattr("gubs.data.sources.formats._JSON_HEAD_BYTES", 400)
    rows = [{"user_id": f"u{i % 7}", "video_id": f"v{i}", "play_rate": 0.5} for i in range(60)]
    rows[40]["user_id"], rows[59]["rating"] = 2**70, 3
    lines = [json.dumps(r) for r in rows]
    lines[20:20], lines[10:10] = ["", "{broken"], [""]
    (tmp_path / "interactions.jsonl").write_text("\n".join(lines))
    tables = read(tmp_path, max_bad_rows=0.1)
    assert column(tables, "video_id") == [f"v{i}" for i in range(60)]
    assert column(tables, "user_id")[40] == str(2**70)
    assert column(tables, "rating") == [*[None] * 59, 3]
    assert [r["row"] for r in tables.rejects.to_pylist()] == [11, 22, 23]
    numbers = [i + 1 + (i >= 10) + 2 * (i >= 20) for i in range(60)]
    assert column(tables, "interaction_id") == [str(n) for n in numbers]


@pytest.mark.parametrize(
    ("late", "settings", "again"),
    [
        ({}, {}, 0),
        ({"seen_on": "tv"}, {}, 0),  # not a column of ours: only counted as not used
        ({"rating": 3}, {}, 1),
        ({"interaction_id": "i59"}, {}, 1),  # then the rows before it have none, and are rejected
        ({"stars": 4}, {"columns": {"rating": "stars"}}, 1),  # without it the mapping fits no file
    ],
)
def test_json_lines_are_read_once_more_only_if_late_lines_name_a_column_of_ours(
    tmp_path, monkeypatch, late, settings, again
):
    """As if the first line had named all columns, null where they are missing."""
    rows = [{"user_id": f"u{i % 7}", "video_id": f"v{i}", "play_rate": 0.5} for i in range(60)]
    json_lines(tmp_path / "interactions.jsonl", *rows[:-1], rows[-1] | late)
    settings |= {"max_bad_rows": 1.0}
    for name in ("_JSON_BYTES", "_JSON_HEAD_BYTES"):
        monkeypatch.setattr(f"gubs.data.sources.formats.{name}", 400)
    parsed, real = [], JsonLines._read_at_once
    monkeypatch.setattr(JsonLines, "_read_at_once", lambda self, raw: (parsed.append(raw), real(self, raw))[1])
    tables = read(tmp_path, **settings)
    blocks = len(set(parsed))
    assert len(parsed) == 1 + (1 + again) * blocks, "a head, and the file"
    assert blocks > 5
    json_lines(tmp_path / "interactions.jsonl", rows[0] | dict.fromkeys(late), *rows[1:-1], rows[-1] | late)
    whole = read(tmp_path, **settings)
    assert tables.interactions.equals(whole.interactions)
    assert tables.rejects.equals(whole.rejects)
    assert tables.files == whole.files
    assert tables.notes == whole.notes
    assert tables.rejects.num_rows == (59 if "interaction_id" in late else 0)


def test_json_keeps_ids_of_any_length_and_texts_that_look_like_dates(tmp_path):
    ids = [2**53 + 1, 2**53 + 2, 2**63, 2**64 + 1, 10**25]
    json_lines(
        tmp_path / "interactions.jsonl", *({"user_id": i, "video_id": "2024-01-01", "play_rate": 0.5} for i in ids)
    )
    facts = {"tags": ["2024-03-01", "2024-03-02"], "other": {"since": "2024-03-01"}, "joined": "2024-03-01 10:00:00"}
    json_lines(tmp_path / "users.jsonl", *({"user_id": i, **facts} for i in ids))
    json_lines(tmp_path / "videos.jsonl", {"video_id": "2024-01-01", "title": "2024-03-01"})
    tables = read(tmp_path)
    assert column(tables, "user_id") == [str(i) for i in ids]
    assert column(tables, "title", "videos") == ["2024-03-01"]
    assert column(tables, "tags", "users")[0] == ["2024-03-01", "2024-03-02"]
    assert dict(column(tables, "other", "users")[0]) == {"since": "2024-03-01", "joined": "2024-03-01 10:00:00"}
    assert not tables.rejects.num_rows


def test_a_name_that_occurs_twice_is_refused_by_name(tmp_path):
    names = ["user_id", "video_id", "watch_s", "watch_s", "duration_s"]
    columns = [pa.array(["u"]), pa.array(["v"]), pa.array([1.0]), pa.array([2.0]), pa.array([20.0])]
    pq.write_table(pa.table(columns, names), tmp_path / "interactions.parquet")
    assert "interactions.parquet: the header names column 'watch_s' twice" in refusal(tmp_path)
    (tmp_path / "interactions.parquet").unlink()
    row = '{"user_id": "u", "video_id": "v", "play_rate": 0.5, "play_rate": 0.6}\n'
    (tmp_path / "interactions.jsonl").write_text(row)
    assert "names 'play_rate' twice" in refusal(tmp_path)


RARE_TYPES = {
    "string_view": pa.array(["u", "w"], pa.string_view()),
    "large_string": pa.array(["u", "w"], pa.large_string()),
    "binary_view": pa.array([b"u", b"w"], pa.binary_view()),
    "fixed": pa.array([b"u", b"w"], pa.binary(1)),
    "dictionary": pa.array(["u", "w"]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", RARE_TYPES)
def test_parquet_files_with_rare_types_are_read(tmp_path, kind):
    table = pa.table(
        {"user_id": RARE_TYPES[kind], "video_id": ["v", "v"], "play_rate": pa.array([0.5, 0.25], pa.float32())}
    )
    pq.write_table(table, tmp_path / "interactions.parquet")
    tables = read(tmp_path)
    assert column(tables, "user_id") == ["u", "w"]
    assert column(tables, "play_rate") == [0.5, 0.25]


def test_decimal_and_uuid_ids_are_exact(tmp_path):
    users = pa.array([Decimal(2**64), Decimal(5)], pa.decimal128(38, 0))
    videos = pa.array([UUID(int=i).bytes for i in (1, 2)], pa.uuid())
    pq.write_table(
        pa.table({"user_id": users, "video_id": videos, "play_rate": [0.5, 0.5]}), tmp_path / "interactions.parquet"
    )
    tables = read(tmp_path)
    assert column(tables, "user_id") == [str(2**64), "5"]
    assert column(tables, "video_id") == [str(UUID(int=i)) for i in (1, 2)]


@pytest.mark.parametrize(
    "values", [pa.array([1], pa.duration("ms")), pa.array([[1.0]]), pa.array([1], pa.time64("us"))]
)
def test_types_that_cannot_be_read_are_refused_by_name(tmp_path, values):
    table = pa.table({"user_id": ["u"], "video_id": ["v"], "watch_s": values, "duration_s": [20.0]})
    pq.write_table(table, tmp_path / "interactions.parquet")
    assert "column 'watch_s'" in refusal(tmp_path)


# Clicks and views


def test_a_click_and_the_view_it_starts_are_two_records(tmp_path):
    view = {"task": [None, "sequential", "sequential"], "clicked": [1, None, None], "play_rate": [None, 0.5, 0.5]}
    for tasks in (view, {**view, "task": ["click", None, None]}, {n: view[n] for n in ("clicked", "play_rate")}):
        write(tmp_path, user_id=["u"] * 3, video_id=["v"] * 3, timestamp=[1_700_000_000] * 3, **tasks)
        tables = read(tmp_path)
        assert column(tables, "task") == ["click", "sequential"]
        assert tables.files["interactions.csv"].rejected == {"duplicate": 1}


@pytest.mark.parametrize("never_played", [0, None])
@pytest.mark.parametrize("measure", ["watch_s", "play_rate"])
def test_what_was_not_clicked_in_a_feed_of_covers_is_no_skip(tmp_path, never_played, measure):
    clicked = [int(i % 10 == 0) for i in range(40)]
    watched = [(8 if measure == "watch_s" else 0.4) if c else never_played for c in clicked]
    log(tmp_path, 40, clicked=clicked, **{measure: watched}, duration_s=[20] * 40)
    tables = read(tmp_path)
    assert set(column(tables, "task")) == {"click"}
    assert column(tables, "clicked") == [bool(c) for c in clicked]
    assert any("are exposures of the click task" in n for n in tables.notes)


def test_views_that_start_by_themselves_stay_views(tmp_path):
    clicked, watched = [i % 2 for i in range(40)], [1 + i % 19 for i in range(40)]
    log(tmp_path, 40, clicked=clicked, watch_s=watched, duration_s=[20] * 40)
    assert set(column(read(tmp_path), "task")) == {"sequential"}


def test_a_mixed_feed_and_empty_clicks_are_refused(tmp_path):
    log(tmp_path, 40, clicked=[0] * 40, watch_s=[0, 5] * 20, duration_s=[20] * 40)
    message = refusal(tmp_path)
    assert "column 'clicked': 20 of 40 rows" in message
    assert "'task'" in message
    log(tmp_path, 40, clicked=[1, None] * 20, watch_s=[5, 0] * 20, duration_s=[20] * 40)
    assert "'clicked' is empty in 20 rows" in refusal(tmp_path)


def test_counts_of_unclicked_rows_add_up():
    names = {
        "task": pa.string(),
        "page_id": pa.string(),
        "clicked": pa.bool_(),
        "watch_s": pa.float64(),
        "play_rate": pa.float64(),
    }
    rows = [
        (None, None, False, 0, None),
        (None, None, False, 3, None),
        (None, "p", False, 3, None),
        (None, None, True, 1, None),
    ]
    rows += [("click", None, False, 1, None), (None, None, None, None, 0.5), (None, None, None, 0, None)]
    table = pa.Table.from_pylist([dict(zip(names, r, strict=True)) for r in rows], pa.schema(names))
    assert Unclicked.of(table) == Unclicked(2, 1, 2, 1, 1)
    assert Unclicked.of(table.slice(0, 3)) + Unclicked.of(table.slice(3)) == Unclicked.of(table)


@pytest.mark.parametrize("unknown", [0, None])
def test_a_duration_of_zero_does_not_hide_a_good_one(tmp_path, unknown):
    log(tmp_path, watch_s=[5] * 30, duration_s=[unknown] * 15 + [10] * 15)
    write(tmp_path, "videos", video_id=["v0", "v1", "v2", "v3", "v4"], duration_s=[20] * 5)
    tables = read(tmp_path)
    assert column(tables, "play_rate") == [0.25] * 15 + [0.5] * 15
    assert not tables.rejects.num_rows


# The folders of faults, where they are


REAL: dict[str, tuple[dict, str, str]] = {
    "bigquery_utc": ({}, "", ""),
    "click_and_view_same_time": ({}, "", ""),
    "click_feed_with_watch": ({}, "", ""),
    "duration_ms": ({}, "source.units.interactions.duration=ms", ""),
    "ids_hex8": ({}, "", ""),
    "jsonl_big_ids": ({}, "", ""),
    "kuairec_ms": (
        {"columns": {"watch_s": "play_duration", "duration_s": "video_duration"}},
        "source.units.watch=ms",
        "",
    ),
    "mapping_divides_other_file": ({"columns": {"duration_s": "duration_ms"}}, "", ""),
    "na_ids": ({}, "missing value ('<NA>')", ""),
    "null_times_are_history": ({}, "", "40 interactions have no time."),
    "pandas_lists": ({}, "", ""),
    "parquet_string_view": ({}, "", ""),
    "tags_comma": ({}, "", ""),
    "watch_ms_duration_s": ({}, "source.units.watch=ms", ""),
    "zero_duration_in_log": ({}, "", ""),
}
"""Settings, what the refusal says (empty: it is read), and a note."""


@pytest.mark.parametrize("name", REAL)
def test_known_faults_are_read_right_or_refused(name: str, real_data: Path):
    settings, refused, note = REAL[name]
    folder = real_data / "faults" / name
    if refused:
        assert refused in refusal(folder, **settings)
        return
    tables = read(folder, **settings)
    assert not tables.rejects.num_rows
    assert note in ["", *tables.notes]
    if "task" not in name and "click" not in name:
        assert set(column(tables, "task")) == {"sequential"}
        assert max(column(tables, "play_rate")) < 1
