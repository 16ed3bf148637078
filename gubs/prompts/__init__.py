"""What models are asked: one Jinja template a question, filled with fields that cannot break out of their place."""

from functools import cache
from importlib import resources
from typing import Any

import jinja2

from gubs.prompts.fields import inline


@cache
def _environment() -> jinja2.Environment:
    folder = resources.files("gubs.prompts")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        autoescape=False,  # nothing here is HTML; texts from outside go through `inline`
    )
    environment.filters["inline"] = inline
    return environment


def fill(template: str, **values: Any) -> str:
    """The prompt of a template (`summarize` is the file summarize.j2). Blank lines at the ends are cut.

    Values that come from outside (titles, tags, profiles) must have gone through `fields`; the templates put single
    texts through the filter `inline` themselves.
    """
    return _environment().get_template(f"{template}.j2").render(**values).strip()
