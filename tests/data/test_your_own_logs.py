"""Every example of docs/your-own-logs.md gives what it says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gubs
from gubs.config import load_settings
from gubs.data.sources import SourceTables, read_source
from gubs.errors import InputError

PAGE = Path(gubs.__file__).parent.parent / "docs" / "your-own-logs.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> Iterator[tuple[str, dict[str, str]]]:
    """Title, and code by language, of each section."""
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        yield section.splitlines()[0], dict(FENCE.findall(section))


def results(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """What the checks of an example may speak of."""
    settings = load_settings("tiny", ["source.kind=logs", f"source.path={folder}", *overrides])
    try:
        tables: SourceTables = read_source(settings.source)
    except InputError as e:
        return {"refusal": str(e)}
    rejects = [tuple(row.values()) for row in tables.rejects.to_pylist()]
    named = {name: getattr(tables, name).to_pydict() for name in ("interactions", "users", "videos")}
    return {"tables": tables, "notes": tables.notes, "rejects": rejects, **named}


@pytest.mark.parametrize(("title", "blocks"), sections(), ids=lambda value: value if isinstance(value, str) else "")
def test_an_example_gives_what_the_page_says(title: str, blocks: dict[str, str], tmp_path: Path) -> None:
    files = re.split(r"^# (\S+)\n", blocks["text"], flags=re.MULTILINE)[1:]
    for name, text in zip(files[::2], files[1::2], strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    overrides = re.findall(r"source\.(?!kind|path)\S+=\S+", blocks.get("bash", ""))
    assert "assert" in blocks["python"]
    exec(blocks["python"], {"folder": tmp_path, **results(tmp_path, overrides)})
