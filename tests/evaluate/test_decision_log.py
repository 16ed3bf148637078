"""The service's log of decisions against what test users did, as `gubs evaluate log` reads it."""

import json
import math

import pandas as pd
import pyarrow as pa
import pytest
from artifact_helpers import put
from small_world import WORLD

from gubs import stages
from gubs.artifacts import Run
from gubs.cli import app
from gubs.config import load_settings
from gubs.data.ifvr import IFVR
from gubs.errors import ArtifactError, InputError
from gubs.evaluate.decision_log import figures, happened
from gubs.records import SCHEMAS, Task
from gubs.serving.filter import Decision, Mode
from gubs.serving.schemas import Candidate, FilterRequest, Problem, Profile, Result, UserRef
from gubs.serving.shadow import SCHEMA, ShadowLog


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("log") / "run")
    stages.make(["ifvr"], run, load_settings("tiny", list(WORLD)))
    return run


def asked(user, videos, task=Task.SEQUENTIAL):
    ref = UserRef(id=user) if user else UserRef(profile=Profile(age=30))
    return FilterRequest(user=ref, task=task, candidates=[Candidate(id=v) for v in videos])


def results(skips):
    """Results with these probabilities by video; None = an error."""
    return [
        Result(index=i, id=v, decision=Decision.KEEP, error=Problem(code="pictures", message="none"))
        if p is None
        else Result(index=i, id=v, decision=Decision.DROP if p >= 0.5 else Decision.KEEP, skip_probability=p)
        for i, (v, p) in enumerate(skips.items())
    ]


def row(user, video, decision, skip, **more):
    """One row of the log."""
    whose = {"time_ms": 1, "request_id": None, "user_id": user, "video_id": video, "task": "sequential"}
    which = {"mode": "score", "app": "filter-a", "version": "a", "acted": True}
    outcome = {"decision": decision, "option": None, "skip_probability": skip, "threshold": 0.5, "error": None}
    return whose | which | outcome | more


def test_what_the_service_logs_is_judged_by_what_users_did(run, tmp_path, capsys):
    """Through the service's own writer and the command: one version knows the outcomes, its shadow says the opposite.
    Users who came with the request and videos that nobody was to watch match nothing, and are counted.
    """
    log, truth = ShadowLog(str(tmp_path / "log"), 3600), happened(IFVR(run))
    sequential = truth[truth["task"] == "sequential"]
    for user, rows in sequential.groupby("user_id"):
        right = {v: 0.8 if b else 0.1 for v, b in zip(rows["video_id"], rows["bad"], strict=True)}
        wrong = {v: 0.9 - p for v, p in right.items()}
        log.add("app", "new", asked(user, right), Mode.REASON, 0.5, results(right), acted=True)
        log.add("app", "old", asked(user, wrong), Mode.REASON, 0.5, results(wrong), acted=False)
    log.add("app", "new", asked(user, ["strange"]), Mode.REASON, 0.5, results({"strange": 0.9}), acted=True)
    log.add("app", "new", asked(None, right), Mode.REASON, 0.5, results(right), acted=True)
    log.flush()
    command = ["evaluate", "log", str(tmp_path / "log"), "--run", run.uri, "evaluate.bootstrap=20"]
    app([*command, "--json"], standalone_mode=False)
    new, old = json.loads(capsys.readouterr().out)
    assert (new["version"], new["mode"], new["shadow"], new["task"]) == ("new", "reason", False, "sequential")
    assert (old["version"], old["shadow"]) == ("old", True)
    assert new["targets"] == new["matched"] == old["matched"] == len(sequential)
    assert (new["decisions"], new["sent"]) == (len(sequential) + 1 + len(right), len(right))
    assert (new["coverage"], new["unjudged"], new["users"]) == (1, 0, sequential["user_id"].nunique())
    shares = [(f["bad_dropped"]["value"], f["good_dropped"]["value"], f["auc"]["value"]) for f in (new, old)]
    assert shares == [(1, 0, 1), (0, 1, 0)]
    bad = sequential["bad"].mean()
    assert new["brier"] == pytest.approx(0.04 * bad + 0.01 * (1 - bad))
    assert new["brier_constant"] == pytest.approx(bad * (1 - bad))
    app(command, standalone_mode=False)
    page = capsys.readouterr().out
    assert "old, reason, shadow" in page
    assert (
        f"{1 + len(right)} decisions match no test target ({len(right)} of users sent with the request, 1 other" in page
    )


TRUTH = pd.DataFrame(
    [
        *(("sequential", "u", f"v{i}", i < 2) for i in range(4)),
        *(("sequential", "w", f"v{i}", i < 1) for i in range(4)),
        ("click", "u", "v0", False),
    ],
    columns=["task", "user_id", "video_id", "bad"],
)


def of(*rows):
    return figures(pa.Table.from_pylist(list(rows), schema=SCHEMA), TRUTH, resamples=10, seed=0)


def test_the_figures_by_hand():
    """Eight targets, five of them decided about: two of three skips dropped, one of two watched."""
    (f,) = of(
        *(row("u", "v0", "drop", 0.9), row("u", "v1", "keep", 0.2), row("u", "v2", "drop", 0.6)),
        *(row("w", "v0", "drop", 0.7), row("w", "v1", "keep", 0.1)),
    )
    assert (f.decisions, f.matched, f.targets, f.users, f.coverage) == (5, 5, 5, 2, 5 / 8)
    assert (f.bad_dropped["value"], f.good_dropped["value"]) == (pytest.approx(2 / 3), 1 / 2)
    assert f.auc["value"] == pytest.approx(5 / 6)
    assert f.brier == pytest.approx((0.1**2 + 0.8**2 + 0.6**2 + 0.3**2 + 0.1**2) / 5)
    assert f.brier_constant == pytest.approx(0.6 * 0.4)


def test_the_latest_decision_about_a_target_counts():
    (f,) = of(row("u", "v0", "drop", 0.9, time_ms=2), row("u", "v0", "keep", 0.3, time_ms=1))
    assert (f.decisions, f.matched, f.targets, f.bad_dropped["value"]) == (2, 2, 1, 1)


def test_versions_modes_shadows_and_tasks_stand_apart():
    logged = of(
        *(row("u", "v0", "drop", 0.9, task="click"), row("u", "v0", "keep", 0.2, version="b", acted=False)),
        *(row("u", "v0", "drop", 0.9, mode="reason"), row("u", "v0", "drop", 0.9)),
    )
    assert [(f.task, f.version, f.mode, f.shadow, f.targets) for f in logged] == [
        ("sequential", "a", "reason", False, 1),
        ("sequential", "a", "score", False, 1),
        ("sequential", "b", "score", True, 1),
        ("click", "a", "score", False, 1),
    ]
    assert (logged[-1].coverage, logged[-1].good_dropped["value"]) == (1, 1)
    assert math.isnan(logged[-1].bad_dropped["value"]), "nothing there was to be dropped"


def test_a_decision_without_a_probability_counts_as_kept():
    (f,) = of(row("u", "v0", "keep", None, error="pictures"), row("u", "v2", "drop", 0.6))
    assert (f.targets, f.unjudged, f.bad_dropped["value"], f.good_dropped["value"]) == (2, 1, 0, 1)
    assert f.brier == pytest.approx(0.36)


def test_a_log_that_matches_nothing_says_so():
    (f,) = of(row("stranger", "v0", "drop", 0.9), row(None, "v1", "drop", 0.9))
    assert (f.decisions, f.sent, f.matched, f.coverage) == (2, 1, 0, 0)
    assert all(math.isnan(x) for x in (f.auc["value"], f.brier, f.bad_dropped["value"]))


def test_without_decisions_or_targets_there_is_an_error(run, tmp_path):
    with pytest.raises(InputError, match=r"serving\.log_dir"):
        of()
    empty = Run(tmp_path / "run")
    put(empty, "ifvr", {"interactions": SCHEMAS["ifvr"].empty_table()})
    with pytest.raises(ArtifactError, match=r"splits\.test_users"):
        happened(IFVR(empty))


def test_of_a_video_seen_twice_the_first_time_counts(tmp_path):
    facts = {"user_id": "u", "video_id": "v", "task": "sequential", "split": "test", "role": "target"}
    rates = [(5, 0.9, "later"), (3, 0.1, "first")]
    rows = [{**facts, "interaction_id": i, "timestamp": t, "play_rate": p} for t, p, i in rates]
    run = Run(tmp_path / "run")
    put(run, "ifvr", {"interactions": pa.Table.from_pylist(rows, schema=SCHEMAS["ifvr"])})
    assert happened(IFVR(run))["bad"].tolist() == [True]
