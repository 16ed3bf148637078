"""Imports that leave out scikit-learn and the garbage collector, and give both back."""

import gc
import importlib
import sys
from contextlib import nullcontext

import pytest

from gubs.quick_imports import quick_imports


@pytest.fixture
def forgotten(monkeypatch):
    """As in a process that has not imported scikit-learn."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("fails", [False, True])
def test_both_are_back_afterwards(forgotten, fails):
    with pytest.raises(KeyError) if fails else nullcontext(), quick_imports():
        assert importlib.util.find_spec("sklearn") is None, "so transformers takes it for absent"
        assert not gc.isenabled()
        if fails:
            raise KeyError
    assert gc.isenabled()
    assert importlib.util.find_spec("sklearn")


def test_what_was_imported_before_stays():
    before = importlib.import_module("sklearn")
    with quick_imports():
        assert sys.modules["sklearn"] is before
    assert sys.modules["sklearn"] is before
