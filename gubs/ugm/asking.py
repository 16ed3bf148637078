"""The stage's questions to the LLM: answers with faults are sent back, missing ones count over the whole stage."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from gubs.llm.calls import Answer, LLMRequest
from gubs.llm.client import LLMClient
from gubs.llm.contract import UNANSWERED, Contract
from gubs.llm.structured import reask
from gubs.ugm.settings import Author

UNUSABLE = "unusable"
"""Cause of a missing answer: the client could read the model's text, but it cannot be used."""
_APART = 1000
"""Between the samples of two re-asks of a request; those between are for fresh samples of the request."""
_ADVICE = {
    "context": "lower ugm.context_tokens, ugm.history_items or ugm.max_text, or use an endpoint with a longer context "
    "(of the embedded server: llm.embedded.max_model_len)",
    "rejected": "change what the server names (where prompts are too long: ugm.context_tokens, ugm.history_items)",
    UNUSABLE: "a stronger model helps, or ugm.author=both",
}


@dataclass(frozen=True)
class Check:
    """What is looked for in the text of an answer to the i-th request."""

    faults: Callable[[int, str], Sequence[str]]
    """What is wrong with it; it goes back to the model."""
    spoilt: Callable[[int, str], str]
    """Why it cannot be used at all; empty if it can, since its faults are repaired or shown."""

    def rank(self, place: int, text: str) -> tuple[bool, int]:
        """The lower, the better."""
        return bool(self.spoilt(place, text)), len(self.faults(place, text))


class Interview:
    """Asks for the phases, and knows what is missing of the stage so far."""

    def __init__(self, llm: LLMClient, author: Author):
        """With `both`, the evidence replaces what cannot be used: that ends no stage, and is not asked for again."""
        self._llm, self._author = llm, author
        self.settings = llm.settings
        self.contract = Contract(llm.settings.contract, replaced=author == "both", advice=_ADVICE)

    def ask(self, requests: Sequence[LLMRequest]) -> list[Answer]:
        """Answers in the order of the requests.

        Raises:
            IncompleteError: too many of a role's answers are missing, of all so far. What stops the client: see
                `LLMClient.stream`.
        """
        answers = self._llm.ask(requests)
        self.contract.check(answers)
        return answers

    def ask_checked(self, requests: Sequence[LLMRequest], check: Check, *, count: bool = True) -> list[Answer]:
        """Answers in the order of the requests, which are of one role; of several to one request, the best. They are
        sent back as often as the role's `reasks` allow.

        What is spoilt in the end is a missing answer (cause `unusable`). To the client, it was an answer, which the
        journal gives forever: a later run asks for another sample, unless the evidence stands in its place.

        Args:
            requests: the requests.
            check: what is wrong with an answer.
            count: look at the contract; otherwise the caller does.

        Errors: see `ask`.
        """
        answers = self._best(requests, range(len(requests)), check)
        for nth in itertools.count(1):
            fresh = {i: replace(request, sample=request.sample + nth) for i, request in enumerate(requests)}
            stuck = [i for i in fresh if check.spoilt(i, answers[i].text) and self._renews(answers[i], fresh[i])]
            if not stuck:
                break
            for i, answer in zip(stuck, self._best([fresh[i] for i in stuck], stuck, check), strict=True):
                answers[i] = answer
        judged = [_judged(a, check.spoilt(i, a.text)) for i, a in enumerate(answers)]
        if count:
            self.contract.check(judged)
        return judged

    def _renews(self, answer: Answer, sample: LLMRequest) -> bool:
        """Whether another sample is to take the place of an earlier run's spoilt answer; in a replay, one of the later
        runs'.
        """
        if self._author == "both" or not (answer.ok and answer.replayed):
            return False
        return self.settings.mode == "record" or self._llm.knows(sample)

    def _best(self, requests: Sequence[LLMRequest], places: Sequence[int], check: Check) -> list[Answer]:
        """The best answers to some of the requests, those at `places`; `replayed` if nothing was asked for them now."""
        answers = self._llm.ask(requests) if requests else []
        for nth in range(self.settings.role(requests[0].role).reasks if requests else 0):
            wrong = [(i, a) for i, a in enumerate(answers) if a.ok and check.faults(places[i], a.text)]
            again = [_again(requests[i], a, check.faults(places[i], a.text), nth) for i, a in wrong]
            for (i, first), second in zip(wrong, self._llm.ask(again) if again else [], strict=True):
                better = second.ok and check.rank(places[i], second.text) < check.rank(places[i], first.text)
                # If the endpoint has failed, the contract has to see that.
                chosen = second if better or second.failure in UNANSWERED else first
                answers[i] = replace(chosen, replayed=first.replayed and second.replayed)
        return answers


def _again(request: LLMRequest, answer: Answer, faults: Sequence[str], nth: int) -> LLMRequest:
    """The n-th re-ask, from 0: a sample of its own, since the same answer may have the same faults again."""
    messages = reask(request.messages, answer.text, "; ".join(faults))
    return replace(request, messages=messages, sample=request.sample + nth * _APART)


def _judged(answer: Answer, why: str) -> Answer:
    return replace(answer, value=None, failure=UNUSABLE, error=why) if answer.ok and why else answer
