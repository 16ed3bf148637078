"""Agent4Rec's layout: lines of ids, divided into three files."""

import pytest

from gubs.data.settings import SourceSettings
from gubs.data.sources import read_source
from gubs.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.txt").write_text("0 5 3\n1 4\n")
    (tmp_path / "valid.txt").write_text("0 7\n1\n")
    (tmp_path / "test.txt").write_text("0 9\n\n1 5 6\n")
    (tmp_path / "movie_detail.csv").write_text(
        "movie_id,title,genres,rating,summary\n3,A (1995),Drama|War,4.1,It.\n5,B,,3,\n"
    )
    return tmp_path


def test_parts_and_films_are_read(folder):
    t = read_source(SourceSettings(kind="agent4rec", path=str(folder)))
    log = zip(t.interactions["user_id"].to_pylist(), t.interactions["video_id"].to_pylist(), strict=True)
    assert list(log) == [("0", "5"), ("0", "3"), ("1", "4"), ("0", "7"), ("0", "9"), ("1", "5"), ("1", "6")]
    assert t.parts["part"].to_pylist() == ["train"] * 3 + ["valid"] + ["test"] * 3
    assert t.parts["interaction_id"].to_pylist() == t.interactions["interaction_id"].to_pylist()
    films = {v["video_id"]: (v["title"], v["tags"]) for v in t.videos.to_pylist()}
    assert films["3"] == ("A (1995)", ["Drama", "War"])
    assert films["9"] == (None, [])


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("valid.txt", "0 5\n", "twice"),
        ("test.txt", "0 5,6\n", "test.txt: row 1"),
        ("train.txt", None, "no train.txt"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, file, text, message):
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(InputError, match=message):
        read_source(SourceSettings(kind="agent4rec", path=str(folder)))
