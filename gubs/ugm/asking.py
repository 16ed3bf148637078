"""Asking with a check: an answer that has faults is sent back once, with what is wrong."""

import dataclasses
from collections.abc import Callable, Sequence

from gubs.llm.calls import Answer, LLMRequest
from gubs.llm.client import LLMClient
from gubs.llm.structured import reask

Faults = Callable[[int, str], Sequence[str]]
"""What is wrong with the text of an answer to the i-th request."""


def ask_checked(llm: LLMClient, requests: Sequence[LLMRequest], faults: Faults) -> list[Answer]:
    """Answers in the order of the requests; of two answers to one, that with fewer faults.

    The faults are ours to judge: to the client, an answer that can be read is an answer, so what an author does with it
    (repair it, or let the evidence stand) is no failed call. Errors: see `LLMClient.stream`.
    """
    answers = llm.ask(requests)
    wrong = {i: found for i, a in enumerate(answers) if a.ok and (found := faults(i, a.text))}
    again = llm.ask([_again(requests[i], answers[i], found) for i, found in wrong.items()]) if wrong else []
    for (i, before), second in zip(wrong.items(), again, strict=True):
        if second.ok and len(faults(i, second.text)) < len(before):
            answers[i] = second
    return answers


def _again(request: LLMRequest, answer: Answer, found: Sequence[str]) -> LLMRequest:
    return dataclasses.replace(request, messages=reask(request.messages, answer.text, "; ".join(found)))
