"""What a stage may lack is a share of all of a role's answers, and the message says what is true of the next run."""

import dataclasses

import pytest

from gubs.llm.calls import Answer
from gubs.llm.contract import Contract
from gubs.llm.errors import IncompleteError
from gubs.llm.settings import ContractSettings

OK = Answer("matcher", "m/1", "k", "Yes", "", "Yes", "", "", "stop", 1, 1, 0.1, 1, 1, 0.0)


def answers(ok=0, **missing):
    failed = [
        dataclasses.replace(OK, failure=cause, error=f"because {cause}")
        for cause, n in missing.items()
        for _ in range(n)
    ]
    return [OK] * ok + failed


def broken(contract, batch):
    with pytest.raises(IncompleteError) as e:
        contract.check(batch)
    return str(e.value)


def test_all_batches_of_a_stage_count_together():
    contract = Contract(ContractSettings(unusable=0.1))
    contract.check(answers(ok=19, empty=1))
    contract.check(answers(ok=0, empty=1))
    assert contract.missing == {"matcher": {"empty": 2}}
    message = broken(contract, answers(no_verdict=1))
    assert (
        "3 of 22 answers of the matcher are missing (empty 2, no_verdict 1), for example m/1: because empty" in message
    )
    assert "the same command resumes" in message


def test_roles_do_not_make_up_for_each_other():
    contract = Contract(ContractSettings(unusable=0.1))
    many = [dataclasses.replace(OK, role="profiler")] * 100
    assert "2 of 10 answers of the matcher" in broken(contract, [*many, *answers(ok=8, empty=2)])


@pytest.mark.parametrize("cause", ["unreachable", "unreadable", "rate_limited"])
def test_what_the_endpoint_does_not_answer_has_a_share_of_its_own(cause):
    settings = ContractSettings(unusable=1.0)
    for replaced in (False, True):
        assert "the same command resumes" in broken(Contract(settings, replaced=replaced), answers(ok=99, **{cause: 1}))
    Contract(ContractSettings(unanswered=0.01)).check(answers(ok=99, **{cause: 1}))


@pytest.mark.parametrize("cause", ["rejected", "context"])
def test_what_the_endpoint_does_not_take_is_refused_again_and_the_message_says_so(cause):
    Contract(ContractSettings()).check(answers(ok=99, **{cause: 1}))
    for replaced in (False, True):  # the evidence replaces bad answers; that nothing is taken is no such thing
        message = broken(
            Contract(ContractSettings(), replaced=replaced, advice={cause: "take less"}), answers(ok=9, **{cause: 1})
        )
        assert f"what is refused ({cause}) will be refused again; take less" in message
        assert "resumes" not in message
        assert "llm.contract.unusable=0.01" in message


def test_bad_answers_that_are_replaced_are_counted_only():
    contract = Contract(ContractSettings(), replaced=True)
    contract.check(answers(empty=3, moderated=2, unusable=1))
    assert contract.missing == {"matcher": {"empty": 3, "moderated": 2, "unusable": 1}}
    assert contract.asked == {"matcher": 6}
