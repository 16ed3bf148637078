"""Typed settings: presets/*.yaml, `key=value` overrides, and the checks made before anything is spent.

A command gets a `Settings` from `load_settings(preset, overrides)`; parts of the code get only their own section.
`Settings` is frozen; every field says its unit and, where the paper fixes it, the paper's value.
"""

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from gubs.errors import SettingsError
from gubs.llm.settings import LLMSettings
from gubs.section import Section
from gubs.teachers.settings import TeacherSettings
from gubs.ufm.settings import UFMSettings
from gubs.ugm.settings import UGMSettings


class SourceSettings(Section):
    """Where logs and videos come from."""

    kind: Literal["synthetic", "logs", "movielens", "amazon", "kuairand", "microlens"] = "synthetic"
    path: str = ""
    """Folder (or file) of the source's data; unused by `synthetic`."""
    videos_dir: str = ""
    """Folder of video files, where the source's table has none; a file belongs to the video its stem names."""
    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """Share of rows of a file that may be rejected before the whole file is refused."""
    columns: dict[str, str] = Field(default_factory=dict)
    """`logs` only: our column name -> the column's name in your files, where they differ."""


class NoiseSettings(Section):
    """How noisy the simulated app's implicit feedback is. Rates are per sequential view, before filtering."""

    accidental_skip: float = Field(0.02, ge=0, le=1)
    """A slip of the thumb skips a video the user would have watched. True cause D."""
    app_exit: float = Field(0.02, ge=0, le=1)
    """The user leaves the app in the middle of a video."""
    interruption: float = Field(0.02, ge=0, le=1)
    """A phone call: the video stops, the next operation comes minutes later."""
    autoplay: float = Field(0.02, ge=0, le=1)
    """The video plays to a phone nobody looks at: a high play rate that means nothing."""
    wrong_tags: float = Field(0.06, ge=0, le=1)
    """Share of a user's listed tags that are not among the user's interests."""
    missing_tags: float = Field(0.2, ge=0, le=1)
    """Share of a user's interests that are not among the listed tags."""
    deviation: float = Field(0.15, ge=0, le=1)
    """How far single users deviate from their archetype's interests and tolerances."""


class SyntheticSettings(Section):
    """The simulated video app. Paper scale: 15,000 users (8,000 + 7,000), 25,000 videos, 933 K interactions."""

    users: int = Field(15000, ge=8)
    sequential_share: float = Field(8 / 15, ge=0, le=1)
    """Share of users in the sequential app; the others see pages (paper: 8,000 of 15,000)."""
    videos: int = Field(25000, ge=8)
    views_per_user: float = Field(40.0, gt=4)
    """Mean number of sequential views a user (paper: 320 K / 8,000)."""
    exposures_per_user: float = Field(87.6, gt=4)
    """Mean number of page exposures a user (paper: 613 K / 7,000)."""
    page_size: int = Field(8, ge=2)
    """Videos on a page."""
    topics: int = Field(24, ge=4, le=24)
    """Number of topics (each has words and a look)."""
    archetypes: int = Field(12, ge=2, le=24)
    """Number of latent user groups."""
    flaw_rate: float = Field(0.13, ge=0, le=1)
    """Share of videos with a flaw (clickbait title, unpleasant picture, vulgar wording)."""
    matched: float = Field(0.94, ge=0, le=1)
    """Share of recommendations that follow the listed tags; the rest follows popularity."""
    days: int = Field(7, ge=1)
    """Length of the log in days (paper: 7)."""
    noise: NoiseSettings = NoiseSettings()


class RenderSettings(Section):
    """How synthetic videos are drawn."""

    size: int = Field(112, ge=32, le=1024, multiple_of=2)
    """Width and height in pixels."""
    fps: int = Field(4, ge=1, le=60)
    max_seconds: float = Field(20.0, gt=0)
    """Longer videos are rendered up to here; their duration in the tables stays what it is."""


class FilterSettings(Section):
    """The paper's noise criteria and minimum counts."""

    noise: bool = True
    """Apply the three noise criteria (an operation before and after, the gap, no app exit)."""
    noise_scope: Literal["skips", "all"] = "skips"
    """What the noise criteria judge: fast skips only, since they are there to keep skips that mean something (the
    paper speaks of implicit negative feedback), or all sequential views."""
    max_gap_s: float = Field(120.0, gt=0)
    """Longest time between the operations before and after (paper: 2 minutes)."""
    min_video_views: int = Field(10, ge=0)
    """Videos with fewer views are left out (paper: 10)."""
    min_user_exposures: int = Field(30, ge=0)
    """Click users with fewer exposures are left out (paper: 30)."""
    fixed_point: bool = True
    """Repeat the two minimum filters until nothing changes, so that both hold in the result; else one pass."""


class SplitSettings(Section):
    """Who is tested, what is history, what is predicted."""

    test_users: int = Field(1000, ge=1)
    """Test users per task (paper: 1,000). Fewer are taken where that would leave under half of the users."""
    ugm_users: int = Field(1000, ge=1)
    """Users, drawn from the training users, from whom the UGM makes groups (paper: 1,000)."""
    click_targets: int = Field(10, ge=1)
    """Last records of a click user that are predicted (paper: 6 in one place, 10 in another)."""
    min_history: int = Field(2, ge=1)
    """Users with a shorter history have nothing to go by and are left out, counted."""


class FrameSettings(Section):
    """Frames taken from each video."""

    count: int = Field(8, ge=2, multiple_of=2)
    """Frames a video, at fixed times; even, since Qwen2.5-VL merges pairs."""
    max_pixels: int = Field(128 * 28 * 28, ge=28 * 28)
    """Pixel budget of one frame; width and height become multiples of 28."""
    min_pixels: int = Field(4 * 28 * 28, ge=28 * 28)
    """Smaller frames are scaled up to this."""
    quality: int = Field(92, ge=50, le=100)
    """JPEG quality of stored frames."""
    timeout_s: float = Field(60.0, gt=0)
    """Time one file may take; past it the decoder process is killed."""
    max_memory_mb: int = Field(2048, ge=256)
    """Address space of one decoder process beyond what it has when idle, MiB."""
    max_file_mb: float = Field(2048.0, gt=0)
    """Larger files are not opened."""
    max_source_pixels: int = Field(8192 * 8192, ge=28 * 28)
    """Pictures with more pixels are not decoded."""
    workers: int = Field(0, ge=0)
    """Decoder processes; 0 = one per CPU of the cluster."""
    store: str = ""
    """Folder or URI of the frame store that runs share; empty = `frame-store` beside the run folder."""


class RaySettings(Section):
    """How to reach or start Ray."""

    address: str = ""
    """Cluster to join; empty = RAY_ADDRESS if set, else a local cluster of our own."""
    num_cpus: int = Field(0, ge=0)
    """CPUs of a local cluster; 0 = all."""
    object_store_mb: int = Field(512, ge=80)
    """Object store of a local cluster."""
    dashboard: bool = False
    """Start the dashboard with a local cluster."""


class Settings(Section):
    """All settings of a run."""

    preset: str = "tiny"
    seed: int = 0
    source: SourceSettings = SourceSettings()
    synthetic: SyntheticSettings = SyntheticSettings()
    render: RenderSettings = RenderSettings()
    filters: FilterSettings = FilterSettings()
    splits: SplitSettings = SplitSettings()
    frames: FrameSettings = FrameSettings()
    llm: LLMSettings = LLMSettings()
    ugm: UGMSettings = UGMSettings()
    teachers: TeacherSettings = TeacherSettings()
    ufm: UFMSettings = UFMSettings()
    ray: RaySettings = RaySettings()

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.frames.min_pixels > self.frames.max_pixels:
            raise ValueError("frames.min_pixels is larger than frames.max_pixels")
        if self.source.kind != "synthetic" and not self.source.path:
            raise ValueError(f"source.kind={self.source.kind} needs source.path=FOLDER")
        return self


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("gubs.presets").iterdir() if p.name.endswith(".yaml")
    )


def load_settings(preset: str = "tiny", overrides: Sequence[str] = ()) -> Settings:
    """Resolves a preset and overrides into settings.

    Args:
        preset: the name of a preset, or the path of a YAML file of the same form.
        overrides: `key=value` texts; `key` is a dotted path (`synthetic.noise.app_exit`) or, where it is the name of
            one setting only, its last part (`app_exit`). Values are YAML. Later ones win.

    Raises:
        SettingsError: unknown preset, unknown key (with the nearest known), or a value that does not fit.
    """
    values = _read_preset(preset)
    for text in overrides:
        key, value = _parse_override(text)
        _set(values, key, value)
    try:
        return Settings(**values)
    except ValidationError as e:
        raise SettingsError(_explain(e)) from None


def keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """All dotted names of settings, in order."""
    for name, f in model.model_fields.items():
        if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel):
            yield from keys(f.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def describe(settings: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yields (dotted name, value, meaning) of every setting."""
    for name, f in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from describe(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, " ".join((f.description or "").split())


def _tables(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of settings that are tables with names of the user's own (`source.columns`, `llm.endpoints`)."""
    for name, f in model.model_fields.items():
        if isinstance(f.annotation, type) and issubclass(f.annotation, BaseModel):
            yield from _tables(f.annotation, f"{prefix}{name}.")
        elif get_origin(f.annotation) is dict:
            yield prefix + name


def _read_preset(preset: str) -> dict[str, Any]:
    if preset in preset_names():
        text = (resources.files("gubs.presets") / f"{preset}.yaml").read_text(encoding="utf-8")
    elif Path(preset).is_file():
        text = Path(preset).read_text(encoding="utf-8")
    else:
        raise SettingsError(f"unknown preset {preset!r}: not a file, and not one of {', '.join(preset_names())}")
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as e:
        raise SettingsError(f"preset {preset}: not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"preset {preset}: must be a mapping of settings")
    return {"preset": preset, **values}


def _parse_override(text: str) -> tuple[str, Any]:
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
    known = list(keys())
    if key in known or any(key.startswith(f"{k}.") for k in _tables(Settings)):
        return key
    short = [k for k in known if k.endswith("." + key)]
    if len(short) == 1:
        return short[0]
    if short:
        raise SettingsError(f"setting {key!r} could be any of {', '.join(short)}: write one of them in full")
    leaves = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(key, known, 1, 0.6) or difflib.get_close_matches(
        key.rsplit(".", 1)[-1], leaves, 1, 0.6
    )
    hint = f"; did you mean {leaves.get(near[0], near[0])!r}?" if near else "; `gubs settings` lists all"
    raise SettingsError(f"unknown setting {key!r}{hint}")


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for p in parents:
        values = values.setdefault(p, {})
    values[last] = value


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
        whole = isinstance(err["input"], dict)  # a rule about several settings, which it names itself
        lines.append(message if whole or not where else f"{where}: {message} (got {err['input']!r})")
    return "\n".join(lines)
