"""Typed settings: presets/*.yaml, `key=value` overrides, and checks before anything is spent.

A command gets a `Settings` from `load_settings(preset, overrides)`; other code gets only its own section. `Settings` is
frozen; every field has its unit and, where the paper fixes it, the paper's value.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from gubs.artifacts import JsonObject
from gubs.data.settings import DataSettings, FilterSettings, SourceSettings, SplitSettings
from gubs.errors import SettingsError
from gubs.evaluate.settings import EvalSettings
from gubs.llm.settings import LLMSettings
from gubs.ray_runtime import RaySettings
from gubs.section import Section
from gubs.serving.settings import ServingSettings
from gubs.simulator.settings import RenderSettings, SyntheticSettings
from gubs.teachers.settings import TeacherSettings
from gubs.ufm.settings import UFMSettings
from gubs.ugm.settings import UGMSettings
from gubs.video.settings import FrameSettings


class Settings(Section):
    """All settings of a run."""

    preset: str = "tiny"
    """Name of a preset or path of a YAML file, given as `--preset`."""
    seed: int = 0
    """Seed of every random draw."""
    source: SourceSettings = SourceSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    render: RenderSettings = RenderSettings()
    filters: FilterSettings = FilterSettings()
    splits: SplitSettings = SplitSettings()
    data: DataSettings = DataSettings()
    frames: FrameSettings = FrameSettings()
    llm: LLMSettings = LLMSettings()
    ugm: UGMSettings = UGMSettings()
    teachers: TeacherSettings = TeacherSettings()
    ufm: UFMSettings = UFMSettings()
    evaluate: EvalSettings = EvalSettings()
    serving: ServingSettings = ServingSettings()
    ray: RaySettings = RaySettings()


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    files = (p.name for p in resources.files("gubs.presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml"))


_RENAMED = {
    "teachers.truth": (
        "is now three settings: teachers.train_labels=truth, teachers.test_labels=truth (whose reasons are true), "
        "teachers.script_flaws=true (what the scripted teacher is told)"
    )
}
"""Settings that no longer exist -> what to write instead."""


def load_settings(preset: str = "tiny", overrides: Sequence[str] = ()) -> Settings:
    """Resolves a preset and overrides into settings.

    Args:
        preset: the name of a preset, or the path of a YAML file of the same form. `base: tiny` in it names a preset
            that it changes; without, it changes the defaults.
        overrides: `key=value` texts; `key` is a dotted name (`synthetic.noise.app_exit`) or, if no other setting ends
            in it, its last part (`app_exit`). Values are YAML. Later ones win.

    Raises:
        SettingsError: unknown preset, unknown key (with the closest name), or an invalid value.
    """
    values = _read_preset(preset)
    for text in overrides:
        key, value = _parse_override(text)
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    try:
        return Settings(**values)
    except ValidationError as e:
        raise SettingsError(_explain(e)) from None


def keys(model: type[BaseModel] = Settings) -> Iterator[str]:
    """All dotted names of settings, in order."""
    yield from (name for name, _ in _fields(model))


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, f in model.model_fields.items():
        if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel):
            yield from _fields(f.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, f


def describe(settings: BaseModel) -> Iterator[tuple[str, object, str]]:
    """Yields (dotted name, value, meaning) of every setting."""
    for name, f in _fields(type(settings)):
        value: object = settings
        for part in name.split("."):
            value = getattr(value, part)
        yield name, value, " ".join((f.description or "").split())


_MARKDOWN_HEAD = """# Settings

<!-- Generated. To update: gubs settings --markdown > docs/settings.md -->

Every setting with its default, one table per section. Set one on the command line as `key=value`, where `key` is the
dotted name or, if no other setting ends in it, its last part: `min_video_views=3` is `filters.min_video_views=3`.
Values are YAML. A YAML file passed as `--preset my.yaml` sets several at once.

The defaults below apply where a preset says nothing. `gubs settings --preset tiny` shows the values under a preset;
the presets themselves are in [gubs/presets](../gubs/presets).
"""


def to_markdown() -> str:
    """The text of docs/settings.md."""
    lines = [_MARKDOWN_HEAD]
    for path, section, about in _sections(Settings()):
        lines += [f"## `{path}`" if path else "## The run", "", about, ""]
        lines += ["| name | default | meaning |", "|---|---|---|"]
        lines += [_row(section, name, text) for name, _, text in describe(section) if "." not in name]
        lines.append("")
    return "\n".join(lines)


def _sections(section: BaseModel, path: str = "", about: str = "") -> Iterator[tuple[str, BaseModel, str]]:
    """Dotted name, section and description of each section that has settings itself, from the top."""
    fields = type(section).model_fields
    below = [name for name in fields if isinstance(getattr(section, name), BaseModel)]
    if len(below) < len(fields):
        yield path, section, " ".join(f"{about} {type(section).__doc__}".split())
    for name in below:
        yield from _sections(getattr(section, name), f"{path}.{name}" if path else name, fields[name].description or "")


def _row(section: BaseModel, name: str, text: str) -> str:
    value, kind = section.model_dump(mode="json")[name], type(section).model_fields[name].annotation
    written = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()
    default = f"`{written}`" if value != "" else "empty"
    if get_origin(kind) is Literal:
        text = f"{text} One of {', '.join(f'`{c}`' for c in get_args(kind))}.".lstrip()
    cells = (f"`{name}`", default, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _read_preset(preset: str) -> JsonObject:
    names = preset_names()
    path = resources.files("gubs.presets") / f"{preset}.yaml" if preset in names else Path(preset)
    if not path.is_file():
        raise SettingsError(f"unknown preset {preset!r}: not a file, and not one of {', '.join(names)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        raise SettingsError(f"preset {preset}: not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"preset {preset}: must be a mapping of settings (`seed: 3`)")
    base = values.pop("base", None)
    if base is not None and base not in names:
        raise SettingsError(f"preset {preset}: base={base} is not one of {', '.join(names)}")
    return _merged(_read_preset(base) if base else {}, {"preset": preset, **values})


def _merged(values: JsonObject, changes: JsonObject) -> JsonObject:
    """Nested values with changes: sections are merged, single values replaced."""
    merged = dict(values)
    for name, change in changes.items():
        below = merged.get(name)
        merged[name] = _merged(below, change) if isinstance(below, dict) and isinstance(change, dict) else change
    return merged


def _parse_override(text: str) -> tuple[str, object]:
    key, sep, value = text.partition("=")
    if not sep:
        raise SettingsError(f"{text!r} is not of the form key=value")
    try:
        return resolve_key(key.strip()), yaml.safe_load(value) if value else ""
    except yaml.YAMLError:
        raise SettingsError(f"{key}: {value!r} is not a YAML value") from None


def resolve_key(key: str) -> str:
    """The dotted name that `key` stands for.

    Raises:
        SettingsError: no setting, or several, have that name.
    """
    names = list(keys())
    # Names inside these settings are the user's: `source.columns.age`, `llm.endpoints.default.model`.
    tables = (name for name, f in _fields(Settings) if get_origin(f.annotation) is dict)
    if key in names or any(key.startswith(f"{table}.") for table in tables):
        return key
    matches = [name for name in names if name.endswith("." + key)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise SettingsError(f"setting {key!r} could be any of {', '.join(matches)}: write one of them in full")
    for earlier, remedy in _RENAMED.items():
        if key == earlier or earlier.endswith("." + key):
            raise SettingsError(f"{earlier} {remedy}")
    short = {name.rsplit(".", 1)[-1]: name for name in names}
    last = key.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(key, names, 1, 0.6) or difflib.get_close_matches(last, short, 1, 0.6)
    hint = f"did you mean {short.get(close[0], close[0])!r}?" if close else "`gubs settings` lists all"
    raise SettingsError(f"unknown setting {key!r}; {hint}")


def _explain(e: ValidationError) -> str:
    lines = []
    for err in e.errors():
        where = ".".join(str(p) for p in err["loc"])
        if err["type"] == "extra_forbidden":
            try:
                resolve_key(where)
                lines.append(f"unknown setting {where!r}")
            except SettingsError as unknown:
                lines.append(str(unknown))
            continue
        message = err["msg"].removeprefix("Value error, ")
        about_section = isinstance(err["input"], dict)  # a rule about several settings names them itself
        lines.append(message if about_section or not where else f"{where}: {message} (got {err['input']!r})")
    return "\n".join(lines)
