"""A log in any number of parts gives the data set that it gives in one, row for row, in this process and on Ray."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gubs import stages
from gubs.artifacts import Artifact, Run
from gubs.config import Settings, load_settings
from gubs.data.filters import apply_filters
from gubs.data.ifvr import IFVR
from gubs.data.ingest import in_file_order
from gubs.data.partition import Users, cut, draw_hashes, hashes, parts_of
from gubs.data.sources import read_source
from gubs.data.splits import split
from gubs.records import Task
from gubs.report.data import describe
from gubs.simulator.behaviour import simulate

SMALL = ("synthetic.users=90", "synthetic.videos=60", "views_per_user=24", "exposures_per_user=24")
LIMITS = ("filters.min_video_views=3", "filters.min_user_exposures=8", "splits.test_users=7", "splits.ugm_users=9")


def made(folder: Path, *overrides: str, target: str = "ifvr") -> tuple[Run, Settings]:
    run, settings = Run(folder), load_settings("tiny", [*LIMITS, *overrides])
    stages.make([target], run, settings)
    return run, settings


def part_rows(rows: int, parts: int) -> str:
    return f"data.part_rows={max(1, round(rows / parts))}"


def tables_of(artifact: Artifact) -> dict[str, pa.Table]:
    return {name: artifact.table(name) for name in artifact.manifest.tables}


def assert_data_set(run: Run, settings: Settings, interactions: pa.Table) -> None:
    """The artifact `ifvr` holds what the plain functions make of the whole log."""
    kept, steps = apply_filters(interactions, settings.filters)
    expected = split(kept, settings.splits, settings.seed)
    ifvr = run.artifact("ifvr")
    assert ifvr.table("interactions").equals(expected.interactions)
    assert expected.interactions.num_rows > 100
    assert cut_once(ifvr.table("user_splits")).equals(expected.users)
    assert ifvr.manifest.info["splits"] == expected.report
    assert ifvr.table("filter_steps").to_pylist() == [vars(s) for s in steps]
    for table, key in (("users", "user_id"), ("videos", "video_id")):
        assert set(ifvr.table(table)[key].to_pylist()) == set(expected.interactions[key].to_pylist())


def cut_once(table: pa.Table) -> pa.Table:
    (ordered,) = cut(table, 1)
    return ordered


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_the_simulated_app_in_any_number_of_parts(tmp_path: Path, parts: int) -> None:
    settings = load_settings("tiny", SMALL)
    log = simulate(settings.synthetic, settings.seed).interactions
    run, settings = made(tmp_path / "r", *SMALL, part_rows(log.num_rows, parts))
    assert len(run.artifact("raw").parts("interactions")) == parts
    assert_data_set(run, settings, log)


def test_a_task_that_the_filters_take_away_is_in_the_notes(tmp_path: Path) -> None:
    run, _ = made(tmp_path, *SMALL, "filters.min_user_exposures=1000", "data.part_rows=1000")
    ifvr = run.artifact("ifvr")
    assert set(ifvr.table("interactions")["task"].to_pylist()) == {"sequential"}
    [note] = ifvr.manifest.info["notes"]
    assert note.startswith("The click task is gone")
    assert "filters.min_user_exposures=1000" in note


def movielens_like(folder: Path) -> tuple[str, ...]:
    rng = np.random.default_rng(1)
    rows = {(int(u), int(40 * v**2)) for u, v in zip(rng.integers(0, 40, 1500), rng.random(1500), strict=True)}
    lines = [f"{u}\t{v}\t{1 + (u + v) % 5}\t{900_000_000 + 37 * i % 5000}" for i, (u, v) in enumerate(sorted(rows))]
    folder.mkdir()
    (folder / "u.data").write_text("\n".join(lines) + "\n")
    films = ["|".join([str(v), f"Film {v}", "", "", "", *["0"] * 19]) for v in range(40)]
    (folder / "u.item").write_text("\n".join(films) + "\n")
    return ("source.kind=movielens", f"source.path={folder}")


def kuairand_like(folder: Path) -> tuple[str, ...]:
    rng = np.random.default_rng(2)
    folder.mkdir()
    names = "user_id,video_id,time_ms,is_click,is_like,is_hate,play_time_ms,duration_ms,tab"
    rows = [
        f"{rng.integers(50)},{int(30 * rng.random() ** 2)},{1650812741000 + int(rng.integers(10**6))},"
        f"{rng.integers(2)},0,0,{rng.integers(30000)},{rng.choice([0, 9000, 20000])},{rng.choice([0, 1, 2, 8])}"
        for _ in range(2500)
    ]
    (folder / "log_standard_1_pure.csv").write_text("\n".join([names, *rows, rows[0]]) + "\n")
    videos = [f"{v},{v},NORMAL,UNKNOWN,9000.0,,{v % 5}" for v in range(30)]
    head = "video_id,author_id,video_type,upload_type,video_duration,music_type,tag"
    (folder / "video_features_basic_pure.csv").write_text("\n".join([head, *videos]) + "\n")
    head = "user_id,user_active_degree,is_live_streamer,is_video_author,follow_user_num_range,fans_user_num_range"
    users = [f"{u},full_active,0,0,0,0,0,8-14" for u in range(50)]
    (folder / "user_features_pure.csv").write_text(
        "\n".join([f"{head},friend_user_num_range,register_days_range", *users]) + "\n"
    )
    return ("source.kind=kuairand", f"source.path={folder}")


@pytest.mark.parametrize("like", [movielens_like, kuairand_like])
def test_known_sources_in_any_number_of_parts(tmp_path: Path, like) -> None:
    source = like(tmp_path / "logs")
    tables = read_source(load_settings("tiny", source).source)
    log, rows = tables.interactions, max(count.rows_in for count in tables.files.values())
    for parts in (1, 3, 17):
        run, settings = made(tmp_path / f"r{parts}", *source, part_rows(rows, parts))
        assert len(run.artifact("raw").parts("interactions")) == parts
        assert_data_set(run, settings, log)


ROWS = 3000
BARE = {"task": "sequential", "page_id": None, "watch_s": None, "clicked": None, "timestamp": 1_702_000_000}


def own_log(folder: Path, n: int = ROWS, files: int = 3) -> tuple[str, ...]:
    """A log with views and clicks, in files of three formats, with every fault that rows can have."""
    rng = np.random.default_rng(3)
    (folder / "interactions").mkdir(parents=True)
    for f in range(files):
        rows = [row(rng, f * n // files + i) for i in range(n // files)]
        rows += [{**rows[0], "interaction_id": f"again-{f}"}, {**rows[1], "user_id": "u7", "timestamp": 1_700_000_999}]
        rows += [
            {**rows[2], "watch_s": -1},
            {**rows[3], "task": "scroll"},
            {**rows[4], **BARE, "interaction_id": f"bare-{f}"},
        ]
        write_rows(folder / "interactions" / f"part-{f}", rows, f)
    users = [{"user_id": f"u{u}", "age": 20 + u, "city": "Rome"} for u in range(30)]
    (folder / "users.jsonl").write_text("".join(json.dumps(u) + "\n" for u in users))
    lengths = "".join(f"v{v},{10 + v % 20}\n" for v in range(25))
    (folder / "videos.csv").write_text(f"video_id,duration_s\n{lengths}")
    return ("source.kind=logs", f"source.path={folder}", "source.max_bad_rows=0.05")


def row(rng: np.random.Generator, i: int) -> dict[str, object]:
    click = bool(rng.integers(2))
    base = {"interaction_id": f"i{i}", "user_id": f"u{rng.integers(40)}", "video_id": f"v{int(25 * rng.random() ** 2)}"}
    return base | {
        "timestamp": 1_700_000_000 + int(rng.integers(10**6)),
        "task": "click" if click else "sequential",
        "page_id": f"p{i // 5}" if click else None,
        "clicked": int(rng.integers(2)) if click else None,
        "watch_s": None if click else float(rng.integers(1, 25)),
    }


def write_rows(path: Path, rows: list[dict[str, object]], kind: int) -> None:
    if kind % 3 == 0:
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path.with_suffix(".parquet"), row_group_size=max(1, len(rows) // 4))
    elif kind % 3 == 1:
        path.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        text = "\n".join(",".join("" if v is None else str(v) for v in r.values()) for r in rows)
        path.with_suffix(".csv").write_text(",".join(rows[0]) + "\n" + text + "\n")


def expected_raw(settings: Settings) -> dict[str, pa.Table]:
    tables = read_source(settings.source)
    cut_tables = {name: cut_once(getattr(tables, name)) for name in ("users", "interactions")}
    return cut_tables | {"videos": tables.videos, "rejects": in_file_order(tables.rejects)}


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_your_own_logs_in_any_number_of_parts(tmp_path: Path, parts: int) -> None:
    source = own_log(tmp_path / "logs")
    assert_own_log(tmp_path / "r", source, parts)


def test_your_own_logs_on_ray(tmp_path: Path, ray_local: None) -> None:
    assert_own_log(tmp_path / "r", own_log(tmp_path / "logs"), 5, "data.ray_from_rows=0")


@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=pytest.mark.engine)])
def test_json_lines_with_a_late_column_in_parts(tmp_path: Path, on_ray: bool, request: pytest.FixtureRequest) -> None:
    """The head of the file, its first 4 MiB, lacks `rating`: the log is read again, and keeps nothing of the first
    time.
    """
    if on_ray:
        request.getfixturevalue("ray_local")
    rng = np.random.default_rng(4)
    rows = [row(rng, i) | {"watch_s": 1.0 + i % 20, "duration_s": 30} for i in range(30_000)]
    rows[-1] |= {"rating": 4.0, "seen_on": "tv"}
    rows[5]["watch_s"] = -1
    (tmp_path / "interactions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = (
        "source.kind=logs",
        f"source.path={tmp_path}",
        part_rows(30_000, 3),
        f"data.ray_from_rows={0 if on_ray else 10**9}",
    )
    run, settings = made(tmp_path / "r", *source, target="raw")
    raw, expected = run.artifact("raw"), expected_raw(settings)
    assert {name: raw.table(name).equals(table) for name, table in expected.items()} == dict.fromkeys(expected, True)
    assert raw.table("interactions")["rating"].null_count == raw.table("interactions").num_rows - 1
    assert "Columns of interactions.jsonl that are not used: seen_on." in raw.manifest.info["notes"]
    assert not run.fs.exists(raw.path("work"))


def assert_own_log(folder: Path, source: tuple[str, ...], parts: int, *more: str) -> None:
    run, settings = made(folder, *source, part_rows(ROWS, parts), *more)
    raw, tables = run.artifact("raw"), read_source(settings.source)
    assert abs(len(raw.parts("interactions")) - parts) <= 1 + parts // 4, "the rows of text are an estimate"
    for name, table in expected_raw(settings).items():
        assert raw.table(name).equals(table), name
    causes = {"duplicate", "below 0", "unknown task", "no play rate"}
    assert causes <= set(tables.rejects["cause"].to_pylist())
    info = raw.manifest.info
    assert {n: f["rows_out"] for n, f in info["files"].items()} == {n: f.rows_out for n, f in tables.files.items()}
    assert {n: f["rejected"] for n, f in info["files"].items()} == {n: f.rejected for n, f in tables.files.items()}
    assert sorted(info["notes"]) == sorted(tables.notes)
    assert_data_set(run, settings, tables.interactions)
    assert not run.fs.exists(raw.path("work"))


def test_a_glob_and_a_uri_give_the_same_tables(tmp_path: Path) -> None:
    import fsspec

    source = own_log(tmp_path / "logs")
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "logs"), "/scale-logs", recursive=True)
    paths = [tmp_path / "logs", tmp_path / "logs/interactions/part-*", "memory://scale-logs"]
    read = [read_source(load_settings("tiny", [*source, f"source.path={p}"]).source) for p in paths]
    for tables in read[1:]:
        assert tables.interactions.equals(read[0].interactions)
        assert tables.users.equals(read[0].users)
    fs.rm("/scale-logs", recursive=True)


def test_readers_see_the_same_data_in_parts_and_read_only_what_they_need(tmp_path: Path, monkeypatch) -> None:
    whole, _ = made(tmp_path / "whole", *SMALL)
    cut_up, _ = made(tmp_path / "parts", *SMALL, "data.part_rows=250")
    one, many = IFVR(whole), IFVR(cut_up)
    assert many.log().equals(one.log())
    pages = [describe(run).to_json() | {"run": "", "created": ""} for run in (whole, cut_up)]
    rates = [page.pop("rates") for page in pages]
    assert pages[0] == pages[1]
    assert [r.pop("value") for r in rates[0]] == pytest.approx([r.pop("value") for r in rates[1]])
    assert rates[0] == rates[1]
    opened: list[str] = []
    read = Artifact._open
    monkeypatch.setattr(Artifact, "_open", lambda self, part: (opened.append(part.file), read(self, part))[1])
    for task in Task:
        assert many.targets(task).equals(one.targets(task))
        assert many.log(["user_id"], task).equals(one.log(["user_id"], task))
    users = sorted(one.users)[:2]
    opened.clear()
    assert many.history_log(users, ["interaction_id"]).equals(one.history_log(users, ["interaction_id"]))
    assert many.people(users, Task.CLICK) == one.people(users, Task.CLICK)
    assert len({f for f in opened if f.startswith("interactions/")}) <= 2 * 2
    assert len(many.artifact.parts("interactions")) > 10


def test_hashes_are_the_same_on_every_machine_and_in_every_version() -> None:
    ids = pa.array(["", "u1", "über"])
    assert hashes(ids).tolist() == [82580763770842553, 12042548758073860989, 14769853575440544071]
    assert draw_hashes(ids, 7, 1).tolist() == [16197341045491512290, 3638127981806947125, 18269146972717242373]


def test_parts_are_ranges_of_hashes() -> None:
    ordered = np.sort(hashes(pa.array([f"u{i}" for i in range(5000)])))
    for parts in (1, 3, 17):
        of = parts_of(ordered, parts)
        assert (np.diff(of) >= 0).all()
        assert set(of.tolist()) == set(range(parts))
        assert np.bincount(of).max() < 1.5 * 5000 / parts


def test_users_stand_in_one_order_and_their_rows_keep_theirs() -> None:
    rng = np.random.default_rng(0)
    table = pa.table({"user_id": [f"u{i}" for i in rng.integers(0, 50, 500)], "row": range(500)})
    whole = cut_once(table)
    for parts in (3, 17):
        assert pa.concat_tables(list(cut(table, parts))).equals(whole)
    rows = dict(zip(*(whole[c].to_pylist() for c in ("user_id", "row")), strict=True))
    assert list(rows) == Users.of(table["user_id"]).ids.to_pylist()
    own = whole.filter(pa.compute.equal(whole["user_id"], "u3"))["row"].to_pylist()
    assert own == sorted(own)
