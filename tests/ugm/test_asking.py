"""Asking again about faults, for another sample in a later run, and what is missing over a whole stage."""

from dataclasses import replace

import pytest
from llm_helpers import simple
from ugm_helpers import PLAIN, ScriptedLLM

from gubs.llm.calls import question
from gubs.llm.client import LLMClient
from gubs.llm.errors import IncompleteError
from gubs.llm.settings import ContractSettings
from gubs.ugm.asking import Check, Interview

BAD = "talk about an assistant"
SPOILT = Check(lambda _, text: [BAD] if "assistant" in text else [], lambda _, text: BAD if "assistant" in text else "")
FAULTY = Check(SPOILT.faults, lambda *_: "")
"""The same faults, but they do not matter much."""
ALLOWED = PLAIN.model_copy(update={"contract": ContractSettings(unusable=1.0)})


def profile():
    return question("profiler", "p", "write")


def test_an_endpoint_that_fails_when_asked_again_is_not_hidden_by_the_first_answer():
    """The faulty answer would stand, and the stage would end well."""

    class Failing(ScriptedLLM):
        def ask(self, requests):
            answers = super().ask(requests)
            again = len(self.requests) > 1
            return [replace(a, value=None, failure="rate_limited", error="429") if again else a for a in answers]

    llm = Failing(lambda _: "as an assistant")
    (answer,) = Interview(llm, "llm").ask_checked([profile()], FAULTY, count=False)
    assert len(llm.requests) == 2
    assert answer.failure == "rate_limited"


def test_a_re_ask_that_is_too_long_for_the_endpoint_leaves_the_first_answer():
    class Short(ScriptedLLM):
        def ask(self, requests):
            answers = super().ask(requests)
            again = len(self.requests) > 1
            return [replace(a, value=None, failure="context", error="400") if again else a for a in answers]

    (answer,) = Interview(Short(lambda _: "as an assistant"), "llm").ask_checked([profile()], FAULTY)
    assert (answer.ok, answer.text) == (True, "as an assistant")


def test_what_is_spoilt_in_the_end_is_a_missing_answer():
    interview = Interview(ScriptedLLM(lambda _: "as an assistant"), "llm")
    with pytest.raises(IncompleteError, match=r"1 of 1 answers of the profiler are missing \(unusable 1\).*assistant"):
        interview.ask_checked([profile()], SPOILT)
    interview = Interview(ScriptedLLM(lambda _: "as an assistant", ALLOWED), "llm")
    (answer,) = interview.ask_checked([profile()], SPOILT)
    assert (answer.failure, answer.value, answer.error) == ("unusable", None, BAD)
    assert interview.contract.missing == {"profiler": {"unusable": 1}}


def test_an_answer_that_stands_is_better_than_one_with_fewer_faults():
    check = Check(lambda _, text: text.split(), lambda _, text: "no" if text == "spoilt" else "")
    texts = iter(["spoilt", "two faults"])
    (answer,) = Interview(ScriptedLLM(lambda _: next(texts)), "llm").ask_checked([profile()], check)
    assert answer.text == "two faults"


@pytest.mark.parametrize(
    ("check", "replays", "samples"),
    [
        (SPOILT, lambda r: r.sample == 0, [0, 0, 1, 1]),
        (SPOILT, lambda r: len(r.messages) == 1, [0, 0]),  # the re-ask is made now: the run before was killed
        (FAULTY, lambda _: True, [0, 0]),
    ],
)
def test_another_sample_is_asked_for_in_place_of_an_earlier_runs_spoilt_answer_only(check, replays, samples):
    llm = ScriptedLLM(lambda _: "as an assistant", ALLOWED, replays)
    Interview(llm, "llm").ask_checked([profile()], check)
    assert [r.sample for r in llm.requests] == samples


@pytest.mark.usefixtures("ray_local")
class TestRuns:
    """Over HTTP, one run after another on the same journal."""

    @pytest.fixture
    def ask(self, settings_for, tmp_path):
        def ask(author="llm", check=SPOILT, **rest):
            contract = {"unusable": 1.0}
            with LLMClient(settings_for(rest={"contract": contract, **rest}), tmp_path) as client:
                (answer,) = Interview(client, author).ask_checked([simple("write", role="profiler")], check)
            return answer.failure or answer.text

        return ask

    def test_each_re_ask_is_a_sample_of_its_own(self, server, ask):
        """The same answer has the same faults, so the same words go back: the journal would answer them."""
        server.configure(rules=[{"text": "an assistant"}])
        assert ask(roles={"profiler": {"reasks": 3}}) == "unusable"
        assert server.stats()["total"] == 4

    def test_a_spoilt_answer_is_sampled_afresh_by_each_later_run_and_replayed(self, server, ask):
        server.configure(rules=[{"text": "an assistant"}])
        for total in (2, 4):  # a question and a re-ask each
            assert ask() == "unusable"
            assert server.stats()["total"] == total
            assert ask(mode="replay") == "unusable", "and no call that the journal lacks"
        server.configure(rules=[{"text": "they cook"}])
        assert ask() == ask(mode="replay") == ask() == "they cook"
        assert server.stats()["total"] == 5

    def test_a_replay_of_an_answer_that_never_came_asks_for_no_other(self, server, ask):
        server.configure(rules=[{"text": ""}])
        assert ask() == ask(mode="replay") == "empty"

    def test_what_the_evidence_replaces_stays_as_it_is(self, server, ask):
        """Otherwise a run that is killed and started again would get other groups."""
        server.configure(rules=[{"text": "an assistant"}])
        for _ in range(2):
            assert ask("both") == "unusable"
        assert server.stats()["total"] == 2
