"""The frame stage and its store: every content decoded once, whoever is killed; bad files set aside, never a crash."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from films import film, number, sound

from gubs.artifacts import Run
from gubs.config import FrameSettings, Settings
from gubs.data.decoded import Decoded, DecodeOptions, Verdict
from gubs.data.frame_store import FACTS, FrameStore
from gubs.data.frame_worker import FETCHING, MAX_ATTEMPTS, Limits, Worker
from gubs.data.frames import _batches, extract_frames, frame_stage
from gubs.data.ledger import Ledger
from gubs.errors import ArtifactError, PlatformError

SETTINGS = FrameSettings(count=4, max_pixels=16 * 28 * 28, workers=2, timeout_s=20)
OPTIONS = DecodeOptions.of(SETTINGS)
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve different videos."""
    folder = tmp_path_factory.mktemp("films")
    return [str(film(folder / f"{i}.mp4", frames=24, first=i)) for i in range(12)]


def ids(paths: list[str]) -> list[tuple[str, str | None]]:
    return [(f"v{i}", p) for i, p in enumerate(paths)]


# --- the store ---


def row(tag: str, verdict: Verdict = Verdict.OK) -> tuple[str, Decoded]:
    frames = [f"{tag}-{k}".encode() for k in range(2)] if verdict == "ok" else []
    return tag, Decoded(verdict, frames=frames, times_s=[0.0, 1.0] if frames else [], width=28, height=28)


def test_store_gives_back_what_it_got_in_the_order_asked(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row(f"h{i}") for i in range(20)])
    store.write_part("b", [row(f"h{i}") for i in range(20, 23)])
    asked = ["h22", "h7", "h19", "h0", "h7", "h20"]
    found = store.lookup(asked)
    assert found["content_hash"].to_pylist() == asked
    assert found["frames"].to_pylist() == [[f"{h}-0".encode(), f"{h}-1".encode()] for h in asked]
    assert store.lookup(asked, FACTS).column_names == FACTS
    assert store.lookup([]).num_rows == 0


def test_store_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nope"):
        FrameStore(str(tmp_path), OPTIONS).lookup(["nope"])


def test_store_reads_only_the_row_groups_it_needs(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row(f"h{i}") for i in range(20)])
    assert pq.ParquetFile(store._path("a")).metadata.num_row_groups == 3


def test_other_pixels_are_another_store(tmp_path: Path) -> None:
    keys = {
        FrameStore(str(tmp_path), DecodeOptions(**kwargs)).key
        for kwargs in ({}, {"count": 4}, {"max_pixels": 784}, {"min_pixels": 784}, {"quality": 80})
    }
    assert len(keys) == 5
    assert FrameStore(str(tmp_path), DecodeOptions(max_file_mb=1)).key == FrameStore(str(tmp_path), DecodeOptions()).key


def test_half_written_files_are_ignored_and_cleaned(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row("h")])
    dead = subprocess.Popen(["true"])
    dead.wait()
    host = os.uname().nodename
    old, new, other = (
        Path(f"{store._path('b')}.tmp-{o}-abcdef") for o in (f"{host}-{dead.pid}", f"{host}-{os.getpid()}", "x-1")
    )
    for path in (old, new, other):
        path.write_bytes(b"half")
    assert list(store.index()) == ["h"]
    assert store.clean() == 1
    assert not old.exists()
    assert new.exists()
    assert other.exists()
    os.utime(other, (0, 0))
    assert store.clean() == 1


def test_damaged_part_is_named(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row("h")])
    Path(store._path("a")).write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ArtifactError, match=r"part-a\.parquet cannot be read"):
        store.index()


def test_failures_of_the_machine_can_be_retried(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row("t", Verdict.TIMEOUT), row("u", Verdict.UNDECODABLE), row("o")])
    assert store.done() == {"t", "u", "o"}
    assert store.done(retry_failed=True) == {"u", "o"}
    store.write_part("b", [row("t")])
    store.write_part("c", [row("o", Verdict.TIMEOUT)])
    index = store.index(refresh=True)
    assert (index["t"].part, index["o"].part) == ("b", "a")


def test_store_works_on_any_file_system() -> None:
    store = FrameStore("memory://frames-test", OPTIONS)
    store.write_part("a", [row("h")])
    assert store.clean() == 0
    assert store.lookup(["h"])["frames"].to_pylist() == [[b"h-0", b"h-1"]]


# --- the ledger ---


def test_a_content_belongs_to_one_batch_also_when_that_is_tried_again() -> None:
    ledger = Ledger({"old"})
    assert [ledger.begin(1), ledger.begin(2), ledger.begin(1)] == [1, 1, 2]
    assert ledger.claim(1, ["old", "new", "newer"]) == [False, True, True]
    assert [ledger.claim(2, ["new"]), ledger.claim(1, ["new"])] == [[False], [True]]


# --- the stage ---


def test_without_ray_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(PlatformError, match=r"ray\.init"):
        extract_frames([], SETTINGS, str(tmp_path))


def test_good_bad_and_double(films: list[str], tmp_path: Path, ray_local: None) -> None:
    shutil.copy(films[0], tmp_path / "again.mp4")
    film(tmp_path / os.fsdecode(b"\xff.mp4"), frames=3, first=99)
    sound(tmp_path / "sound.m4a")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    local = ["again.mp4", os.fsdecode(b"\xff.mp4"), "sound.m4a", "text.mp4", "empty.mp4", "pipe.mp4", "gone.mp4"]
    videos = [*ids([*films, *local]), ("nothing", None), ("url", f"file://{films[1]}")]
    seen: list[tuple[int, int]] = []
    store_uri = str(tmp_path / "store")
    summary, table = extract_frames(
        videos, SETTINGS, store_uri, lambda done, total, _: seen.append((done, total)), base=str(tmp_path)
    )
    assert table["video_id"].to_pylist() == [v for v, _ in videos]
    verdicts = table["verdict"].to_pylist()
    assert verdicts[:14] == ["ok"] * 14
    assert verdicts[14:] == ["no_video_stream", "undecodable", "empty", "unreadable", "missing", "missing", "ok"]
    assert table["frames"].to_pylist()[:14] == [4] * 14
    assert table["uri"][13].as_py() == r"\xff.mp4"
    hashes = table["content_hash"].to_pylist()
    assert hashes[0] == hashes[12]
    assert hashes[16:20] == [None] * 4
    assert (summary.videos, summary.contents, summary.decoded) == (21, 15, 15)
    assert sum(summary.verdicts.values()) == 21
    assert seen[-1] == (21, 21)
    store = FrameStore(store_uri, OPTIONS)
    frames = store.lookup(hashes[:12])["frames"].to_pylist()
    assert [[number(f) for f in video] for video in frames] == [[i + k for k in (3, 9, 15, 21)] for i in range(12)]

    before = {p: p.stat().st_mtime_ns for p in Path(summary.store).iterdir()}
    again, same = extract_frames(videos, SETTINGS, store_uri, base=str(tmp_path))
    assert again.decoded == 0
    assert same == table
    assert {p: p.stat().st_mtime_ns for p in Path(summary.store).iterdir()} == before


def test_stage_writes_its_artifact_once(films: list[str], tmp_path: Path, ray_local: None) -> None:
    run = Run(tmp_path / "runs" / "one")
    settings = Settings(frames=SETTINGS)
    videos = pa.table({"video_id": ["a", "b"], "uri": [films[0], "/nowhere.mp4"]})
    artifact = frame_stage(run, settings, videos, {"raw": "1"})
    assert artifact.table("frames")["verdict"].to_pylist() == ["ok", "missing"]
    assert artifact.manifest.info["verdicts"] == {"missing": 1, "ok": 1}
    assert Path(artifact.manifest.info["store"]).is_dir()
    assert Path(artifact.manifest.info["store"]).parent == tmp_path / "runs" / "frame-store"
    faster = settings.model_copy(update={"frames": SETTINGS.model_copy(update={"workers": 1, "timeout_s": 5.0})})
    assert frame_stage(run, faster, videos, {"raw": "1"}).manifest.created == artifact.manifest.created
    with pytest.raises(ArtifactError, match="other settings"):
        frame_stage(run, settings, videos, {"raw": "2"})


class _Server(http.server.ThreadingHTTPServer):
    """Serves a folder; what has `held` in its name only after `released` is set."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        if "held" in self.path:
            self.server.released.wait(600)
        with contextlib.suppress(OSError):  # whoever asked may have been killed
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(films: list[str], tmp_path: Path) -> Iterator[_Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(films[0], folder / "0.mp4")
    film(folder / "held.mp4", frames=24, first=200)
    with _Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def test_remote_files_are_fetched(server: _Server, films: list[str], tmp_path: Path, ray_local: None) -> None:
    videos = ids([f"{server.address}/0.mp4", f"{server.address}/gone.mp4", films[0], "nosuchscheme://x/y.mp4"])
    summary, table = extract_frames(videos, SETTINGS, str(tmp_path / "store"))
    assert table["verdict"].to_pylist() == ["ok", "missing", "ok", "unreadable"]
    assert summary.decoded == 1


class _Asking(Worker):
    """A worker without Ray: it asks a ledger of its own process."""

    def _ask(self, question: str, *args: object) -> object:
        return getattr(self.ledger, question)(*args)


def test_nothing_fetched_is_left_behind(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what came late, nor what was on its way when the ledger failed. Looks into a folder of its own."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("1.mp4", "2.mp4", "3.mp4"):
        (tmp_path / "served" / name).write_bytes((tmp_path / "served" / "0.mp4").read_bytes() + name.encode())
    worker = _Asking(OPTIONS, Limits(2.0, 2048), str(tmp_path / "store"), "run", Ledger(set()))
    names = ["0.mp4", "held.mp4", "gone.mp4", "1.mp4", "2.mp4"]
    files, stored = worker._decode_batch(0, list(enumerate(f"{server.address}/{name}" for name in names)), {})
    assert [f.verdict for f in files] == ["ok", "timeout", "missing", "ok", "ok"]
    assert len(stored) == 3
    assert not list(folder.iterdir()), "the one that is still on its way has no file either"

    def claim(*_: object) -> list[bool]:
        raise RuntimeError("the ledger is gone")

    monkeypatch.setattr(worker.ledger, "claim", claim)
    with pytest.raises(RuntimeError, match="ledger"):
        worker._decode_batch(1, [(i, f"{server.address}/{i % 4}.mp4") for i in range(24)], {})
    server.released.set()
    for thread in [t for t in threading.enumerate() if t.name == FETCHING]:
        thread.join(20)
    assert not list(folder.iterdir())
    worker.decoder.close()


@pytest.mark.slow
def test_a_server_that_never_answers_costs_one_verdict(
    server: _Server, films: list[str], tmp_path: Path, ray_local: None
) -> None:
    quick = SETTINGS.model_copy(update={"timeout_s": 4.0})
    _, table = extract_frames(ids([f"{server.address}/held.mp4", films[0]]), quick, str(tmp_path / "store"))
    assert table["verdict"].to_pylist() == ["timeout", "ok"]


@pytest.mark.slow
def test_decoders_and_workers_may_die(server: _Server, tmp_path: Path, ray_local: None) -> None:
    """Decoder processes and a whole worker are killed in the middle; every video still gets its row, once."""
    paths = [str(film(tmp_path / f"{i}.mp4", frames=60, first=i)) for i in range(39)]
    paths.append(f"{server.address}/held.mp4")  # the run cannot end before both are killed
    killed: list[str] = []

    def kill(done: int, total: int, counts: object) -> None:
        if len(killed) == 2 or done < 4:
            return
        decoders = [p for p in psutil.Process().children(recursive=True) if "gubs.data.decoder_process" in _line(p)]
        if decoders:
            victim = decoders[0] if not killed else decoders[-1].parent()
            killed.append(_line(victim))
            victim.kill()
        if len(killed) == 2:
            server.released.set()

    summary, table = extract_frames(ids(paths), SETTINGS, str(tmp_path / "store"), kill)
    assert len(killed) == 2
    counts = Counter(table["verdict"].to_pylist())
    assert counts["ok"] >= 38
    assert set(counts) <= {"ok", "crashed"}
    hashes = _stored(Path(summary.store))
    assert len(hashes) == len(set(hashes)) == 40
    retried, _ = extract_frames(ids(paths), SETTINGS, str(tmp_path / "store"), retry_failed=True)
    assert retried.verdicts == {"ok": 40}


@pytest.mark.slow
def test_a_worker_may_die_as_it_starts(tmp_path: Path, ray_local: None) -> None:
    """One is killed while it waits for its decoder to come up; another takes its place."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for decoder in psutil.Process().children(recursive=True):
                if "gubs.data.decoder_process" not in _line(decoder):
                    continue
                decoder.suspend()  # it cannot get ready any more
                killed.append(decoder.parent().pid)
                decoder.parent().kill()
                decoder.kill()
                break

    killer = threading.Thread(target=kill)
    killer.start()
    _, table = extract_frames(ids([str(film(tmp_path / f"{i}.mp4")) for i in range(4)]), SETTINGS, str(tmp_path / "s"))
    killer.join()
    assert len(killed) == 1
    assert table["verdict"].to_pylist() == ["ok"] * 4


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _stored(folder: Path) -> list[str]:
    parts = sorted(folder.glob("*.parquet"))
    return [h for p in parts for h in pq.read_table(p, columns=["content_hash"])["content_hash"].to_pylist()]


DRIVER = """
import logging, sys
import ray
from gubs.config import FrameSettings
from gubs.data.frames import extract_frames
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20,
         logging_level=logging.ERROR, log_to_driver=False)
settings = FrameSettings(count=4, max_pixels=16 * 28 * 28, workers=2, timeout_s=100)
summary, table = extract_frames([(p, p) for p in sys.argv[2:]], settings, sys.argv[1])
print("DECODED", summary.decoded, summary.verdicts)
"""


@pytest.mark.slow
def test_killed_run_continues_where_it_was(server: _Server, films: list[str], tmp_path: Path) -> None:
    """SIGKILL to everything half-way; the second run decodes only what is not in the store."""
    paths = [f"{server.address}/held.mp4", *films]  # the first run cannot end: it waits for this one
    folder = tmp_path / "store" / FrameStore("x", OPTIONS).key
    temporary = tmp_path / "temporary"  # what the killed run has fetched stays there
    temporary.mkdir()
    command = [sys.executable, "-c", DRIVER, str(tmp_path / "store"), *paths]
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "RAY_AUTH_MODE": "disabled",
        "TMPDIR": str(temporary),
        "RAY_TMPDIR": "/tmp",
    }
    first = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.parquet"))) < 5:
        assert first.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    os.killpg(first.pid, signal.SIGKILL)
    for process in family:  # Ray's own processes have sessions of their own
        _kill(process)
    first.wait()
    while not all(_ended(process) for process in family):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("*.parquet")}
    done = _stored(folder)
    assert 5 <= len(done) < 13

    server.released.set()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert f"DECODED {13 - len(done)} {{'ok': 13}}" in second.stdout
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before} == before
    hashes = _stored(folder)
    assert len(hashes) == len(set(hashes)) == 13
    assert not list(folder.glob("*.tmp-*"))


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _ended(process: psutil.Process) -> bool:
    """Also where nobody has collected it: orphans wait for that in some containers."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_batch_that_kills_its_workers_is_given_up(films: list[str], tmp_path: Path) -> None:
    """Told without Ray: the worker asks the ledger, which has seen this batch too often."""
    ledger = Ledger(set())
    worker = _Asking(OPTIONS, Limits(20.0, 2048), str(tmp_path), "run", ledger)
    (batch,) = _batches([films[0]], 1)
    block = pa.table({k: [v] for k, v in batch.items()})
    assert worker(block)["verdict"].to_pylist() == ["ok"]
    assert worker(block)["verdict"].to_pylist() == ["ok"]  # its part is there: not decoded again
    assert worker.decoder.restarts == 0
    for _ in range(MAX_ATTEMPTS - 2):
        worker(block)
    assert worker(block)["verdict"].to_pylist() == ["crashed"]
    worker.decoder.close()
