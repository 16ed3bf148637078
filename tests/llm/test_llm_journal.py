"""The journal loses no finished call, whatever the number of writers and whenever they are killed."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gubs.llm import journal as module
from gubs.llm.calls import Entry
from gubs.llm.errors import JournalError
from gubs.llm.journal import Journal, JournalWriter, check_same


def entry(key, text="t", **kw):
    return Entry(key=key, role="matcher", label=key, endpoint="e", request={"messages": []}, text=text, **kw)


def write(folder, *entries):
    async def main():
        writer = JournalWriter(folder)
        places = await asyncio.gather(*(writer.append(e) for e in entries))
        await writer.close()
        return writer.segment, places

    return asyncio.run(main())


WRITER = """
import asyncio, sys
from gubs.llm.calls import Entry
from gubs.llm.journal import JournalWriter
async def main(folder, name, n):
    writer = JournalWriter(folder)
    async def one(i):
        key = f"{name}-{i}"
        await writer.append(Entry(key=key, role="matcher", label="x", endpoint="e", request={}, text="é" * 200))
        print(f"{name}-{i}", flush=True)
    for start in range(0, n, 50):
        await asyncio.gather(*(one(i) for i in range(start, start + 50)))
    await writer.close()
asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def start_writer(folder, name, n):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), name, str(n)], stdout=subprocess.PIPE, text=True
    )


def test_concurrent_writers_lose_nothing(tmp_path):
    writers = [start_writer(tmp_path, f"w{i}", 500) for i in range(4)]
    assert [w.wait(60) for w in writers] == [0] * 4
    journal = Journal(tmp_path)
    assert len(journal) == 2000
    assert all(f"w{w}-{i}" in journal for w in range(4) for i in range(500))


def test_a_killed_writer_loses_nothing_it_reported_as_done(tmp_path):
    writer = start_writer(tmp_path, "w", 1_000_000)
    lines = [writer.stdout.readline().strip() for _ in range(300)]
    os.kill(writer.pid, signal.SIGKILL)
    lines += [line.strip() for line in writer.stdout if line.endswith("\n")]
    writer.wait(10)
    journal = Journal(tmp_path)
    assert len(lines) >= 300
    assert all(line in journal for line in lines)


def test_many_entries_at_once_share_a_few_fsyncs(tmp_path, monkeypatch):
    syncs = []
    real = os.fsync
    monkeypatch.setattr(module.os, "fsync", lambda fd: (syncs.append(fd), time.sleep(0.01), real(fd)))
    write(tmp_path, *(entry(f"k{i}") for i in range(1000)))
    assert len(syncs) < 20
    assert len(Journal(tmp_path)) == 1000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10_000), texts=st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_a_truncated_segment_lacks_only_its_last_entries(tmp_path_factory, cut, texts):
    folder = tmp_path_factory.mktemp("journal")
    segment, places = write(folder, *(entry(f"k{i}", text) for i, text in enumerate(texts)))
    path = folder / segment
    data = path.read_bytes()
    cut %= len(data) + 1
    path.write_bytes(data[:cut])
    whole = [p for p in places if p.offset + p.length <= cut]
    journal = Journal(folder)
    assert len(journal) == len(whole)
    assert path.stat().st_size == sum(p.length for p in whole), "the torn end is cut off"
    for i, _ in enumerate(whole):
        assert journal.get(f"k{i}").text == texts[i].encode("utf-8", "replace").decode()


def test_zeros_after_a_power_cut_are_cut_off(tmp_path):
    segment, _ = write(tmp_path, entry("a"))
    path = tmp_path / segment
    path.write_bytes(path.read_bytes() + b"\0" * 4096)
    assert len(Journal(tmp_path)) == 1
    assert b"\0" not in path.read_bytes()


def test_the_torn_end_of_a_living_writer_is_left_alone(tmp_path):
    async def main():
        writer = JournalWriter(tmp_path)
        await writer.append(entry("a"))
        path = tmp_path / writer.segment
        with path.open("ab") as f:
            f.write(b'{"key": "b", half')
        size = path.stat().st_size
        assert len(Journal(tmp_path)) == 1
        assert path.stat().st_size == size
        await writer.close()

    asyncio.run(main())


def test_damage_in_the_middle_is_an_error(tmp_path):
    segment, places = write(tmp_path, entry("a"), entry("b"))
    path = tmp_path / segment
    data = bytearray(path.read_bytes())
    data[2] = ord("\\")
    path.write_bytes(data)
    with pytest.raises(JournalError, match="damaged at byte 0"):
        Journal(tmp_path)
    assert path.read_bytes() == bytes(data)
    assert len(places) == 2


def test_only_answers_last_and_failures_are_replayed(tmp_path):
    write(tmp_path, entry("a", failure="unreachable"), entry("b", failure="rejected"), entry("c"))
    journal = Journal(tmp_path)
    assert [key in journal for key in "abc"] == [False, False, True]
    assert Journal(tmp_path, writable=False).get("a").failure == "unreachable"
    (again,) = (later := [entry("b", failure="rate_limited")])
    _, (place,) = write(tmp_path, *later)
    journal.add(again, place)
    assert journal.get("b").failure == "rate_limited", "a failure counts for the run in which it happened"
    assert Journal(tmp_path, writable=False).get("b").failure == "rate_limited", "a replay shows what the last run saw"


def test_attempts_that_others_followed_cost_but_end_no_call(tmp_path):
    write(tmp_path, entry("a", retried=True, failure="unreachable", tokens_in=7, tokens_out=0))
    write(tmp_path, entry("b", retried=True, failure="rate_limited", billed=False))
    for journal in (Journal(tmp_path), Journal(tmp_path, writable=False)):
        assert "a" not in journal
        assert (journal.total.calls, journal.total.tokens_in) == (1, 7)


def test_journals_of_earlier_versions_are_read(tmp_path):
    segment, _ = write(tmp_path, entry("a"))
    path = tmp_path / segment
    path.write_text(path.read_text().replace('"retried": false', '"lasting": true'))
    assert Journal(tmp_path).get("a").text == "t"


def test_an_answer_replaces_a_failure(tmp_path):
    write(tmp_path, entry("a", failure="unreachable"))
    write(tmp_path, entry("a", "now"))
    assert Journal(tmp_path).get("a").text == "now"
    assert Journal(tmp_path, writable=False).get("a").text == "now"


def test_a_replay_changes_nothing(tmp_path):
    segment, _ = write(tmp_path, entry("a"))
    path = tmp_path / segment
    path.write_bytes(path.read_bytes() + b"torn")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(Journal(tmp_path, writable=False)) == 1
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    with pytest.raises(JournalError, match="no journal"):
        Journal(tmp_path / "none", writable=False)


def test_reports_are_added_without_reading_and_in_any_order(tmp_path):
    journal = Journal(tmp_path)
    entries = [entry("a"), entry("b"), entry("c")]
    _, places = write(tmp_path, *entries)
    journal.add(entries[0], places[0])
    journal.add(entries[2], places[2])  # b's report is still on its way
    journal.add(entries[1], places[1])
    assert journal.total.calls == 3
    assert [journal.get(k).key for k in "abc"] == ["a", "b", "c"]


def test_a_full_disk_is_an_error_and_leaves_no_half_line(tmp_path, monkeypatch):
    async def main():
        writer = JournalWriter(tmp_path)
        await writer.append(entry("a"))
        real = os.write

        def short(fd, data):
            real(fd, data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.os, "write", short)
        with pytest.raises(JournalError, match="No space left"):
            await writer.append(entry("b"))
        monkeypatch.setattr(module.os, "write", real)
        await writer.append(entry("c"))
        await writer.close()

    asyncio.run(main())
    journal = Journal(tmp_path)
    assert ("a" in journal, "b" in journal, "c" in journal) == (True, False, True)


def test_an_unused_segment_leaves_no_file(tmp_path):
    write(tmp_path)
    assert not list(Path(tmp_path).glob("*.jsonl"))


def test_another_journal_at_the_same_path_is_noticed(tmp_path):
    ident = Journal(tmp_path / "a").id
    Journal(tmp_path / "b")
    check_same(tmp_path / "a", ident)
    for other in ("b", "c"):
        with pytest.raises(JournalError, match="share"):
            check_same(tmp_path / other, ident)
