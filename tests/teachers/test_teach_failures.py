"""What an endpoint refuses or leaves unanswered ends a teacher's stage and never becomes its data."""

import json

import pytest
from teach_helpers import copy_run, synthetic_settings, with_teachers

from gubs.llm.errors import EndpointRefusedError, IncompleteError
from gubs.stages import make_stage

SOUND = {"match": 'check: C, "fine', "text": json.dumps({"criticism": "none", "valid": "yes"})}
GOOD = [SOUND, {"match": "skip", "text": json.dumps({"rationale": "fine", "option": "C"})}]


@pytest.fixture
def run(simulated, tmp_path):
    return copy_run(simulated, tmp_path / "run")


def settings(llm):
    chosen = with_teachers(synthetic_settings(), train_skips=6, test_skips=4)
    return chosen.model_copy(update={"llm": llm})


def labelled(run, llm):
    artifact = make_stage("labels", run, settings(llm))
    assert artifact.manifest.info["by_source"] == {"teacher-1": 10}
    assert artifact.table("queue").num_rows == 0


def test_an_endpoint_that_refuses_everything_writes_nothing_and_is_asked_again(server, settings_for, run, ray_local):
    server.configure(refuses=["reasoning_effort"], rules=GOOD)
    llm = settings_for(rest={"roles": {"annotator": {"extra": {"reasoning_effort": "low"}}}})
    with pytest.raises(EndpointRefusedError, match="Unrecognized request argument supplied: reasoning_effort"):
        make_stage("labels", run, settings(llm))
    assert server.stats()["total"] == 5
    assert not run.has("labels")
    server.configure(rules=GOOD)
    labelled(run, llm)


def test_a_reasoning_models_parameters_are_found_out(server, settings_for, run, ray_local):
    server.configure(refuses=["temperature", "max_tokens"], rules=GOOD)
    labelled(run, settings_for())


@pytest.mark.parametrize(
    "fault", [{"text": "I will not say"}, {"fault": "500"}, {"text": "half", "finish_reason": "length"}]
)
def test_missing_answers_end_the_stage_with_their_causes_until_they_are_there(
    server, settings_for, run, ray_local, fault
):
    server.configure(rules=[SOUND, {"match": "skip", **fault}, {"text": "I will not say"}])
    llm = settings_for(retries={"attempts": 2})
    with pytest.raises(IncompleteError, match=r"10 of 10 answers of the annotator are missing \(\w+ 10\)"):
        make_stage("labels", run, settings(llm))
    assert not run.has("labels")
    server.configure(rules=GOOD)
    labelled(run, llm)
