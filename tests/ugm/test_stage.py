"""The UGM end to end over real HTTP: the artifact, SIGKILL and continue, offline replay, budgets."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from ugm_helpers import categories

from gubs.artifacts import Run, writing
from gubs.config import load_settings
from gubs.data.build import build_stage
from gubs.data.ingest import ingest_stage
from gubs.llm.errors import BudgetReachedError, NotInJournalError
from gubs.records import GroupProfile, conform
from gubs.ugm.stage import ugm_stage, ugm_users

BASE = ["users=120", "videos=60", "test_users=15", "ugm_users=60", "ugm.groups=4", "top=15", "min_matched=3"]
BASE += ["context_tokens=60000"]
RULES = [
    {"match": "You sort the users", "text": categories([1, 2, 3, 4])},
    {"match": "You check whether", "text": "Match or not: Yes\nReason: fits"},
    {"match": "", "text": "Members like what they list; show them short and friendly videos."},
]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r")
    ingest_stage(run, load_settings("tiny", BASE))
    build_stage(run, load_settings("tiny", BASE))
    return run


def overrides(server, *more):
    return [
        *BASE,
        f"llm.endpoints.default.base_url={server.url}/v1",
        "llm.endpoints.default.model=m",
        "llm.actors=1",
        *more,
    ]


def calls(server):
    return server.stats()["calls"]


def test_artifact_offline_replay_and_nothing_to_do(run, server, ray_local):
    server.configure(rules=RULES)
    settings = load_settings("tiny", overrides(server))
    artifact, fresh = ugm_stage(run, settings)
    assert fresh
    groups = list(GroupProfile.from_table(artifact.table("groups")))
    assert len(groups) == 4
    assert all(g.final_profile and g.version == artifact.fingerprint for g in groups)
    assert all(m.matched and m.reason == "fits" for g in groups for m in g.members)
    assert all(min(m.similarity for m in g.members) == pytest.approx(g.threshold) for g in groups)
    memberships = artifact.table("memberships").to_pylist()
    made_from = set(ugm_users(run.artifact("ifvr")))
    assert {m["how"] for m in memberships} == {"matched", "assigned"}
    assert {m["user_id"] for m in memberships if m["how"] == "matched"} <= made_from
    assert not {m["user_id"] for m in memberships if m["how"] == "assigned"} & made_from
    count = sum(calls(server).values())
    assert ugm_stage(run, settings)[1] is False
    first = (artifact.table("groups"), artifact.table("memberships"))
    server.configure(rules=[{"match": "", "status": 500, "text": ""}])
    replayed, _ = ugm_stage(run, load_settings("tiny", overrides(server, "llm.mode=replay")), force=True)
    assert (replayed.table("groups"), replayed.table("memberships")) == first
    assert sum(calls(server).values()) == count, "a replay makes no call"
    with pytest.raises(NotInJournalError):
        ugm_stage(run, load_settings("tiny", overrides(server, "llm.mode=replay", "ugm.groups=5")), force=True)


def test_no_prompt_shows_what_is_to_be_predicted(run, server, ray_local):
    """Every target's title is made unique; none of them may be in what was sent, while the history's are."""
    server.configure(rules=RULES)
    settings = load_settings("tiny", overrides(server))
    ifvr = run.artifact("ifvr")
    log = ifvr.table("interactions")
    ids = [f"{role}-{v}" for role, v in zip(log["role"].to_pylist(), log["video_id"].to_pylist(), strict=True)]
    marked = log.set_column(log.column_names.index("video_id"), log.schema.field("video_id"), pa.array(ids))
    titles = sorted(set(ids))
    videos = conform(pa.table({"video_id": titles, "title": [f"film {t}" for t in titles]}), "videos")
    with writing(run, "ifvr", fingerprint="marked", settings=settings, inputs={}) as out:
        out.write_table("interactions", marked)
        out.write_table("videos", videos)
        for name in ("users", "user_splits"):
            out.write_table(name, ifvr.table(name))
    ugm_stage(run, settings)
    journal = "".join(p.read_text() for p in Path(run.path("llm-journal")).glob("*.jsonl"))
    assert "film history-" in journal
    assert "film target-" not in journal


def test_a_budget_stops_cleanly_and_can_be_raised(run, server, ray_local):
    server.configure(rules=RULES)
    with pytest.raises(BudgetReachedError, match="20"):
        ugm_stage(run, load_settings("tiny", overrides(server, "llm.budget.calls=20")))
    assert sum(calls(server).values()) == 20
    assert "ugm" not in run.stages()
    ugm_stage(run, load_settings("tiny", overrides(server)))
    assert max(calls(server).values()) == 1, "nothing was asked twice"


@pytest.mark.slow
def test_killed_run_continues_without_repeating_a_finished_call(run, server):
    server.configure(rules=[{**rule, "latency_s": 1.0} for rule in RULES])
    command = [
        sys.executable,
        "-m",
        "gubs.cli",
        "ugm",
        "--run",
        run.uri,
        *overrides(server, "llm.endpoints.default.max_concurrency=8"),
    ]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while sum(calls(server).values()) < 25:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(2.5)
    before = calls(server)
    server.configure(rules=RULES)
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    after = calls(server)
    repeated = [k for k, n in after.items() if n > before.get(k, 0) and before.get(k, 0)]
    assert len(repeated) <= 8, "only what was in flight at the kill is asked again"
    assert Run(run.uri).artifact("ugm").manifest.info["kept"] == 4
