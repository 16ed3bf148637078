"""Names in the package say what they hold."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import gubs

PACKAGE = Path(gubs.__file__).parent
EMPTY = {"found", "known", "said", "mine", "desk", "lean"}
"""Names that tell a reader nothing."""


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name.lower(), node.lineno


def test_names_say_what_they_hold():
    files = list(PACKAGE.rglob("*.py"))
    assert len(files) > 150
    suspects = [f for f in files if EMPTY & set(re.findall(r"\w+", f.read_text()))]
    used = [f"{f}:{line}: {name}" for f in suspects for name, line in names(ast.parse(f.read_text())) if name in EMPTY]
    assert used == []
