"""Asking with a check: an answer that has faults is sent back once, with what is wrong."""

import dataclasses
from collections.abc import Callable, Sequence

from gubs.llm.calls import Answer, LLMRequest
from gubs.llm.client import LLMClient
from gubs.llm.contract import UNANSWERED
from gubs.llm.structured import reask

Faults = Callable[[int, str], Sequence[str]]
"""What is wrong with the text of an answer to the i-th request."""


def ask_checked(llm: LLMClient, requests: Sequence[LLMRequest], faults: Faults) -> list[Answer]:
    """Answers in the order of the requests, which are of one role; of several to one request, that with the fewest
    faults. They are sent back as often as the role's `reasks` allow.

    The faults are ours to judge: to the client, an answer that can be read is an answer, so what an author does with it
    (repair it, or let the evidence stand) is no failed call. Errors: see `LLMClient.stream`.
    """
    answers = llm.ask(requests)
    found = [faults(i, a.text) if a.ok else [] for i, a in enumerate(answers)]
    for _ in range(llm.settings.role(requests[0].role).reasks if requests else 0):
        wrong = [i for i, f in enumerate(found) if f]
        again = llm.ask([_again(requests[i], answers[i], found[i]) for i in wrong]) if wrong else []
        for i, answer in zip(wrong, again, strict=True):
            if answer.failure in UNANSWERED:  # the endpoint failed, which the contract has to see
                answers[i], found[i] = answer, []
                continue
            left = faults(i, answer.text) if answer.ok else found[i]
            if len(left) < len(found[i]):
                answers[i], found[i] = answer, left
    return answers


def _again(request: LLMRequest, answer: Answer, found: Sequence[str]) -> LLMRequest:
    return dataclasses.replace(request, messages=reask(request.messages, answer.text, "; ".join(found)))
