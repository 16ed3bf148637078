"""What models are asked: one Jinja template per question, filled with fields that cannot break out of it."""

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from gubs.prompts.fields import inline
from gubs.prompts.options import OPTION_TEXTS

OPTIONS = "options"
"""Represents the texts of the options among template names."""
_INCLUDE = re.compile(r'{%-?\s*include\s+"([^"]+)\.j2"')


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: _source(name.removesuffix(".j2"))),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        autoescape=False,  # nothing here is HTML; texts from outside go through `inline`
    )
    environment.filters["inline"] = inline
    return environment


def fill(template: str, **values: Any) -> str:
    """The prompt of a template (`ugm/summarize` is the file ugm/summarize.j2), without blank lines at its ends.

    Values from outside (titles, tags, profiles) must come from `fields`; single texts may be raw, since the templates
    apply the filter `inline` to them.
    """
    return _environment().get_template(f"{template}.j2").render(**values).strip()


def hashes(templates: Iterable[str]) -> dict[str, str]:
    """Hash of each template and all it includes; for `OPTIONS`, of the options' texts."""
    return {name: hashlib.sha256(_text(name).encode()).hexdigest()[:16] for name in templates}


def _text(name: str) -> str:
    if name == OPTIONS:
        return repr(OPTION_TEXTS)
    text = _source(name)
    return text + "".join(map(_text, _INCLUDE.findall(text)))


def _source(name: str) -> str:
    return (resources.files("gubs.prompts") / f"{name}.j2").read_text(encoding="utf-8")
