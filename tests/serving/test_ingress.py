"""What the ingress refuses by itself, without Serve."""

from types import SimpleNamespace

import pytest

from gubs.serving.deployment import Ingress, RefusedError
from gubs.serving.schemas import Candidate, HistoryView, Profile, UserRef
from gubs.serving.settings import LimitSettings, ServingSettings

SMALL = ServingSettings(limits=LimitSettings(candidates=2, history=2, frames=2))
CASES = {
    "candidates": (0, [Candidate(id="v")] * 3),
    "user.history": (3, [Candidate(id="v")]),
    "candidates.frames": (0, [Candidate(id="v"), Candidate(id="w", frames=["x"] * 3)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_service_may_take_less_than_the_api_allows(name):
    views, candidates = CASES[name]
    user = UserRef(profile=Profile(), history=[HistoryView(title="x")] * views)
    check = Ingress.func_or_class._check_size
    with pytest.raises(RefusedError, match=f"{name}: 3, and this service takes at most 2") as e:
        check(SimpleNamespace(_settings=SMALL), user, candidates)
    assert e.value.status == 422
    check(SimpleNamespace(_settings=ServingSettings()), user, candidates)
