"""The UGM end to end over real HTTP: the artifact, SIGKILL and resume, offline replay, budgets."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from artifact_helpers import put
from ugm_helpers import categories

from gubs import stages
from gubs.artifacts import Run
from gubs.cli import app
from gubs.config import load_settings
from gubs.data.ifvr import IFVR
from gubs.errors import SettingsError
from gubs.jobs import run_app
from gubs.llm.calls import estimate_prompt
from gubs.llm.errors import BudgetReachedError, IncompleteError, NotInJournalError
from gubs.records import GroupProfile, conform
from gubs.report.groups import purity_of, render
from gubs.teachers.profiles import SCHEMA as PROFILES
from gubs.ugm import oracle
from gubs.ugm.manager import foreseen_requests
from gubs.ugm.placement import Placement
from gubs.ugm.settings import UGMSettings
from gubs.ugm.stage import NoGroupsError, estimate, ugm_people, ugm_records
from gubs.ugm.summarize import SummaryError

BASE = ["users=120", "videos=60", "test_users=15", "ugm_users=60", "ugm.groups=4", "top=15", "min_matched=3"]
BASE += ["context_tokens=60000", "seed=8"]  # four typical users who each have others like them
RULES = [
    {"match": "You sort the users", "text": categories([1, 2, 3, 4])},
    {"match": "You check whether", "text": "Match or not: Yes\nReason: fits"},
    {"match": "", "text": "Members like what they list; show them short and friendly videos."},
]


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "r")
    stages.make(["ifvr"], run, load_settings("tiny", BASE))
    return run


def overrides(server, *more):
    endpoint = "llm.endpoints.default"
    return [*BASE, f"{endpoint}.base_url={server.url}/v1", f"{endpoint}.model=m", "llm.actors=1", *more]


def calls(server):
    return server.stats()["calls"]


def make_groups(run, settings, **options):
    stages.make(["ugm"], run, settings, **options)
    return run.artifact("ugm")


def journaled(run):
    """Every request and answer, as text."""
    return "".join(p.read_text() for p in Path(run.path("llm-journal")).glob("*.jsonl"))


def test_artifact_offline_replay_and_nothing_to_do(run, server, ray_local):
    server.configure(rules=RULES)
    settings = load_settings("tiny", overrides(server))
    foreseen = estimate(run, settings.ugm, settings.llm)
    assert foreseen.roles["summarizer"].calls == 1
    assert not calls(server), "an estimate asks nothing"
    artifact = make_groups(run, settings)
    groups = list(GroupProfile.from_table(artifact.table("groups")))
    assert len(groups) == 4
    assert all(g.final_profile and g.version == artifact.manifest.fingerprint for g in groups)
    assert all(m.matched and m.reason == "fits" for g in groups for m in g.members)
    assert all(min(m.similarity for m in g.members) == pytest.approx(g.threshold) for g in groups)
    memberships = artifact.table("memberships").to_pylist()
    made_from = set(IFVR(run).ugm_users)
    assert {m["how"] for m in memberships} == {"matched", "assigned"}
    assert {m["user_id"] for m in memberships if m["how"] == "matched"} <= made_from
    assert not {m["user_id"] for m in memberships if m["how"] == "assigned"} & made_from
    count = sum(calls(server).values())
    make_groups(run, settings)
    assert sum(calls(server).values()) == count
    first = (artifact.table("groups"), artifact.table("memberships"))
    server.configure(rules=[{"match": "", "status": 500, "text": ""}])
    replayed = make_groups(run, load_settings("tiny", overrides(server, "llm.mode=replay")), force=True)
    assert (replayed.table("groups"), replayed.table("memberships")) == first
    assert replayed.content == artifact.content
    assert sum(calls(server).values()) == count, "a replay makes no call"
    with pytest.raises(NotInJournalError):
        make_groups(run, load_settings("tiny", overrides(server, "llm.mode=replay", "ugm.groups=5")), force=True)


def test_no_prompt_shows_a_target(run, server, ray_local):
    """Titles are marked with the role of their record: prompts have those of histories and none of targets."""
    server.configure(rules=RULES)
    settings = load_settings("tiny", overrides(server))
    ifvr = run.artifact("ifvr")
    log = ifvr.table("interactions")
    ids = [f"{role}-{v}" for role, v in zip(log["role"].to_pylist(), log["video_id"].to_pylist(), strict=True)]
    marked = log.set_column(log.column_names.index("video_id"), log.schema.field("video_id"), pa.array(ids))
    titles = sorted(set(ids))
    videos = conform(pa.table({"video_id": titles, "title": [f"film {t}" for t in titles]}), "videos")
    kept = {name: ifvr.table(name) for name in ("users", "user_splits")}
    put(run, "ifvr", {"interactions": marked, "videos": videos, **kept}, settings=settings)
    make_groups(run, settings, as_made=["ifvr"])
    assert "film history-" in journaled(run)
    assert "film target-" not in journaled(run)


def test_groups_can_be_made_as_of_an_earlier_time(run):
    """Otherwise other users' later views would leak the future into a prompt about that time."""
    ifvr = IFVR(run)
    whole = ugm_people(ifvr, UGMSettings(history_items=3), tastes=False)
    times = sorted(v.timestamp for p in ifvr.people(ifvr.ugm_users).values() for v in p.history)
    then = times[len(times) // 2]
    until = datetime.fromtimestamp(then / 1000, UTC).isoformat()
    cut = ugm_people(ifvr, UGMSettings(history_items=3, until=until), tastes=False)
    assert [p.user for p in cut] == [p.user for p in whole]
    assert max(v.timestamp for p in whole for v in p.history) > then
    assert all(v.timestamp < then for p in cut for v in p.history)
    assert max(len(p.history) for p in cut) == 3, "the three latest before it, not those of the latest three"
    without_zone = ugm_people(ifvr, UGMSettings(history_items=3, until=until.removesuffix("+00:00")), tastes=False)
    assert without_zone == cut, "a time without a zone is UTC"


def test_profiles_of_users_without_tags_are_in_the_prompts_and_decide_the_group(run, server, ray_local):
    """One user that groups are made from and one other user have ratings instead of tags."""
    server.configure(rules=RULES)
    settings = load_settings("tiny", overrides(server))
    data, ifvr = IFVR(run), run.artifact("ifvr")
    inside, outside = data.ugm_users[-1], sorted(set(data.users) - set(data.ugm_users))[0]
    twin = data.users[data.ugm_users[1]]  # the typical user of the second group, by RULES
    users = ifvr.table("users").to_pylist()
    for row in users:
        if row["user_id"] in (inside, outside):
            row["tags"] = []
    kept = {name: ifvr.table(name) for name in ("interactions", "videos", "user_splits")}
    bare = pa.Table.from_pylist(users, schema=ifvr.table("users").schema)
    put(run, "ifvr", {**kept, "users": bare}, settings=settings)
    row = {"text": "Looks for what its twin likes.", "tags": twin.tags, "evidence": [], "n": 0, "until": None}
    tastes = pa.Table.from_pylist([{"user_id": u, **row} for u in (inside, outside)], schema=PROFILES)
    put(run, "profiles", {"profiles": tastes}, settings=settings)
    stages.make_stage("ugm", run, settings)
    assert "Looks for what its twin likes." in journaled(run)
    assert "interests by ratings" in journaled(run)
    memberships = run.artifact("ugm").table("memberships").to_pylist()
    groups = {u: {m["group_id"] for m in memberships if m["user_id"] == u} for u in (inside, outside)}
    assert "g01" in groups[inside]
    assert groups[outside] == {"g01"}, "the nearest one"
    without = load_settings("tiny", overrides(server, "teachers.profiles=false"))
    stages.make_stage("ugm", run, without)
    assert "profiles" not in run.artifact("ugm").manifest.recipe.inputs


def test_an_answer_with_too_few_groups_does_not_stop_every_later_run(run, server, ray_local):
    few = [{**RULES[0], "text": categories([1, 2, 3])}, *RULES[1:]]
    server.configure(rules=few)
    settings = load_settings("tiny", overrides(server))
    with pytest.raises(SummaryError, match="3 complete ones"):
        make_groups(run, settings)
    server.configure(rules=RULES)
    assert make_groups(run, settings).manifest.info["kept"] == 4


NONSENSE = {"match": "", "text": "As an AI language model, I cannot know these users, but I can help you."}


def test_profiles_that_are_not_about_the_group_do_not_stop_every_later_run(run, server, ray_local):
    server.configure(rules=[*RULES[:2], NONSENSE])
    message = r"4 of 4 answers of the profiler are missing \(unusable 4\).*same command resumes.*ugm\.author=both"
    for mode in ("record", "replay"):
        with pytest.raises(IncompleteError, match=message):
            make_groups(run, load_settings("tiny", overrides(server, f"llm.mode={mode}")))
    server.configure(rules=RULES)
    made = make_groups(run, load_settings("tiny", overrides(server)))
    assert made.manifest.info["kept"] == 4
    replayed = make_groups(run, load_settings("tiny", overrides(server, "llm.mode=replay")), force=True)
    assert replayed.content == made.content, "and a replay takes what the later run got"


def test_with_the_evidence_missing_answers_are_counted_on_the_last_line_and_the_page(run, server, ray_local):
    moderated = {"status": 403, "body": {"error": {"message": "x", "code": "content_filter"}}}
    silent = {**RULES[1], "text": "well..."}
    server.configure(rules=[{**moderated, "match": RULES[0]["match"]}, silent, NONSENSE])
    made = make_groups(run, load_settings("tiny", overrides(server, "ugm.author=both")))
    summary = made.manifest.summary
    for part in (
        r"1 of 1 answers of the summarizer are missing \(moderated 1\), and the evidence decides instead",
        r"(\d+) of \1 answers of the matcher are missing \(no_verdict \1\)",
        r"(\d+) of \1 answers of the profiler are missing \(unusable \1\)",
    ):
        assert re.search(part, summary), summary
        assert re.search(part.partition(", and")[0], render(run))
    assert "without a verdict" not in summary + render(run)
    assert "members are judged by their records" in render(run)
    assert made.manifest.info["kept"] == 4


def test_a_run_without_groups_says_why_in_words(run, server, ray_local):
    server.configure(rules=[RULES[0], {**RULES[1], "text": "Match or not: No\nReason: skips it"}, RULES[2]])
    with pytest.raises(NoGroupsError, match=r"\(4 groups: too few members matched\): lower ugm\.min_matched"):
        make_groups(run, load_settings("tiny", overrides(server)))


@pytest.fixture(scope="module")
def by_evidence(tmp_path_factory):
    """A run with groups made without any call, and the ids of users whose histories were read for them."""
    run = Run(tmp_path_factory.mktemp("evidence"))
    stages.make(["ifvr", "truth"], run, load_settings("tiny", BASE))
    ifvr = run.artifact("ifvr")
    users = ifvr.table("users").to_pylist()
    bare = [u["user_id"] for u in users if u["user_id"] not in set(IFVR(run).ugm_users)][:5]
    for row in users:
        row["tags"] = [] if row["user_id"] in bare else row["tags"]
    kept = {name: ifvr.table(name) for name in ("interactions", "videos", "user_splits")}
    settings = load_settings("tiny", [*BASE, "ugm.author=evidence", "teachers.profiles=false"])
    put(
        run,
        "ifvr",
        {**kept, "users": pa.Table.from_pylist(users, schema=ifvr.table("users").schema)},
        settings=settings,
    )
    read, history_log = [], IFVR.history_log

    def noted(self, user_ids, columns, task=None):
        read.append(ids := set(user_ids))
        return history_log(self, ids, columns, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IFVR, "history_log", noted)
        patch.setattr(IFVR, "users", property(lambda _: pytest.fail("all users at once")))
        stages.make_stage("ugm", run, settings)
    return run, read, set(bare)


def test_histories_are_read_of_the_users_that_need_them_only(by_evidence):
    """Of a million users, a thousand make the groups; the others are placed by what they list."""
    run, read, bare = by_evidence
    made_from = set(IFVR(run).ugm_users)
    *first, held_out = read
    assert set.union(*first) == made_from | bare
    assert not held_out & made_from
    assigned = [m for m in run.artifact("ugm").table("memberships").to_pylist() if m["how"] == "assigned"]
    assert len(assigned) > 20
    assert held_out <= {m["user_id"] for m in assigned}


def test_the_artifact_places_everybody_as_the_stage_did(by_evidence):
    run, _, _ = by_evidence
    ugm, made_from = run.artifact("ugm"), set(IFVR(run).ugm_users)
    people = [p for u, p in IFVR(run).people().items() if u not in made_from]
    placed = Placement.read(ugm).place([p.with_tags for p in people])
    again = {p.user.user_id: f for p, f in zip(people, placed, strict=True) if f}
    table = ugm.table("memberships").to_pylist()
    assert again == {m["user_id"]: (m["group_id"], m["similarity"]) for m in table if m["how"] == "assigned"}


def test_the_artifact_has_evidence_authors_and_figures(by_evidence):
    run, _, _ = by_evidence
    ugm = run.artifact("ugm")
    groups = [g for g in GroupProfile.from_table(ugm.table("groups")) if g.final_profile]
    assert groups
    for g in groups:
        assert (g.name_author, g.profile_author, g.unsupported) == ("evidence", "evidence", [])
        assert {"interest", "person", "skipped", "length"} <= {f.section for f in g.evidence}
    assert len({g.name for g in groups}) == len(groups)
    quality = ugm.manifest.info["quality"]
    assert 0.4 < quality["in_some_group"] <= 1
    assert quality["silhouette"] > 0
    assert set(quality["skips"]) == {"users", "views", "group", "everybody"}
    assert "names by the evidence" in ugm.manifest.summary
    purity = purity_of(run, ugm)
    assert 0.5 < purity.members <= 1, "of four groups for six true ones"
    assert 0.5 < purity.everybody <= 1


def test_the_embedded_model_can_do_all_calls(by_evidence):
    """In preset `tiny`: of 48 users at once, held to forms, and within its context."""
    run, _, _ = by_evidence
    settings = load_settings("tiny", [])
    people = ugm_people(IFVR(run), settings.ugm, tastes=False)[:48]
    records = ugm_records(IFVR(run), people, settings.ugm)
    requests = foreseen_requests(people, settings.ugm, settings.llm, records)
    assert settings.ugm.author_with(settings.llm) == "both"
    asked = Counter(r.role for r in requests)
    assert (len(people), asked["summarizer"]) == (48, 1)
    assert asked["matcher"] > asked["profiler"] > 1
    assert all(r.regex for r in requests)
    for r in requests:
        room = settings.llm.embedded.max_model_len - settings.llm.role(r.role).max_tokens
        assert estimate_prompt(r.messages) < room


def test_a_budget_stops_cleanly_and_can_be_raised(run, server, ray_local):
    server.configure(rules=RULES)
    with pytest.raises(BudgetReachedError, match="20"):
        make_groups(run, load_settings("tiny", overrides(server, "llm.budget.calls=20")))
    assert sum(calls(server).values()) == 20
    assert "ugm" not in run.stages()
    make_groups(run, load_settings("tiny", overrides(server)))
    assert max(calls(server).values()) == 1, "nothing is asked twice"


def test_missing_verdicts_end_the_command_with_causes_and_the_same_command_goes_on(run, server, ray_local, capsys):
    server.configure(rules=[RULES[0], {"match": "You check whether", "text": "well..."}, RULES[2]])
    command = ["ugm", "--run", run.uri, *overrides(server)]
    with pytest.raises(SystemExit) as e:
        run_app(app, command)
    assert e.value.code == 6
    last = " ".join(capsys.readouterr().err.splitlines()[-1].split())
    assert re.search(r"incomplete: (\d+) of \1 answers of the matcher are missing \(no_verdict \1\)", last)
    assert "ugm" not in run.stages()
    before = calls(server)
    server.configure(rules=RULES)
    with pytest.raises(SystemExit) as e:
        run_app(app, command)
    assert e.value.code == 0
    info = run.artifact("ugm").manifest.info
    assert (info["kept"], info["missing"]) == (4, {})
    asked = sum(calls(server).values()) - sum(before.values())
    verdicts = sum(len(g.members) for g in GroupProfile.from_table(run.artifact("ugm").table("groups")))
    assert asked == verdicts + 4, "the verdicts and the final profiles, and nothing that was finished"


def test_prompts_that_are_too_long_end_the_command_with_the_setting_that_helps(run, server, ray_local, capsys):
    """The same command would fail again."""
    long = {"status": 400, "body": {"error": {"message": "too many tokens", "code": "context_length_exceeded"}}}
    server.configure(rules=[RULES[0], {**long, "match": "You check whether"}, RULES[2]])
    with pytest.raises(SystemExit) as e:
        run_app(app, ["ugm", "--run", run.uri, *overrides(server)])
    assert e.value.code == 6
    last = " ".join(capsys.readouterr().err.splitlines()[-1].split())
    assert "too many tokens" in last
    assert "what is refused (context) will be refused again; lower ugm.context_tokens" in last


def test_a_narrow_rate_limit_is_no_verdict(run, server, ray_local):
    server.configure(rules=RULES, per_s=25)
    made = make_groups(run, load_settings("tiny", overrides(server, "llm.retries.patience_s=3")))
    assert made.manifest.info["missing"] == {}
    groups = GroupProfile.from_table(made.table("groups"))
    assert all(m.matched for g in groups for m in g.members)


def test_a_repaired_summary_is_kept_by_a_run_that_starts_again(run, server, ray_local):
    """Otherwise the groups, and all that was asked about them, would be others after a stop."""
    summary, _, profile = RULES
    server.configure(
        rules=[{**summary, "text": categories([1, 1, 2, 3])}, {"match": "You check", "text": "?"}, profile]
    )
    for _ in range(2):
        with pytest.raises(IncompleteError):  # the verdicts
            make_groups(run, load_settings("tiny", overrides(server)))
    roles = Counter(json.loads(line)["role"] for line in journaled(run).splitlines())
    assert (roles["summarizer"], roles["profiler"]) == (2, 4), "a question and a re-ask, and a profile for each group"


@pytest.mark.slow
def test_a_killed_run_resumes_without_repeating_a_finished_call(run, server):
    server.configure(rules=[{**rule, "latency_s": 1.0} for rule in RULES])
    command = [sys.executable, "-m", "gubs.cli", "ugm", "--run", run.uri]
    command += overrides(server, "llm.endpoints.default.max_concurrency=8")
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


def test_true_groups_are_the_archetypes_with_what_is_true_of_them(tmp_path):
    """An upper bound of what groups can be worth: no model may see it in earnest."""
    run, settings = Run(tmp_path / "run"), load_settings("tiny", ["users=60", "videos=30", "ufm.grpo.profiles=oracle"])
    stages.make_stage("truth", run, settings)
    made = stages.make_stage("oracle", run, settings)
    users = {u["user_id"]: u for u in run.artifact("truth").table("users").to_pylist()}
    groups = {g["group_id"]: g for g in made.table("groups").to_pylist()}
    for row in made.table("memberships").to_pylist():
        user, profile = users[row["user_id"]], groups[row["group_id"]]["final_profile"]
        assert profile.startswith(f"Likes: {', '.join(user['archetype_interests'])}.")
    assert len(groups) == len({u["archetype"] for u in users.values()})
    texts = [g["final_profile"] for g in groups.values()]
    assert any("Put off by: " in t for t in texts)
    assert all("s takes too long." in t for t in texts)
    graph = stages.Graph(["grpo"], run, settings)
    assert {"oracle", "ugm"} & set(graph.order) == {"oracle"}, "and no other groups are made"


def test_true_groups_are_of_simulated_apps_only(tmp_path):
    with pytest.raises(SettingsError, match="for simulated apps only"):
        oracle.preflight("logs")
