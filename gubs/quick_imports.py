"""Imports of vLLM and transformers in two thirds of the time: 9 instead of 12 s per engine on a slow core."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SKIPPED = "sklearn"
"""What transformers imports for one function of assisted generation that gubs never calls."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it, Python's garbage collector is off, and transformers finds no scikit-learn. Afterwards both are back.

    Collections during an import look at a growing number of objects that all stay. Nothing else may import
    scikit-learn meanwhile, in any thread.
    """
    modules: dict[str, Any] = sys.modules
    collecting, hidden = gc.isenabled(), _SKIPPED not in modules
    gc.disable()
    if hidden:
        modules[_SKIPPED] = None  # to Python: there is no such module
    try:
        yield
    finally:
        if hidden:
            del modules[_SKIPPED]
        if collecting:
            gc.enable()
