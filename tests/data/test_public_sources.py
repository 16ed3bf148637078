"""MIND, the Netflix Prize and Yelp in their public layouts, on small files of each."""

import gzip
import json
from pathlib import Path

import pytest

from gubs import stages
from gubs.artifacts import Run
from gubs.config import load_settings
from gubs.data.ingest import source_identity
from gubs.data.settings import SourceSettings
from gubs.data.sources import SourceTables, read_source
from gubs.errors import InputError


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def tables(kind: str, folder: Path, **more: object) -> SourceTables:
    return read_source(SourceSettings(kind=kind, path=str(folder), **more))


def columns(table, *names: str) -> list[tuple]:
    return list(zip(*(table[n].to_pylist() for n in names), strict=True))


def rejects(result: SourceTables) -> list[tuple]:
    return columns(result.rejects, "file", "row", "column", "cause")


def refused(kind: str, folder: Path, *words: str, **more: object) -> None:
    with pytest.raises(InputError) as caught:
        tables(kind, folder, **more)
    assert [w for w in words if w not in str(caught.value)] == [], str(caught.value)


# MIND

NEWS = (
    'N1\tsports\tfootball_nfl\tThe "big" game\tAbstract.\thttps://x\t[{"Label": "NFL"}]\t[]',
    "N2\tweather\tweather\tRain\t\thttps://y\t[]\t[]",
    "N3\tnews\tnewsus\tVotes, counted\tB.\thttps://z\t[]\t[]",
)
PAGES = (
    "1\tU1\t11/11/2019 9:05:58 AM\tN3 N3 N1 N9\tN1-1 N2-0",
    "2\tU2\t11/11/2019 12:00:01 PM\t\tN3-0",
    "3\tU1\t11/12/2019 1:30:00 PM\tN1 N1 N1 N1\tN3-0 N1-0 N2-1",
)


@pytest.fixture
def mind(tmp_path):
    write(tmp_path / "news.tsv", *NEWS)
    write(tmp_path / "behaviors.tsv", *PAGES)
    return tmp_path


def test_mind_pages_become_exposures_with_clicks(mind):
    result = tables("mind", mind)
    shown = columns(result.interactions, "interaction_id", "user_id", "video_id", "page_id", "position", "clicked")
    assert shown[:3] == [
        ("1-0", "U1", "N1", "1", 0, True),
        ("1-1", "U1", "N2", "1", 1, False),
        ("2-0", "U2", "N3", "2", 0, False),
    ]
    assert [s[5] for s in shown[3:]] == [False, False, True]
    assert set(result.interactions["task"].to_pylist()) == {"click"}
    times = result.interactions["timestamp"].to_pylist()
    assert times[0] == times[1] == 1573463158000
    assert times[2] == 1573473601000
    assert columns(result.videos, "video_id", "title", "tags") == [
        ("N1", 'The "big" game', ["sports", "football_nfl"]),
        ("N2", "Rain", ["weather"]),
        ("N3", "Votes, counted", ["news", "newsus"]),
    ]
    assert result.files["behaviors.tsv"].rows_out == 3


def test_mind_interests_come_from_before_the_first_page_only(mind):
    """The second page's history could hold clicks of the first page, which are to be predicted."""
    result = tables("mind", mind)
    assert columns(result.users, "user_id", "tags") == [("U1", ["newsus", "football_nfl"]), ("U2", [])]
    assert any("these 4 clicks" in note for note in result.notes)


def test_mind_parts_keep_their_impressions_apart(tmp_path):
    for part in ("MINDsmall_dev", "MINDsmall_train"):
        write(tmp_path / part / "news.tsv", *NEWS)
        write(tmp_path / part / "behaviors.tsv", PAGES[0].replace("11/11", "11/15" if "dev" in part else "11/11"))
    result = tables("mind", tmp_path)
    pages = ["MINDsmall_dev/1", "MINDsmall_dev/1", "MINDsmall_train/1", "MINDsmall_train/1"]
    assert result.interactions["page_id"].to_pylist() == pages
    assert result.videos.num_rows == 3
    assert rejects(result)[0] == ("MINDsmall_train/news.tsv", 1, "video_id", "duplicate")


def test_mind_rows_that_cannot_be_read_are_set_aside_or_refuse_the_file(mind):
    faults = (
        "4\tU1\t2019-11-12 13:30:00\t\tN1-1",
        "5\tU1\t11/12/2019 1:30:00 PM\t\tN1 N2",
        "6\tU1\t11/12/2019 1:30:00 PM\t\tN1-2",
        "7\tU1",
        "1\tU1\t11/12/2019 1:30:00 PM\t\tN1-1",
    )
    write(mind / "behaviors.tsv", *PAGES, *faults)
    assert sorted(rejects(tables("mind", mind, max_bad_rows=0.6))) == [
        ("behaviors.tsv", 4, "time", "not a time as 11/15/2019 8:55:22 AM"),
        ("behaviors.tsv", 5, "shown", "not news with -0 or -1 (clicked)"),
        ("behaviors.tsv", 6, "shown", "not news with -0 or -1 (clicked)"),
        ("behaviors.tsv", 7, None, "too few values"),
        ("behaviors.tsv", 8, "impression", "duplicate"),
    ]
    refused("mind", mind, "behaviors.tsv", "4 of 8 rows", "row 4", "source.max_bad_rows")
    write(mind / "behaviors.tsv", "1\tU1\t11/12/2019 1:30:00 PM\t\tN1 N2")
    refused("mind", mind, "behaviors.tsv", "row 1", "-0 or -1")
    refused("mind", mind / "nowhere", "no behaviors.tsv")
    (mind / "news.tsv").unlink()
    write(mind / "behaviors.tsv", *PAGES)
    refused("mind", mind, "news.tsv: no such file")


# Netflix Prize

TITLES = ("1,2003,Dinosaur Planet", "2,1997,Lola, Rennt, É", "3,NULL,Untitled", "4,2000,No ratings")


@pytest.fixture
def netflix(tmp_path):
    write(tmp_path / "movie_titles.csv", *TITLES, encoding="latin-1")
    write(
        tmp_path / "combined_data_1.txt",
        "1:",
        "1488844,3,2005-09-06",
        "822109,5,2005-05-13",
        "2:",
        "822109,1,2004-01-01",
    )
    write(tmp_path / "combined_data_2.txt", "3:", "1488844,4,2005-10-19")
    return tmp_path


RATED = [
    ("1488844", "1", 3.0, 1125964800000, False, False),
    ("822109", "1", 5.0, 1115942400000, True, False),
    ("822109", "2", 1.0, 1072915200000, False, True),
    ("1488844", "3", 4.0, 1129680000000, True, False),
]


def test_netflix_ratings_belong_to_the_film_above_them(netflix):
    result = tables("netflix", netflix)
    assert columns(result.interactions, "user_id", "video_id", "rating", "timestamp", "liked", "disliked") == RATED
    assert columns(result.videos, "video_id", "title") == [
        ("1", "Dinosaur Planet (2003)"),
        ("2", "Lola, Rennt, É (1997)"),
        ("3", "Untitled"),
        ("4", "No ratings (2000)"),
    ]
    assert {name: (c.rows_in, c.rows_out) for name, c in result.files.items()} == {
        "combined_data_1.txt": (3, 3),
        "combined_data_2.txt": (1, 1),
        "movie_titles.csv": (4, 4),
    }


def test_netflix_training_set_gives_the_same(netflix):
    for film in ("1", "2", "3"):
        lines = [f"{u},{int(s)},{d}" for u, f, s, d in zip(*_dated(), strict=True) if f == film]
        write(netflix / "training_set" / f"mv_000000{film}.txt", f"{film}:", *lines)
    for path in netflix.glob("combined_data_*"):
        path.unlink()
    source = SourceSettings(kind="netflix", path=str(netflix))
    before = source_identity(source)
    assert columns(read_source(source).interactions, "user_id", "video_id", "rating", "timestamp") == [
        row[:4] for row in RATED
    ]
    write(netflix / "training_set" / "mv_0000003.txt", "3:", "1,4,2005-10-19")
    assert source_identity(source) != before


def _dated():
    dates = ("2005-09-06", "2005-05-13", "2004-01-01", "2005-10-19")
    return [r[0] for r in RATED], [r[1] for r in RATED], [r[2] for r in RATED], dates


def test_netflix_lines_that_cannot_be_read_are_set_aside_or_refuse_the_file(netflix):
    write(netflix / "combined_data_2.txt", "7,3,2005-01-01", "3:", "7,6,2005-01-01", "7,3,2005-13-01", "7,3,2005-01-02")
    with (netflix / "combined_data_2.txt").open("a") as f:
        f.write("7,4,2005-01-03\n8,3\n")
    result = tables("netflix", netflix, max_bad_rows=1)
    assert sorted(rejects(result)) == [
        ("combined_data_2.txt", 1, "line", "no film above it"),
        ("combined_data_2.txt", 3, "line", "neither FILM: nor USER,STARS,DATE"),
        ("combined_data_2.txt", 4, "line", "not a time between 1990 and 2100"),
        ("combined_data_2.txt", 6, "video_id", "duplicate"),
        ("combined_data_2.txt", 7, "line", "neither FILM: nor USER,STARS,DATE"),
    ]
    refused("netflix", netflix, "combined_data_2.txt", "row 3", "source.max_bad_rows")
    refused("netflix", netflix / "training_set", "no combined_data_*.txt")
    (netflix / "movie_titles.csv").unlink()
    refused("netflix", netflix, "movie_titles.csv: no such file", max_bad_rows=1)


# Yelp


def lines(*records: dict) -> list[str]:
    return [json.dumps(r) for r in records]


def review(number: int, user: str, place: str, stars: float, date: str = "2018-07-07 22:09:11") -> dict:
    more = {"useful": 0, "funny": 0, "cool": 1, "text": "Good.\nVery."}
    return {"review_id": f"r{number}", "user_id": user, "business_id": place, "stars": stars, "date": date, **more}


@pytest.fixture
def yelp(tmp_path):
    prefix = "yelp_academic_dataset_"
    places = (
        {"business_id": "b1", "name": "Joe's", "city": "Tampa", "stars": 4.5, "categories": "Pizza, Bars & Pubs"},
        {"business_id": "b2", "name": "Old", "city": "", "categories": None, "attributes": {"WiFi": "u'free'"}},
        {"business_id": "b3", "name": "List", "categories": ["Doctors", "Health & Medical"], "attributes": None},
    )
    write(tmp_path / f"{prefix}business.json", *lines(*places))
    write(
        tmp_path / f"{prefix}review.json",
        *lines(review(1, "u1", "b1", 5.0), review(2, "u2", "b1", 2.0, "2011-01-02"), review(3, "u1", "b9", 3.0)),
    )
    users = ({"user_id": "u1", "name": "Ann", "yelping_since": "2007-01-25 16:47:26", "average_stars": 3.9},)
    write(tmp_path / f"{prefix}user.json", *lines(*users))
    return tmp_path


def test_yelp_reviews_places_and_users(yelp):
    result = tables("yelp", yelp)
    assert columns(result.interactions, "interaction_id", "user_id", "video_id", "rating", "liked", "disliked") == [
        ("r1", "u1", "b1", 5.0, True, False),
        ("r2", "u2", "b1", 2.0, False, True),
        ("r3", "u1", "b9", 3.0, False, False),
    ]
    assert result.interactions["timestamp"].to_pylist()[:2] == [1531001351000, 1293926400000]
    assert columns(result.videos, "video_id", "title", "tags") == [
        ("b1", "Joe's", ["Pizza", "Bars & Pubs", "Tampa"]),
        ("b2", "Old", []),
        ("b3", "List", ["Doctors", "Health & Medical"]),
        ("b9", None, []),
    ]
    assert [(u, dict(other)) for u, other in columns(result.users, "user_id", "other")] == [
        ("u1", {"on Yelp since": "2007"}),
        ("u2", {}),
    ]
    text = str(result.users.to_pylist() + result.videos.to_pylist())
    assert "Ann" not in text
    assert "3.9" not in text


def test_yelp_needs_the_reviews_only_packed_or_not(tmp_path):
    write(tmp_path / "review.json", *lines(review(1, "u1", "b1", 5.0)))
    (tmp_path / "review.json").rename(tmp_path / "plain")
    (tmp_path / "review.json.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    result = tables("yelp", tmp_path)
    assert columns(result.interactions, "user_id", "video_id") == [("u1", "b1")]
    assert any("no file of places" in note for note in result.notes)


def test_yelp_lines_that_cannot_be_read_are_set_aside_or_refuse_the_file(yelp):
    good = lines(review(1, "u1", "b1", 5.0))
    bad = [
        *lines(review(2, "u1", "b1", 6), review(3, "u1", "b1", 4, "soon"), review(1, "u3", "b1", 4)),
        '{"review_id":',
    ]
    path = write(yelp / "yelp_academic_dataset_review.json", *good, *bad)
    result = tables("yelp", yelp, max_bad_rows=1)
    assert sorted(rejects(result)) == [
        (path.name, 2, "stars", "above 5"),
        (path.name, 3, "date", "not a time between 1990 and 2100"),
        (path.name, 4, "review_id", "duplicate"),
        (path.name, 5, None, "not JSON"),
    ]
    refused("yelp", yelp, path.name, "row 2", "source.max_bad_rows")
    path.write_text("")
    refused("yelp", yelp, "the file is empty")
    path.unlink()
    refused("yelp", yelp, "no yelp_academic_dataset_review.json")


# Further on


def test_mind_becomes_a_data_set_of_the_click_task(tmp_path):
    """From pages to users with history and targets: what the reader gives is what the filters and splits take."""
    write(tmp_path / "d" / "news.tsv", *NEWS)
    pages = [
        f"{day}{user}\tU{user}\t11/{day}/2019 9:05:58 AM\t\tN1-{(day + user) % 2} N2-0 N3-1"
        for day in range(11, 15)
        for user in range(4)
    ]
    write(tmp_path / "d" / "behaviors.tsv", *pages)
    changes = ["min_video_views=0", "min_user_exposures=1", "click_targets=3", "min_history=1", "test_users=2"]
    settings = load_settings("tiny", ["source.kind=mind", f"source.path={tmp_path / 'd'}", *changes])
    stages.make(["ifvr"], Run(tmp_path / "r"), settings)
    ifvr = Run(tmp_path / "r").artifact("ifvr").table("interactions")
    assert ifvr.num_rows == 48
    assert ifvr["role"].to_pylist().count("target") == 12
