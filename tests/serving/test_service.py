"""What a replica does around its engine: people, groups, videos, prompts, decisions, errors per candidate."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from serving_helpers import RuleEngine, make_filter

from gubs.errors import ArtifactError
from gubs.records import Option, Task
from gubs.serving import shadow
from gubs.serving.bundle import Bundle
from gubs.serving.engine import Answer
from gubs.serving.filter import Decision, Mode
from gubs.serving.metrics import Metrics
from gubs.serving.pictures import PictureError
from gubs.serving.schemas import Candidate, ExplainRequest, FilterRequest, HistoryView, Profile, UserRef
from gubs.serving.service import FilterService, RequestError, merged, pick, total
from gubs.serving.settings import ServingSettings
from gubs.serving.shadow import ShadowLog, read_log
from gubs.serving.stage import _refusal


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle(make_filter(tmp_path_factory.mktemp("run")))


@pytest.fixture
def service(bundle):
    return FilterService(bundle, RuleEngine(), ServingSettings())


def asked(*videos, user="u0", **more):
    ref = UserRef(id=user) if isinstance(user, str) else user
    return FilterRequest(
        user=ref, candidates=[v if isinstance(v, Candidate) else Candidate(id=v) for v in videos], **more
    )


def decided(service, request, mode=Mode.REASON):
    return asyncio.run(service.decide(request, mode))


def decide(service, request, mode=Mode.REASON):
    it = decided(service, request, mode)
    return it.results, it.usage, it.threshold


def test_decisions_come_in_the_order_of_the_candidates(service):
    results, usage, threshold = decide(service, asked("v1", "v2", "v3", "v2"))
    assert [r.id for r in results] == ["v1", "v2", "v3", "v2"]
    assert [r.decision for r in results] == ["keep", "drop", "keep", "drop"]
    assert [r.index for r in results] == [0, 1, 2, 3]
    assert results[1].skip_probability == pytest.approx(0.9)
    assert sum(results[1].option_probabilities.values()) == pytest.approx(1)
    assert (results[1].reason, results[1].option, results[1].group_id) == ("about cars", Option.B, "g00")
    assert (usage.prompt_tokens, usage.cached_tokens, usage.answer_tokens, threshold) == (40, 16, 20, 0.5)


def test_a_threshold_of_the_request_replaces_the_filters(service):
    results, _, threshold = decide(service, asked("v1", "v2", threshold=0.1))
    assert [r.decision for r in results] == ["drop", "drop"]
    assert threshold == 0.1


def test_the_prompt_shows_the_users_own_history_and_profile(service):
    decide(service, asked("v7"))
    (prompt,) = service.engine.asked
    assert "pets" in prompt.text
    assert "Title 0" in prompt.text
    assert "Title 1" in prompt.text
    assert "Title 2" not in prompt.text, "that is u1's"


def test_a_user_sent_with_the_request(service):
    user = UserRef(
        profile=Profile(age=20, tags=["opera"]),
        history=[HistoryView(id="v5", play_rate=0.1), HistoryView(title="Unknown film", play_rate=1.0)],
    )
    results, _, _ = decide(service, asked("v1", user=user))
    text = service.engine.asked[0].text
    assert "opera" in text
    assert "Title 5" in text
    assert "Unknown film" in text
    assert results[0].group_id is None, "nobody in the groups likes opera"


def test_a_stranger_gets_the_group_of_the_nearest_typical_user(service):
    results, _, _ = decide(service, asked("v1", user=UserRef(profile=Profile(tags=["pets"]))))
    assert results[0].group_id == "g00"


def test_an_unknown_video_is_described_by_the_request(service):
    decide(service, asked(Candidate(id="new", title="My film", tags=["cars"], duration_s=12)))
    assert "My film" in service.engine.asked[0].text


@pytest.mark.parametrize(
    ("request_", "mode", "code"),
    [(asked("v1", user="nobody"), Mode.REASON, "unknown_user")],
)
def test_what_cannot_be_answered_has_a_code(service, request_, mode, code):
    with pytest.raises(RequestError) as e:
        decide(service, request_, mode)
    assert e.value.code == code


def test_score_is_refused_where_it_is_too_weak(tmp_path):
    weak = FilterService(Bundle(make_filter(tmp_path, refused="its AUC is too low")), RuleEngine(), ServingSettings())
    with pytest.raises(RequestError, match="AUC is too low") as e:
        decide(weak, asked("v1"), Mode.SCORE)
    assert e.value.code == "mode_unavailable"


class Silent(RuleEngine):
    """Names no option for every second question."""

    async def ask(self, task, mode, prompts, salt=""):
        answers = await super().ask(task, mode, prompts, salt)
        return [a if i % 2 else Answer(None, (("...", True),), too_long=i == 2) for i, a in enumerate(answers)]


def test_a_candidate_without_an_answer_is_kept_with_an_error(bundle):
    results, _, _ = decide(FilterService(bundle, Silent(), ServingSettings()), asked("v2", "v4", "v6", "v8"))
    assert [r.decision for r in results] == ["keep", "drop", "keep", "drop"]
    assert [r.error and r.error.code for r in results] == ["unreadable", None, "too_long", None]


def test_four_answers_side_by_side(service):
    fields = asyncio.run(service.explain(ExplainRequest(user=UserRef(id="u0"), candidate=Candidate(id="v2"))))
    whose = {p.whose: p for p in fields["perspectives"]}
    assert list(whose) == ["own", "similar", "group", "none"]
    assert "Pet lovers" in whose["group"].profile
    assert "cooking" in whose["similar"].profile, "u1, the other member"
    assert all(p.result.decision is Decision.DROP for p in whose.values())
    assert len(fields["history"]) == 2
    nobody = asyncio.run(service.explain(ExplainRequest(user=UserRef(id="u2"), candidate=Candidate(id="v2"))))
    assert [p.whose for p in nobody["perspectives"]] == ["own", "none"], "u2 is in no group"


def test_the_engine_is_told_whose_cache_it_may_use(service):
    asyncio.run(service.decide(asked("v1"), Mode.REASON, "a"))
    asyncio.run(service.explain(ExplainRequest(user=UserRef(id="u0"), candidate=Candidate(id="v2")), "b"))
    assert service.engine.salts == {"a", "b"}


def test_what_the_filter_knows(service):
    assert service.user("u0").groups == ["g00"]
    assert service.user("ü 3/4").history == []
    with pytest.raises(RequestError):
        service.user("nobody")
    assert [(g.name, g.members) for g in service.groups()] == [("Pet lovers", 2)]
    about = service.about()
    assert (about["users"], about["videos"], about["version"]) == (4, 200, "version-filter")


def test_both_tasks_have_their_own_histories(bundle):
    assert len(bundle.person("u0", Task.SEQUENTIAL).history) == 2
    assert bundle.person("u0", Task.CLICK).history == ()


def test_anything_else_is_no_filter(tmp_path):
    with pytest.raises(ArtifactError):
        Bundle(str(tmp_path / "nothing"))


def test_parts_of_a_request_are_numbered_through(service):
    parts = [decided(service, asked("v1", "v2")), decided(service, asked("v3"))]
    assert [(r.index, r.id) for r in merged(parts)] == [(0, "v1"), (1, "v2"), (2, "v3")]
    assert total([p.usage for p in parts]).prompt_tokens == 30


def test_who_decided_and_how_long_each_phase_took(service):
    service.engine.seconds = 0.05
    it = decided(service, asked("v1"))
    assert (it.model.name, it.model.version) == ("run-cars", "version-filter")
    assert set(it.seconds) == {"pictures", "engine"}
    assert it.seconds["engine"] >= 0.05 > it.seconds["pictures"] > 0


def test_versions_get_their_shares():
    weights = {"b": 20.0, "a": 80.0, "c": 0.0}
    drawn = [pick(weights, i / 1000) for i in range(1000)]
    assert {n: drawn.count(n) for n in "abc"} == {"a": 800, "b": 200, "c": 0}
    with pytest.raises(ValueError, match="no version"):
        pick({"a": 0.0}, 0.5)


def test_frames_that_cannot_be_read_are_one_candidates_error(service, monkeypatch):
    def broken(video_id, *, cover):
        if video_id == "v2":
            raise ArtifactError("the store lost it")

    monkeypatch.setattr(service, "_stored", broken)
    service._pictures = type("Open", (), {"close": lambda _: None})()
    results, _, _ = decide(service, asked("v2", "v4"))
    assert [(r.decision, r.error and r.error.code) for r in results] == [("keep", "pictures"), ("drop", None)]


class Slow:
    """Pictures that come when the gate opens, at the latest after 20 s."""

    def __init__(self):
        self.gate, self.ended = threading.Event(), []

    def fetched(self, uri, *, cover):
        self.gate.wait(20)
        self.ended.append(uri)
        raise PictureError("too slow")

    def sent(self, frames, *, cover):
        return self.fetched("sent", cover=cover)

    def close(self):
        pass


@pytest.fixture
def slow(service, monkeypatch):
    service._pictures = Slow()
    monkeypatch.setattr(service, "_stored", lambda video_id, *, cover: None)
    yield service._pictures
    service._pictures.gate.set()


@pytest.mark.parametrize("where", [{"uri": "http://slow/"}, {"frames": ["x"]}])
def test_slow_places_and_frames_keep_no_stored_frames_waiting(service, slow, where):
    """More of them than there are threads to fetch, to decode, or to read stored frames."""

    async def both():
        hanging = asked(*(Candidate(id=f"n{i}", title="x", **where) for i in range(40)))
        waiting = asyncio.ensure_future(service.decide(hanging, Mode.SCORE))
        await asyncio.sleep(0.2)
        it = await asyncio.wait_for(service.decide(asked("v2"), Mode.SCORE), 5)
        assert not slow.ended
        slow.gate.set()
        await waiting
        return it.results

    assert [r.decision for r in asyncio.run(both())] == ["drop"]


def test_pictures_that_do_not_come_are_their_candidates_error_within_the_deadline(service, slow):
    """Three dead addresses on two threads would take all the time, and the other candidates would not be judged."""
    dead = [Candidate(id=f"n{i}", title="x", uri="http://slow/") for i in range(3)]

    async def in_time():
        async with asyncio.timeout(2):
            it = await service.decide(asked("v2", *dead, "v4", timeout_ms=2000), Mode.SCORE)
        slow.gate.set()  # the loop waits for no thread of ours, but the process would
        return it.results

    results = asyncio.run(in_time())
    assert [r.decision for r in results] == ["drop", "keep", "keep", "keep", "drop"]
    assert {(r.error.code, r.error.retryable) for r in results[1:4]} == {("pictures", True)}
    with pytest.raises(RequestError, match="too long"):
        slow.gate.clear()
        asyncio.run(service.explain(ExplainRequest(user=UserRef(id="u0"), candidate=dead[0], timeout_ms=200)))


@pytest.mark.parametrize(
    ("score", "distilled", "says"),
    [
        (0.85, True, ""),
        (0.84, True, ""),
        (0.83, True, "0.830 against 0.860"),
        (None, True, "0.000"),
        (0.9, False, "distil"),
    ],
)
def test_score_is_offered_only_where_it_ranks_nearly_as_well(score, distilled, says):
    rule = lambda auc: SimpleNamespace(auc=auc)  # noqa: E731
    modes = {Mode.REASON: rule(0.86)} | ({} if score is None else {Mode.SCORE: rule(score)})
    refusal = _refusal({Task.SEQUENTIAL: modes}, 0.0201, distilled)
    assert (says in refusal) if says else not refusal


def test_a_mode_that_was_never_measured_has_a_code(service):
    config = service.bundle.config
    decisions = {t: {m: v for m, v in by.items() if m != "reason"} for t, by in config.decisions.items()}
    service.bundle = SimpleNamespace(config=config.model_copy(update={"decisions": decisions}))
    with pytest.raises(RequestError) as e:
        decide(service, asked("v1"))
    assert e.value.code == "mode_unavailable"


def test_every_result_of_a_request_is_counted(service):
    results, _, _ = decide(service, asked("v1", "v2", "v4"))
    counted = Metrics()
    counted.results([r.model_copy(update={"decision": "drop", "option": "B"}) for r in results])
    assert b'gubs_filter_candidates_total{decision="drop",option="B"} 3.0' in counted.text()


def test_a_log_that_cannot_be_written_keeps_its_rows(service, tmp_path, monkeypatch):
    log = ShadowLog(str(tmp_path / "log"), 3600)
    results, _, _ = decide(service, asked("v1", "v2"))
    log.add("a", "1", asked("v1", "v2"), Mode.REASON, 0.5, results, acted=True)
    with monkeypatch.context() as m:
        m.setattr(log._fs, "open", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            log.flush()
    log.flush()
    assert read_log(str(tmp_path / "log")).num_rows == 2


def add_to(log, results, *videos):
    log.add("a", "1", asked(*videos, request_id=videos[0]), Mode.REASON, 0.5, results[: len(videos)], acted=True)


def test_a_storage_that_fails_in_its_own_way_ends_no_log(service, tmp_path, monkeypatch, caplog):
    """Libraries of object stores raise what they like; each failure leaves nothing behind."""
    results, _, _ = decide(service, asked("v1", "v2"))

    class HttpError(Exception):
        pass

    def fails(*_):
        raise HttpError

    log = ShadowLog(str(tmp_path / "log"), 0.05)
    with monkeypatch.context() as m:
        m.setattr(log._fs, "mv", fails)
        add_to(log, results, "v1", "v2")
        deadline = time.monotonic() + 10
        while caplog.text.count("cannot be written") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(list((tmp_path / "log").iterdir())) <= 1, "files of the failures before are left"
    deadline = time.monotonic() + 10
    while read_log(str(tmp_path / "log")).num_rows < 2:
        assert time.monotonic() < deadline, "the thread is gone"
        time.sleep(0.01)
    assert [p.suffix for p in (tmp_path / "log").iterdir()] == [".parquet"]
    row = read_log(str(tmp_path / "log")).to_pylist()[1]
    assert row | {"time_ms": 0} == {
        "time_ms": 0,
        "request_id": "v1",
        "user_id": "u0",
        "video_id": "v2",
        "task": "sequential",
        "mode": "reason",
        "app": "a",
        "version": "1",
        "acted": True,
        "decision": "drop",
        "option": "B",
        "skip_probability": pytest.approx(0.9),
        "threshold": 0.5,
        "error": None,
    }


def test_a_full_log_loses_its_oldest_rows_and_tells_how_many(service, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(shadow, "_MOST_ROWS", 3)
    log, rows = ShadowLog(str(tmp_path / "log"), 3600), decide(service, asked("v1", "v2"))[0]
    with monkeypatch.context() as m:
        m.setattr(log._fs, "open", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        for name in ("r1", "r2", "r3"):
            add_to(log, rows, name, "x")
            with pytest.raises(OSError, match="disk full"):
                log.flush()
    log.flush()
    assert read_log(str(tmp_path / "log"))["request_id"].to_pylist() == ["r2", "r3", "r3"]
    for _ in range(2):
        log._tell_lost()
    assert caplog.text.count("3 rows are lost") == 1


def test_who_asks_for_the_log_to_be_written_gets_what_another_thread_writes_too(service, tmp_path, monkeypatch):
    """An ingress that ends would else end in the middle of a file."""
    log, begun, go_on = ShadowLog(str(tmp_path / "log"), 3600), threading.Event(), threading.Event()
    results, _, _ = decide(service, asked("v1", "v2"))
    log.add("a", "1", asked("v1", "v2"), Mode.REASON, 0.5, results, acted=True)
    write = log._write
    monkeypatch.setattr(log, "_write", lambda rows: (begun.set(), go_on.wait(20), write(rows)))
    first, last = (threading.Thread(target=log.flush) for _ in range(2))
    first.start()
    assert begun.wait(20)
    last.start()
    last.join(0.2)
    assert last.is_alive()
    go_on.set()
    last.join(20)
    assert read_log(str(tmp_path / "log")).num_rows == 2
