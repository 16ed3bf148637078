"""Artifacts that tests write by hand."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from gubs.artifacts import Artifact, Recipe, Run, writing
from gubs.config import Settings


def put(
    run: Run,
    stage: str,
    tables: Mapping[str, pa.Table],
    *,
    settings: Settings | None = None,
    inputs: Iterable[str] = (),
    info: Mapping[str, Any] | None = None,
    **more: Any,
) -> Artifact:
    """Writes an artifact with these tables; `inputs` are stages of the run that it says it was made from."""
    recipe = Recipe(inputs={name: run.artifact(name).content for name in inputs})
    recorded = (settings or Settings()).model_dump(mode="json")
    with writing(run, stage, recipe=recipe, settings=recorded, **more) as out:
        for name, table in tables.items():
            out.write_table(name, table)
        out.info = dict(info or {})
    return run.artifact(stage)
