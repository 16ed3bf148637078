"""Files of measurements as a table for docs/measurements.md: `python benchmarks/gpu/table.py out.jsonl ...`."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ABOUT = ("name", "at", "ok", "error")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    print("\n".join(table(parser.parse_args().files)))


def table(files: list[Path]) -> Iterator[str]:
    """Lines of Markdown: one row per measurement, with where and when; what failed says so."""
    yield "| what | on | figures |"
    yield "|---|---|---|"
    for file in files:
        place = ""
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if row["name"] == "machine":
                place = f"{_counted(row['gpus'])}, {row['date']}"
            else:
                yield f"| {row['name']} | {place} | {_figures(row) if row['ok'] else 'FAILED: ' + row['error']} |"


def _figures(row: dict[str, Any]) -> str:
    return ", ".join(_figure(name, value) for name, value in row.items() if name not in _ABOUT)


def _figure(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{name.replace('_', ' ')}: " + ", ".join(_figure(n, v) for n, v in value.items())
    return (
        f"{name.replace('_', ' ')} {f'{value:,.3g}' if isinstance(value, float) and abs(value) < 1e3 else _long(value)}"
    )


def _long(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _counted(gpus: list[str]) -> str:
    return f"{len(gpus)} x {gpus[0]}" if len(gpus) > 1 else gpus[0]


if __name__ == "__main__":
    main()
