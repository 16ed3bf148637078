"""The documentation says what is true: examples run, tables agree with the code, commands and settings exist.

`python tests/test_docs.py` writes the stage table of docs/architecture.md again.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
from test_layers import LAYERS

import gubs
from gubs.cli import app
from gubs.config import load_settings, resolve_key, to_markdown
from gubs.stages import ABOUT_POLICY, STAGES, Stage

ROOT = Path(gubs.__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
CURRENT = [p for p in PAGES if p.name != "CHANGELOG.md"]
"""Pages that speak of the present only."""
ARCHITECTURE, EXTENDING, SETTINGS = DOCS / "architecture.md", DOCS / "extending.md", DOCS / "settings.md"
BEGIN, END = "<!-- stages: begin -->\n", "<!-- stages: end -->\n"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# Examples


@dataclass
class Example:
    """One section of docs/extending.md."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    edits: list[tuple[str, str, str]] = field(default_factory=list)
    """File, lines as they are, lines as they shall be."""
    check: str = ""


def examples() -> Iterator[Example]:
    for section in re.split(r"^## ", EXTENDING.read_text(), flags=re.MULTILINE)[1:]:
        example = Example(section.splitlines()[0])
        for language, code in _FENCE.findall(section):
            if language == "diff":
                example.edits += edits(code)
            elif code.startswith("# gubs/"):
                example.files[code.splitlines()[0].removeprefix("# ")] = code
            else:
                example.check += code
        yield example


def edits(diff: str) -> Iterator[tuple[str, str, str]]:
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        file, _, rest = part.partition("\n")
        for hunk in rest.split("@@\n")[1:]:
            lines = hunk.splitlines()
            before = "\n".join(x[1:] for x in lines if x[:1] != "+")
            after = "\n".join(x[1:] for x in lines if x[:1] != "-")
            yield file, before, after


@pytest.mark.parametrize("example", examples(), ids=lambda e: e.title)
def test_examples_of_extensions_run(example, tmp_path):
    """Each is applied to a copy of the package, and its check is run there."""
    shutil.copytree(ROOT / "gubs", tmp_path / "gubs", ignore=shutil.ignore_patterns("__pycache__"))
    for file, text in example.files.items():
        assert not (tmp_path / file).exists(), file
        (tmp_path / file).write_text(text)
    for file, before, after in example.edits:
        text = (tmp_path / file).read_text()
        assert text.count(before) == 1, f"{file} has these lines {text.count(before)} times:\n{before}"
        (tmp_path / file).write_text(text.replace(before, after))
    guard = f"import gubs\nassert gubs.__file__.startswith({str(tmp_path)!r}), gubs.__file__\n"
    (tmp_path / "check.py").write_text(guard + example.check)
    done = subprocess.run(
        [sys.executable, "check.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "assert" in example.check
    shown = [*example.files, *(file for file, _, _ in example.edits)]
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, f"--config={ROOT / 'pyproject.toml'}", *shown]
        linted = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert linted.returncode == 0, linted.stdout


# Tables that are generated


def stage_table() -> str:
    """The registry as Markdown."""
    rows = [f"| {row.name} | `{row.command}` | {reads(row)} | {decides(row)} |" for row in STAGES]
    return "\n".join(["| stage | command | reads | what decides it |", "|---|---|---|---|", *rows]) + "\n"


def reads(row: Stage) -> str:
    present = [f"{n} (if present)" for n in row.may_read]
    policy = ["the policy"] if row.name in ABOUT_POLICY.values() else []
    return ", ".join([*row.needs, *policy, *row.reads, *present]) or "–"


def decides(row: Stage) -> str:
    kept = [n for n in row.settings if not n.startswith("-")]
    without = [n[1:] for n in row.settings if n.startswith("-")]
    parts = {
        "settings": codes(kept) + (f" without {codes(without)}" if without else ""),
        "roles": codes(row.roles),
        "prompts": codes(row.prompts),
        "outside the run": ", ".join(name for name, _ in row.outside),
    }
    return "; ".join(f"{name}: {value}" for name, value in parts.items() if value) or "–"


def codes(names: Iterable[str]) -> str:
    """Names as code; several of one section together, as `teachers.{truth, rounds}`."""
    sections: dict[str, list[str]] = {}
    for name in names:
        section, _, last = name.rpartition(".")
        sections.setdefault(section, []).append(last)
    shown = [
        [f"{s}.{{{', '.join(lasts)}}}"] if s and len(lasts) > 1 else [f"{s}.{n}" if s else n for n in lasts]
        for s, lasts in sections.items()
    ]
    return ", ".join(f"`{name}`" for group in shown for name in group)


def test_the_stage_table_agrees_with_the_registry():
    text = ARCHITECTURE.read_text()
    written = text.partition(BEGIN)[2].partition(END)[0]
    assert written == stage_table(), "run `python tests/test_docs.py` to write the table again"


def test_the_page_of_settings_is_up_to_date():
    assert SETTINGS.read_text() == to_markdown(), "run `gubs settings --markdown > docs/settings.md`"


def test_rooms_are_described_in_the_order_of_the_layers():
    table = ARCHITECTURE.read_text().partition("| room |")[2].partition("\n\n")[0]
    first = [row.split("|")[1] for row in table.splitlines()[2:]]
    described = [name for cell in first for name in re.findall(r"`(\w+)(?:/|\.py)`", cell)]
    there = {p.stem for p in (ROOT / "gubs").iterdir() if (p.is_dir() or p.suffix == ".py") and p.stem[0] != "_"}
    assert [n for n in described if n != "presets"] == [n for n in reversed(LAYERS) if n in there]
    assert "presets" in described


# What the text names


def code(page: Path) -> Iterator[str]:
    """Every block of code, and every piece of code in a line, of a page."""
    text = page.read_text()
    yield from (block for language, block in _FENCE.findall(text) if language in ("", "bash", "yaml"))
    yield from re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))


def commands(group: typer.Typer) -> set[str]:
    names = {c.name or c.callback.__name__ for c in group.registered_commands}
    return names | {g.name for g in group.registered_groups}


@pytest.mark.parametrize("page", CURRENT, ids=lambda p: p.name)
def test_commands_exist(page):
    named = {name for text in code(page) for name in re.findall(r"\bgubs ([a-z]+)\b", text)}
    assert named - commands(app) - ({"topics"} if page == EXTENDING else set()) == set()
    make = {name for text in code(page) for name in re.findall(r"^(?:time )?make ([a-z]+)", text, re.MULTILINE)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert make - targets == set()


def strings(file: Path) -> Iterator[str]:
    """Every string literal of a module, docstrings and the parts of f-strings too."""
    constants = (node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
    return (value for value in constants if isinstance(value, str))


_COMMAND = re.compile(r"`gubs ([a-z]+)(?: ([a-z]+)\b)?|\bgubs ([a-z]+)(?: ([a-z]+))? --")
"""In prose a command is quoted or has an option; "what gubs makes" is none."""


def test_commands_in_messages_exist():
    """Remedies, docstrings and the registry name commands; one that was renamed would send a person nowhere."""
    texts = [f"`{row.command}`" for row in STAGES]
    modules = [file for file in (ROOT / "gubs").rglob("*.py") if "gubs " in file.read_text()]
    texts += [text for file in modules for text in strings(file)]
    named = {(m[1] or m[3], m[2] or m[4]) for text in texts for m in _COMMAND.finditer(text)}
    assert len(named) > 20
    groups = {g.name: commands(g.typer_instance) for g in app.registered_groups}
    assert {command for command, _ in named} - commands(app) == set()
    assert {(c, sub) for c, sub in named if sub and c in groups and sub not in groups[c]} == set()


@pytest.mark.parametrize("page", CURRENT, ids=lambda p: p.name)
def test_settings_exist(page):
    for text in code(page):
        for key in re.findall(r"(?<![\w./$-])([a-z][a-z_0-9]*(?:\.[a-z_0-9]+)+)(?==)", text):
            resolve_key(key)


@pytest.mark.parametrize("page", CURRENT, ids=lambda p: p.name)
def test_presets_load(page, tmp_path):
    for language, block in _FENCE.findall(page.read_text()):
        if language == "yaml":
            (tmp_path / "my.yaml").write_text(block)
            load_settings(str(tmp_path / "my.yaml"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    files = [f for text in code(page) for f in re.findall(r"\b(?:benchmarks|ray_jobs|tests|docs)/[\w/]+\.\w+", text)]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing + [f for f in files if not (ROOT / f).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_anchors_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, anchor


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


if __name__ == "__main__":
    before, _, rest = ARCHITECTURE.read_text().partition(BEGIN)
    ARCHITECTURE.write_text(before + BEGIN + stage_table() + END + rest.partition(END)[2])
