"""The frame stage and its store: each content is decoded once, whatever is killed; bad files never crash it."""

import contextlib
import functools
import hashlib
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
from artifact_helpers import put
from video_files import frame_number, make_sound, make_video

from gubs import stages
from gubs.artifacts import Run
from gubs.config import Settings
from gubs.data.settings import SourceSettings
from gubs.errors import ArtifactError, PlatformError
from gubs.records import conform, empty
from gubs.video.claims import Claims
from gubs.video.decode_worker import FETCHING, MAX_ATTEMPTS, DecodeWorker, Limits
from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.frame_store import FACTS, FrameStore
from gubs.video.frames import _batches, extract_frames
from gubs.video.settings import FrameSettings

SETTINGS = FrameSettings(count=4, max_pixels=16 * 28 * 28, workers=2, timeout_s=20)
OPTIONS = DecodeOptions.of(SETTINGS)
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def twelve_videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Twelve different videos."""
    folder = tmp_path_factory.mktemp("videos")
    return [str(make_video(folder / f"{i}.mp4", frames=24, first=i)) for i in range(12)]


def ids(paths: list[str]) -> list[tuple[str, str | None]]:
    return [(f"v{i}", p) for i, p in enumerate(paths)]


# --- the store ---


def row(tag: str, verdict: Verdict = Verdict.OK) -> tuple[str, Decoded]:
    frames = [f"{tag}-{k}".encode() for k in range(2)] if verdict == "ok" else []
    return tag, Decoded(verdict, frames=frames, times_s=[0.0, 1.0] if frames else [], width=28, height=28)


def test_store_returns_rows_in_the_requested_order(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row(f"h{i}") for i in range(20)])
    store.write_part("b", [row(f"h{i}") for i in range(20, 23)])
    asked = ["h22", "h7", "h19", "h0", "h7", "h20"]
    rows = store.lookup(asked)
    assert rows["content_hash"].to_pylist() == asked
    assert rows["frames"].to_pylist() == [[f"{h}-0".encode(), f"{h}-1".encode()] for h in asked]
    assert store.lookup(asked, FACTS).column_names == FACTS
    assert store.lookup([]).num_rows == 0


def test_store_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nope"):
        FrameStore(str(tmp_path), OPTIONS).lookup(["nope"])


def test_store_reads_only_the_row_groups_it_needs(tmp_path: Path) -> None:
    store = FrameStore(str(tmp_path), OPTIONS)
    store.write_part("a", [row(f"h{i}") for i in range(20)])
    assert pq.ParquetFile(store._path("a")).metadata.num_row_groups == 3


def test_settings_that_change_pixels_have_another_store(tmp_path: Path) -> None:
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


# --- the claims ---


def test_a_content_belongs_to_one_batch_even_if_the_batch_is_repeated() -> None:
    claims = Claims({"old"})
    assert [claims.begin(1), claims.begin(2), claims.begin(1)] == [1, 1, 2]
    assert claims.claim(1, ["old", "new", "newer"]) == [False, True, True]
    assert [claims.claim(2, ["new"]), claims.claim(1, ["new"])] == [[False], [True]]


# --- the stage ---


def test_without_ray_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(PlatformError, match=r"ray\.init"):
        extract_frames([], SETTINGS, str(tmp_path))


def test_good_bad_and_repeated_files(twelve_videos: list[str], tmp_path: Path, ray_local: None) -> None:
    shutil.copy(twelve_videos[0], tmp_path / "again.mp4")
    make_video(tmp_path / os.fsdecode(b"\xff.mp4"), frames=3, first=99)
    make_sound(tmp_path / "sound.m4a")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    local = ["again.mp4", os.fsdecode(b"\xff.mp4"), "sound.m4a", "text.mp4", "empty.mp4", "pipe.mp4", "gone.mp4"]
    videos = [*ids([*twelve_videos, *local]), ("nothing", None), ("url", f"file://{twelve_videos[1]}")]
    seen: list[tuple[int, int]] = []
    store_uri = str(tmp_path / "store")
    summary, table = extract_frames(
        videos, SETTINGS, store_uri, lambda *counts: seen.append(counts), base=str(tmp_path)
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
    assert [[frame_number(f) for f in video] for video in frames] == [
        [i + k for k in (3, 9, 15, 21)] for i in range(12)
    ]

    before = {p: p.stat().st_mtime_ns for p in Path(summary.store).iterdir()}
    again, same = extract_frames(videos, SETTINGS, store_uri, base=str(tmp_path))
    assert again.decoded == 0
    assert same == table
    assert {p: p.stat().st_mtime_ns for p in Path(summary.store).iterdir()} == before


def add_videos(run: Run, files: dict[str, str | None]) -> None:
    """A data set of videos with these files."""
    videos = pa.table({"video_id": list(files), "uri": pa.array(files.values(), pa.string())})
    tables = {"videos": conform(videos, "videos"), "users": empty("users"), "interactions": empty("ifvr")}
    put(run, "ifvr", tables)


def make_frames(run: Run, settings: Settings, *, force: bool = False) -> dict[str, object]:
    """The table of verdicts by video, after `gubs frames` on the data set as it is."""
    stages.make(["frames"], run, settings, force=force, as_made=["ifvr"])
    table = run.artifact("frames").table("frames")
    return dict(zip(table["video_id"].to_pylist(), table["verdict"].to_pylist(), strict=True))


def test_stage_writes_its_artifact_once(twelve_videos: list[str], tmp_path: Path, ray_local: None) -> None:
    run = Run(tmp_path / "runs" / "one")
    settings = Settings(source=SourceSettings(kind="logs", path="/elsewhere"), frames=SETTINGS)
    add_videos(run, {"a": twelve_videos[0], "b": "/nowhere.mp4", "c": None})
    assert make_frames(run, settings) == {"a": "ok", "b": "missing"}, "a video without a file has nothing to decode"
    manifest = run.artifact("frames").manifest
    assert manifest.info["verdicts"] == {"missing": 1, "ok": 1}
    assert manifest.summary == "1 missing, 1 ok"
    assert Path(manifest.info["store"]).is_dir()
    assert Path(manifest.info["store"]).parent == tmp_path / "runs" / "frame-store"
    assert "frames" in (tmp_path / "runs" / "one" / "show.html").read_text()

    file = tmp_path / "runs" / "one" / "frames" / "manifest.json"
    before = file.stat().st_mtime_ns
    faster = settings.model_copy(update={"frames": SETTINGS.model_copy(update={"workers": 1, "timeout_s": 5.0})})
    make_frames(run, faster)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(stages.StaleError, match=r"frames\.count=4, now 6"):
        make_frames(run, settings.model_copy(update={"frames": SETTINGS.model_copy(update={"count": 6})}))
    add_videos(run, {"a": twelve_videos[0], "b": twelve_videos[1]})
    with pytest.raises(stages.StaleError, match="made from another ifvr"):
        make_frames(run, settings)
    assert make_frames(run, settings, force=True) == {"a": "ok", "b": "ok"}
    assert run.artifact("frames").manifest.info["decoded"] == 1, "the other one is in the store"


def test_force_decodes_again_what_the_machine_failed_at(
    twelve_videos: list[str], tmp_path: Path, ray_local: None
) -> None:
    run = Run(tmp_path / "runs" / "one")
    settings = Settings(source=SourceSettings(kind="logs", path="/elsewhere"), frames=SETTINGS)
    add_videos(run, {"a": twelve_videos[0]})
    content = hashlib.sha256(Path(twelve_videos[0]).read_bytes()).hexdigest()
    failed = (content, Decoded(Verdict.TIMEOUT, "took too long"))
    FrameStore(str(tmp_path / "runs" / "frame-store"), OPTIONS).write_part("a", [failed])
    assert make_frames(run, settings) == {"a": "timeout"}
    assert make_frames(run, settings) == {"a": "timeout"}
    assert make_frames(run, settings, force=True) == {"a": "ok"}


class _Server(http.server.ThreadingHTTPServer):
    """Serves a folder; files with `held` in their names only after `released` is set."""

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
        with contextlib.suppress(OSError):  # the client may have been killed
            super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(twelve_videos: list[str], tmp_path: Path) -> Iterator[_Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(twelve_videos[0], folder / "0.mp4")
    make_video(folder / "held.mp4", frames=24, first=200)
    with _Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def test_remote_files_are_fetched(server: _Server, twelve_videos: list[str], tmp_path: Path, ray_local: None) -> None:
    videos = ids([f"{server.address}/0.mp4", f"{server.address}/gone.mp4", twelve_videos[0], "nosuchscheme://x/y.mp4"])
    summary, table = extract_frames(videos, SETTINGS, str(tmp_path / "store"))
    assert table["verdict"].to_pylist() == ["ok", "missing", "ok", "unreadable"]
    assert summary.decoded == 1


class _Asking(DecodeWorker):
    """A worker without Ray: the claims are in the same process."""

    def _ask(self, question: str, *args: object) -> object:
        return getattr(self.claims, question)(*args)


def test_nothing_fetched_is_left_behind(server: _Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither files that arrive late nor those on their way when the claims fail stay in the temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name in ("1.mp4", "2.mp4", "3.mp4"):
        (tmp_path / "served" / name).write_bytes((tmp_path / "served" / "0.mp4").read_bytes() + name.encode())
    worker = _Asking(OPTIONS, Limits(2.0, 2048), str(tmp_path / "store"), "run", Claims(set()))
    names = ["0.mp4", "held.mp4", "gone.mp4", "1.mp4", "2.mp4"]
    files, stored = worker._decode_batch(0, list(enumerate(f"{server.address}/{name}" for name in names)), {})
    assert [f.verdict for f in files] == ["ok", "timeout", "missing", "ok", "ok"]
    assert len(stored) == 3
    assert not list(folder.iterdir()), "nor a file of the one that is still on its way"

    def claim(*_: object) -> list[bool]:
        raise RuntimeError("the claims are gone")

    monkeypatch.setattr(worker.claims, "claim", claim)
    with pytest.raises(RuntimeError, match="claims"):
        worker._decode_batch(1, [(i, f"{server.address}/{i % 4}.mp4") for i in range(24)], {})
    server.released.set()
    for thread in [t for t in threading.enumerate() if t.name == FETCHING]:
        thread.join(20)
    assert not list(folder.iterdir())
    worker.decoder.close()


@pytest.mark.slow
def test_a_server_that_never_answers_costs_one_verdict(
    server: _Server, twelve_videos: list[str], tmp_path: Path, ray_local: None
) -> None:
    quick = SETTINGS.model_copy(update={"timeout_s": 4.0})
    _, table = extract_frames(ids([f"{server.address}/held.mp4", twelve_videos[0]]), quick, str(tmp_path / "store"))
    assert table["verdict"].to_pylist() == ["timeout", "ok"]


@pytest.mark.slow
def test_decoders_and_workers_may_die(server: _Server, tmp_path: Path, ray_local: None) -> None:
    """A decoder process and a whole worker are killed in the middle; every video still gets one row."""
    paths = [str(make_video(tmp_path / f"{i}.mp4", frames=60, first=i)) for i in range(39)]
    paths.append(f"{server.address}/held.mp4")  # the run cannot end before both are killed
    killed: list[str] = []

    def kill(done: int, total: int) -> None:
        if len(killed) == 2 or done < 4:
            return
        decoders = [p for p in psutil.Process().children(recursive=True) if "gubs.video.decoder_process" in _line(p)]
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
    """One is killed while its decoder starts; another replaces it."""
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 180
        while not killed and time.monotonic() < deadline:
            for decoder in psutil.Process().children(recursive=True):
                if "gubs.video.decoder_process" not in _line(decoder):
                    continue
                decoder.suspend()  # so that it never becomes ready
                killed.append(decoder.parent().pid)
                decoder.parent().kill()
                decoder.kill()
                break

    killer = threading.Thread(target=kill)
    killer.start()
    _, table = extract_frames(
        ids([str(make_video(tmp_path / f"{i}.mp4")) for i in range(4)]), SETTINGS, str(tmp_path / "s")
    )
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
from gubs.video.frames import extract_frames
from gubs.video.settings import FrameSettings
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20,
         logging_level=logging.ERROR, log_to_driver=False)
settings = FrameSettings(count=4, max_pixels=16 * 28 * 28, workers=2, timeout_s=100)
summary, table = extract_frames([(p, p) for p in sys.argv[2:]], settings, sys.argv[1])
print("DECODED", summary.decoded, summary.verdicts)
"""


@pytest.mark.slow
def test_killed_run_continues_where_it_was(server: _Server, twelve_videos: list[str], tmp_path: Path) -> None:
    """Everything gets SIGKILL half-way; the second run decodes only what is not in the store."""
    paths = [f"{server.address}/held.mp4", *twelve_videos]  # the first run waits for this one and cannot end
    folder = tmp_path / "store" / FrameStore("x", OPTIONS).key
    temporary = tmp_path / "temporary"  # files that the killed run fetched stay here
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
        assert first.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    family = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    os.killpg(first.pid, signal.SIGKILL)
    for process in family:  # Ray's processes have other sessions
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
    """True also for zombies: nothing reaps orphans in some containers."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_batch_that_kills_its_workers_is_given_up(twelve_videos: list[str], tmp_path: Path) -> None:
    """Without Ray: the claims have seen this batch too often."""
    claims = Claims(set())
    worker = _Asking(OPTIONS, Limits(20.0, 2048), str(tmp_path), "run", claims)
    (batch,) = _batches([twelve_videos[0]], 1)
    block = pa.table({k: [v] for k, v in batch.items()})
    assert worker(block)["verdict"].to_pylist() == ["ok"]
    assert worker(block)["verdict"].to_pylist() == ["ok"]  # its part exists: not decoded again
    assert worker.decoder.restarts == 0
    for _ in range(MAX_ATTEMPTS - 2):
        worker(block)
    assert worker(block)["verdict"].to_pylist() == ["crashed"]
    worker.decoder.close()
