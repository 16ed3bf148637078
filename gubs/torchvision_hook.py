"""Lets torchvision import beside a CPU build of torch where only torchvision's CUDA build is available.

torchvision's Python part (resizing, transforms) needs no compiled operator, but on import it declares shapes for `nms`
and `qnms`, which exist only if the compiled library loads. If it does not load, this hook declares the two schemas
first. If it loads (matching builds), the hook does nothing.

Every process needs the hook (Ray workers, vLLM's engines), so `python -m gubs.torchvision_hook` writes a `.pth` file
into the environment. It costs nothing until torchvision is imported.
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


class _Finder(importlib.abc.MetaPathFinder):
    """Acts once, just before the first import of torchvision; never finds a module itself."""

    def __init__(self) -> None:
        self.library: object = None
        self.done = False

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Declares the operators when `torchvision` is about to be imported."""
        if fullname == "torchvision" and not self.done:
            self.done = True
            spec = importlib.machinery.PathFinder.find_spec("torchvision", path)
            if spec and spec.origin and not _compiled_library_loads(Path(spec.origin).parent):
                self.library = _declare_operators()
        return None


def hook() -> None:
    """Puts the finder in front of the import system, once."""
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _compiled_library_loads(package: Path) -> bool:
    """True also for a build without compiled operators, which imports as it is."""
    import torch

    try:
        for library in sorted(package.glob("_C*.so")):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _declare_operators() -> object:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library  # the declaration lives as long as this object


if __name__ == "__main__":
    pth = Path(sysconfig.get_paths()["purelib"]) / _PTH
    pth.write_text(_PTH_LINE)
    print(f"wrote {pth}")
