"""Imports of vLLM and transformers in two thirds of the time, and less to do for what starts after them."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SKIPPED = ("sklearn", "scipy")
"""What transformers and vLLM import for a few functions that gubs never calls (assisted generation, losses of object
detection, audio). Both treat them as optional."""


@contextmanager
def quick_imports() -> Iterator[None]:
    """Within it, Python's garbage collector is off, and scikit-learn and scipy are not found. Afterwards all are back.

    Collections during an import look at a growing number of objects that all stay. Later ones would, too: vLLM asks for
    five while it starts, half a second each. So what is there at the end is left out of them. Nothing else may import
    the two packages meanwhile, in any thread.
    """
    modules: dict[str, Any] = sys.modules
    collecting, hidden = gc.isenabled(), [name for name in _SKIPPED if name not in modules]
    gc.disable()
    modules.update(dict.fromkeys(hidden))  # None, to Python: there is no such module
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
        gc.freeze()
        if collecting:
            gc.enable()
