"""What all pages share: the Jinja environment, the style, and writing a page into the run's folder.

Pages are self-contained: no script, no outside resource. Text from models and users is escaped.
"""

import base64
import io
from functools import cache
from typing import Any

import jinja2

from gubs.artifacts import Run, write_atomically

_PICTURE_PX = 224
"""Longest side of a picture."""


def render(template: str, **values: Any) -> str:
    """A page as HTML; an undefined name in the template is an error."""
    return _environment().get_template(f"{template}.html.j2").render(**values)


def write(run: Run, name: str, page: str) -> str:
    """Writes a page into the run's folder and returns its full path, with the scheme."""
    write_atomically(run.fs, run.path(name), page.encode())
    return run.full(name)


def picture(jpeg: bytes) -> str:
    """A picture as a data URI, scaled down for the page."""
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        if max(image.size) > _PICTURE_PX:
            image.thumbnail((_PICTURE_PX, _PICTURE_PX))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
            jpeg = buffer.getvalue()
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gubs.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"n": _count, "f": _three, "short": _two, "pct": _percent, "clock": _clock, "took": _took}
    return environment


def _count(n: float) -> str:
    return f"{n:,.0f}"


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _two(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _clock(seconds: float) -> str:
    """`0:41`, `1:02:03`: the length of a video."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def _took(seconds: float) -> str:
    """`41 s`, `1.5 min`: how long something took."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s"
