"""The order of the rooms holds: a module imports only what stands below its room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import gubs

ROOT = Path(gubs.__file__).parent
LAYERS = [
    *(
        "__init__",
        "torchvision_hook",
        "quick_imports",
        "errors",
        "section",
        "records",
        "console",
        "artifacts",
        "ray_runtime",
    ),
    *("prompts", "llm", "data", "video", "simulator", "ugm", "teachers", "ufm", "evaluate", "serving", "report"),
    *("config", "doctor_gpu", "doctor", "stages", "ablate", "jobs", "cli"),
]
"""From the bottom to the top; docs/architecture.md says what each is for."""
PURE = [
    "ufm/rewards",
    "ufm/advantage",
    "ufm/loss",
    "evaluate/metrics",
    "evaluate/calibration",
    "evaluate/thresholds",
    "evaluate/feedback",
    "evaluate/protocols",
    "evaluate/verdicts",
    "evaluate/audit",
    "serving/filter",
    "data/filters",
    "data/splits",
    "data/partition",
    "ugm/cluster",
    "ugm/evidence",
    "ugm/author",
    "ugm/checks",
]
HEAVY = {"ray", "vllm", "deepspeed"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it: at the top, in a function, for type checking."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_no_arrow_points_upwards():
    upwards = []
    for path in sorted(ROOT.rglob("*.py")):
        here = path.relative_to(ROOT).with_suffix("").parts[0]
        if here == "presets":
            continue
        for name in imports(path):
            there = room(name)
            if name.split(".")[0] == "gubs" and there in LAYERS and LAYERS.index(there) > LAYERS.index(here):
                upwards.append(f"{path.relative_to(ROOT)} imports {name}")
    assert upwards == []


def test_every_room_has_a_place():
    rooms = {
        p.stem if p.is_file() else p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - set(LAYERS) == {"presets"}


def test_algorithms_need_no_runtime():
    for name in PURE:
        loaded = {i.split(".")[0] for i in imports(ROOT / f"{name}.py")}
        assert not loaded & HEAVY, name
