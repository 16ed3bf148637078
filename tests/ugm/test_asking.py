"""Asking again about faults."""

from dataclasses import replace

from ugm_helpers import ScriptedLLM

from gubs.llm.calls import question
from gubs.ugm.asking import ask_checked


def test_an_endpoint_that_fails_when_asked_again_is_not_hidden_by_the_first_answer():
    """The faulty answer would stand, and the stage would end well."""

    class Failing(ScriptedLLM):
        def ask(self, requests):
            answers = super().ask(requests)
            again = len(self.requests) > 1
            return [replace(a, value=None, failure="rate_limited", error="429") if again else a for a in answers]

    llm = Failing(lambda _: "as an assistant")
    (answer,) = ask_checked(llm, [question("profiler", "p", "write")], lambda _, text: ["talk about an assistant"])
    assert len(llm.requests) == 2
    assert answer.failure == "rate_limited"
