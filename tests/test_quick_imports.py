"""Imports that leave out scikit-learn, scipy and the garbage collector, and give all back."""

import gc
import importlib
import sys
from contextlib import nullcontext

import pytest

from gubs.quick_imports import quick_imports

HIDDEN = ("sklearn", "scipy")


@pytest.fixture
def forgotten(monkeypatch):
    """As in a process that has imported neither."""
    for name in [n for n in sys.modules if n.partition(".")[0] in HIDDEN]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("fails", [False, True])
def test_all_are_back_afterwards(forgotten, fails):
    with pytest.raises(KeyError) if fails else nullcontext(), quick_imports():
        for name in HIDDEN:
            assert importlib.util.find_spec(name) is None, "so transformers and vLLM take it for absent"
        assert not gc.isenabled()
        if fails:
            raise KeyError
    assert gc.isenabled()
    assert all(map(importlib.util.find_spec, HIDDEN))


def test_what_was_imported_before_stays():
    before = importlib.import_module("sklearn")
    with quick_imports():
        assert sys.modules["sklearn"] is before
    assert sys.modules["sklearn"] is before


def test_collections_leave_out_what_was_imported():
    """Else each of the five that vLLM asks for while it starts takes half a second."""
    with quick_imports():
        made: list[list[int]] = [[]]
    try:
        assert not any(found is made for found in gc.get_objects())
    finally:
        gc.unfreeze()
    assert any(found is made for found in gc.get_objects())
