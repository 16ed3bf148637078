"""Public data sets in any number of pieces and parts give what they give in one, faults included."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from test_scale import expected_raw, part_rows

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data import work as working
from gubs.data.sources import SourceTables, open_source, read_source
from gubs.data.sources.files import InputFile
from gubs.data.sources.formats import JsonLines, rows_about
from gubs.data.sources.log import Log

ROWS = 600
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def film(rng: np.random.Generator) -> int:
    return int(40 * rng.random() ** 2)


def netflix(folder: Path, rng: np.random.Generator) -> None:
    for n in range(3):
        lines = ["7,3,2005-01-01"] * (n == 1)  # no film above it
        for number in range(10 * n + 1, 10 * n + 11):
            users = rng.integers(0, 40, ROWS // 30)
            lines += [f"{number}:", *(f"{u},{rng.integers(1, 6)},2004-0{rng.integers(1, 10)}-11" for u in users)]
        write(folder / f"combined_data_{n + 1}.txt", *lines, "7,6,2005-01-01", "7,3,2005-13-01", "", "8,3", "99:")
    write(folder / "movie_titles.csv", *(f"{i},{1990 + i},Film, {i}" for i in range(1, 28)), "1,2000,again", "x")


def movielens(folder: Path, rng: np.random.Generator) -> None:
    ratings = (f"{rng.integers(40)}::{film(rng)}::{rng.integers(1, 6)}::{960_000_000 + i}" for i in range(ROWS))
    write(folder / "ratings.dat", *ratings, "1::2::9::960000000", "1::2")
    write(folder / "movies.dat", *(f"{i}::Film {i}::Drama|War" for i in range(35)))
    write(folder / "users.dat", *(f"{i}::{'MF'[i % 2]}::{[1, 18, 25][i % 3]}::{i % 21}::0{i}" for i in range(35)))


def not_chosen(folder: Path, rng: np.random.Generator) -> None:
    """Read with `source.unseen`."""
    movielens(folder, rng)


def reviews(folder: Path, rng: np.random.Generator) -> None:
    lines = ["Id,Title,User_id,review/score,review/time,review/text"]
    for i in range(ROWS):
        book, user = film(rng), "" if i % 97 == 0 else f"A{rng.integers(40)}"
        title = [f"Book {book}", "", f"Book {book} (2nd)"][rng.integers(3)]
        time, stars = 900_000_000 + 10_000_000 * rng.integers(4), 9.9 if i % 50 == 0 else 4.0
        lines.append(f'B{book},{title},{user},{stars},{time},"two\nlines"')
    write(folder / "Books_rating.csv", *lines)
    books = (f"Book {b},\"['Fiction {b % 3}']\"" for b in range(60))
    write(folder / "books_data.csv", "Title,categories", *books, "Book 3,['A']", ",['A']", "Book 0 (2nd),oops")


def windows(folder: Path, rng: np.random.Generator) -> None:
    for name in ("train", "test"):
        lines = []
        for user in range(30):
            books = rng.integers(0, 80, 30).tolist()
            starts = range(0, 20, int(rng.integers(1, 6)))
            ends = (int(s + rng.integers(3, 7)) for s in starts)
            lines += [f'u{user},"{books[s:e]}",{10**9 + 1000 * s}' for s, e in zip(starts, ends, strict=True)]
        write(folder / f"{name}.csv", "user_id,item_ids,timestamp", *(lines[i] for i in rng.permutation(len(lines))))
    (folder / "id2name4Rec.json").write_text(json.dumps({str(i): f"Book {i}" for i in range(70)}))


def yelp(folder: Path, rng: np.random.Generator) -> None:
    lines = []
    for i in range(ROWS):
        who = {"review_id": f"r{i // 2 if i % 40 == 0 else i}", "user_id": f"u{rng.integers(40)}"}
        what = {"business_id": f"b{film(rng)}", "stars": float(rng.integers(1, 6)), "text": "Good.\nVery."}
        lines.append(json.dumps(who | what | {"date": f"2015-01-{1 + i % 28:02} 10:00:00"}))
    write(folder / "review.json", *lines, '{"review_id": "x"}', "nope")
    write(folder / "business.json", *(json.dumps({"business_id": f"b{i}", "name": f"Place {i}"}) for i in range(35)))
    write(folder / "user.json", *(json.dumps({"user_id": f"u{i}", "yelping_since": "2010-01-01"}) for i in range(30)))


def mind(folder: Path, rng: np.random.Generator) -> None:
    for part in ("MINDsmall_dev", "MINDsmall_train"):
        write(folder / part / "news.tsv", *(f"N{i}\tc{i % 3}\ts{i % 7}\tTitle {i}\tx\ty\t[]\t[]" for i in range(50)))
        pages = []
        for i in range(ROWS // 8):
            history = " ".join(f"N{n}" for n in rng.integers(0, 60, rng.integers(0, 9)))
            shown = " ".join(f"N{n}-{n % 2}" for n in rng.choice(60, rng.integers(1, 9), replace=False))
            time = f"11/{1 + i % 28}/2019 1:05:58 PM"
            pages.append(f"{i // 2 if i % 20 == 0 else i}\tU{rng.integers(30)}\t{time}\t{history}\t{shown}")
        write(folder / part / "behaviors.tsv", *pages, "999\tU1\t2019-11-12\t\tN1-1")


def kuairand(folder: Path, rng: np.random.Generator) -> None:
    names = "user_id,video_id,time_ms,is_click,is_like,is_hate,play_time_ms,duration_ms,tab"
    start = 1_650_812_741_000
    for n in (1, 2):
        lines = [
            f"{rng.integers(40)},{film(rng)},{start + 1000 * rng.integers(200)},{i % 2},0,0,{rng.integers(30000)},"
            f"{rng.choice([0, 9000, 20000])},{rng.choice([0, 1, 2, 8])}"
            for i in range(ROWS // 2)
        ]
        write(folder / f"log_standard_{n}_pure.csv", names, *lines, *lines[:5])
    names = "video_id,author_id,video_type,upload_type,video_duration,music_type,tag"
    write(folder / "video_features_basic_pure.csv", names, *(f"{v},{v},AD,Web,9000.0,,{v % 5}" for v in range(35)))
    names = "user_id,user_active_degree,is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range"
    people = (f"{u},full_active,0,{u % 2},0,0,0,8-14" for u in range(35))
    write(folder / "user_features_pure.csv", f"{names},friend_user_num_range,register_days_range", *people)
    users, views = [*range(50), 3], [rng.integers(0, 35, 4).tolist() for _ in range(51)]
    last = [start + 1000 * int(s) for s in rng.integers(-20, 20, 51)]
    table = pa.table({"user_id": users, "last_time_ms": last, "like_seq": views, "long_watch_seq": views[::-1]})
    pq.write_table(table, folder / "pure_user_sequences.parquet")


def kuairand_parquet(folder: Path, rng: np.random.Generator) -> None:
    """The prepared logs, in row groups."""
    kuairand(folder, rng)
    for n, name in ((1, "val"), (2, "test")):
        csv = folder / f"log_standard_{n}_pure.csv"
        table = pa_csv.read_csv(csv)
        pq.write_table(table, folder / f"pure_log_{name}.parquet", row_group_size=50)
        csv.unlink()


def kuairand_27k(folder: Path, rng: np.random.Generator) -> None:
    """The names of the large edition."""
    kuairand(folder, rng)
    (folder / "pure_user_sequences.parquet").unlink()
    for path in list(folder.iterdir()):
        part = "_part1" if path.name.startswith("log") else ""
        path.rename(folder / path.name.replace("_pure", f"_27k{part}"))


def pairs(folder: Path, rng: np.random.Generator) -> None:
    lines = (f"{rng.integers(40)},{film(rng)},{1_583_378_629_552 + 1000 * rng.integers(9)}" for _ in range(ROWS))
    write(folder / "x_pairs.csv", "user,item,timestamp", *lines)
    write(folder / "x_titles.csv", "item,title", *(f"{i},Title {i}, and more" for i in range(35)))


def lists(folder: Path, rng: np.random.Generator) -> None:
    pairs(folder, rng)
    (folder / "x_pairs.csv").unlink()
    users = [*range(60), 3, 4]
    write(folder / "x_pairs.tsv", *(f"{u}\t{' '.join(map(str, rng.integers(0, 40, 10)))}" for u in users))


LAYOUTS: dict[Callable[[Path, np.random.Generator], None], tuple[str, set[str]]] = {
    netflix: ("netflix", {"duplicate", "no film above it", "neither FILM: nor USER,STARS,DATE"}),
    movielens: ("movielens", {"duplicate", "above 5", "too few values"}),
    not_chosen: ("movielens", {"duplicate", "above 5", "too few values"}),
    reviews: ("amazon", {"duplicate", "no user", "above 5", "not reviewed", "no title", "not a list of texts"}),
    windows: ("amazon", {"duplicate"}),
    yelp: ("yelp", {"duplicate", "missing value", "not JSON"}),
    mind: ("mind", {"duplicate", "not a time as 11/15/2019 8:55:22 AM"}),
    kuairand: ("kuairand", {"duplicate", "no duration", "tab not used", "history overlaps the log"}),
    kuairand_parquet: ("kuairand", {"duplicate", "no duration", "tab not used", "history overlaps the log"}),
    kuairand_27k: ("kuairand", {"duplicate", "no duration", "tab not used"}),
    pairs: ("microlens", {"duplicate"}),
    lists: ("microlens", {"duplicate"}),
}
"""How each layout is written, its `source.kind`, and what its rows are rejected for."""


def written(layout: Callable[[Path, np.random.Generator], None], folder: Path) -> list[str]:
    folder.mkdir()
    layout(folder, np.random.default_rng(1))
    more = ["source.unseen=2"] if layout is not_chosen else []
    return [f"source.kind={LAYOUTS[layout][0]}", f"source.path={folder}", "source.max_bad_rows=1", *more]


def assert_raw(run: Run, chosen: list[str]) -> SourceTables:
    """The artifact `raw` is what the source gives in memory."""
    settings = load_settings("tiny", chosen)
    tables, raw = read_source(settings.source), run.artifact("raw")
    for name, table in expected_raw(settings).items():
        assert raw.table(name).equals(table), name
    assert raw.manifest.info["files"] == {name: vars(count) for name, count in tables.files.items()}
    assert raw.manifest.info["notes"] == tables.notes
    return tables


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_public_source_in_any_number_of_parts(tmp_path: Path, layout) -> None:
    source = written(layout, tmp_path / "data")
    log = open_source(load_settings("tiny", source).source)
    assert isinstance(log, Log)
    rows = sum(head.rows for head in log.heads) * log.fan_out
    for parts in (1, 3, 17):
        run = Run(tmp_path / f"r{parts}")
        stages.make(["raw"], run, load_settings("tiny", [*source, part_rows(rows, parts)]))
        files = run.artifact("raw").parts("interactions")
        assert abs(len(files) - parts) <= parts // 4, "whole rows of a part"
        tables = assert_raw(run, source)
    assert LAYOUTS[layout][1] <= set(tables.rejects["cause"].to_pylist())
    assert tables.interactions.num_rows > ROWS // 3


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data (../shared/data) is missing")
@pytest.mark.parametrize(("kind", "folder"), [("kuairand", "kuairand"), ("movielens", "ml-100k")])
def test_real_data_in_parts(tmp_path: Path, kind: str, folder: str) -> None:
    source = [f"source.kind={kind}", f"source.path={REAL / folder}"]
    stages.make(["raw"], Run(tmp_path), load_settings("tiny", [*source, "data.part_rows=30000"]))
    assert len(Run(tmp_path).artifact("raw").parts("interactions")) > 2
    assert_raw(Run(tmp_path), source)


def test_a_killed_command_on_ray_goes_on(tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(yelp, tmp_path / "data")
    settings = load_settings("tiny", [*source, part_rows(ROWS, 3), "data.ray_from_rows=0"])
    run, phases, real = Run(tmp_path / "r"), list[str](), working._on_ray

    def noted(jobs, numbers):
        phases.extend(str(job.args[0]) for job in jobs)
        return real(jobs, numbers)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(working, "_on_ray", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "decided", killed)
        with pytest.raises(KeyboardInterrupt):
            stages.make(["raw"], run, settings)
    assert "read" in phases
    phases.clear()
    stages.make(["raw"], run, settings)
    assert set(phases) == {"compare ids", "regroup by user"}, "nothing is read again"
    assert_raw(run, source)


def test_a_film_without_ratings_is_no_fault(tmp_path: Path) -> None:
    source = written(netflix, tmp_path / "data")
    write(tmp_path / "data" / "combined_data_4.txt", "99:")
    stages.make(["raw"], Run(tmp_path / "r"), load_settings("tiny", source))
    tables = assert_raw(Run(tmp_path / "r"), source)
    assert tables.files["combined_data_4.txt"].rows_in == 0


def test_the_size_of_a_text_file_is_known_from_its_start(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", *(f"{i:06},3,2005-09-06" for i in range(20_000)))
    assert 19_900 < rows_about(InputFile.at(tmp_path / "a.txt")) < 20_100


@pytest.mark.parametrize("whole", [True, False])
def test_json_lines_are_read_once_if_the_first_ones_tell_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    write(tmp_path / "a.json", *(json.dumps({"user_id": f"u{i}"}) for i in range(100)))
    for name in ("_JSON_BYTES", "_JSON_HEAD_BYTES"):
        monkeypatch.setattr(f"gubs.data.sources.formats.{name}", 200)
    real, blocks = JsonLines._raw_blocks, list[bytes]()
    monkeypatch.setattr(JsonLines, "_raw_blocks", lambda self, size: (blocks.append(b) or b for b in real(self, size)))
    batches = JsonLines(InputFile.at(tmp_path / "a.json"), whole=whole).batches(["user_id"])
    assert [u for b, _ in batches for u in b["user_id"].to_pylist()] == [f"u{i}" for i in range(100)]
    n = len(set(blocks))
    assert n > 5
    assert len(blocks) == (2 * n if whole else n + 1)


def test_json_lines_with_dates_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow takes them for times; after the first block it is told that they are texts."""
    days = [f"2024-01-{1 + i % 28:02}" for i in range(100)]
    write(tmp_path / "a.json", *(json.dumps({"day": day}) for day in days))
    monkeypatch.setattr("gubs.data.sources.formats._JSON_BYTES", 200)
    real, parsed = JsonLines._read_typed, list[bytes]()
    monkeypatch.setattr(
        JsonLines, "_read_typed", lambda self, raw, schema: (parsed.append(raw), real(self, raw, schema))[1]
    )
    file = JsonLines(InputFile.at(tmp_path / "a.json"))
    parsed.clear()
    assert [day for batch, _ in file.batches(["day"]) for day in batch["day"].to_pylist()] == days
    assert len(parsed) == len(set(parsed))
    assert len(parsed) > 5
