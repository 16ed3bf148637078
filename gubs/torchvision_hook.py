"""Lets torchvision import beside a CPU build of torch when only its CUDA build is to be had.

torchvision's Python part (resizing, transforms) needs no compiled operator, but its import declares shapes for `nms`
and `qnms`, which exist only if the compiled library loads. Where that library does not load, this hook declares the two
schemas first. Where it loads (a proper pair of builds), the hook does nothing.

It has to be there in every process (Ray workers, vLLM's engines), so `python -m gubs.torchvision_hook` puts a `.pth`
file into the environment; the hook itself costs nothing until torchvision is imported.
"""

import importlib.abc
import importlib.machinery
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_PTH = "gubs-torchvision.pth"
_PTH_LINE = (
    "import importlib.util as u; u.find_spec('gubs') and __import__('gubs.torchvision_hook').torchvision_hook.hook()\n"
)
_OPERATORS = ("nms", "qnms")


class _Finder(importlib.abc.MetaPathFinder):
    """Acts once, just before the first import of torchvision; finds nothing itself."""

    def __init__(self) -> None:
        self.library: object = None
        self.done = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Declares the operators when `torchvision` itself is asked for."""
        if fullname == "torchvision" and not self.done:
            self.done = True
            spec = importlib.machinery.PathFinder.find_spec("torchvision", path)
            if spec and spec.origin and not _compiled_part_loads(Path(spec.origin).parent):
                self.library = _declare_operators()
        return None


def hook() -> None:
    """Puts the finder in front of the import system, once."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def install() -> Path:
    """Writes the `.pth` file into this environment and returns its path."""
    path = Path(sysconfig.get_paths()["purelib"]) / _PTH
    path.write_text(_PTH_LINE)
    return path


def _compiled_part_loads(package: Path) -> bool:
    import torch

    libraries = sorted(package.glob("_C*.so"))
    if not libraries:
        return True  # a build without operators knows how to live without them
    try:
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _declare_operators() -> object:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # the declaration lives as long as this object


if __name__ == "__main__":
    print(f"wrote {install()}")
