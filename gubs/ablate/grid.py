"""Grids as data (`grids.yaml`): which settings the arms of an ablation have, and the cells that follow."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from gubs import stages
from gubs.config import Settings, load_settings
from gubs.errors import SettingsError
from gubs.evaluate.conditions import Condition
from gubs.stages import value_at

Value = bool | int | float | str | list[str]


class Times(BaseModel):
    """A multiple of the preset's value."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    times: float


Changes = dict[str, Times | Value]
"""Settings by dotted name."""


class Arm(BaseModel):
    """One arm: what it changes, and which policy is judged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["grpo", "sft_model", "base"] = "grpo"
    settings: Changes = {}

    @model_validator(mode="before")
    @classmethod
    def _settings_by_name(cls, values: dict[str, object]) -> dict[str, object]:
        """In the file, settings stand beside `policy`."""
        policy = {"policy": values["policy"]} if "policy" in values else {}
        return {**policy, "settings": {k: v for k, v in values.items() if k != "policy"}}


class Pair(BaseModel):
    """Two arms that are compared with each other, beside the comparison with the first arm."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: str
    second: str
    otherwise: str = ""
    """What is said if the first is better in no measure."""


class Grid(BaseModel):
    """An ablation; see the head of `grids.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    arms: dict[str, Arm]
    settings: Changes = {}
    levels: dict[str, Changes] = {"": {}}
    pairs: tuple[Pair, ...] = ()
    about: str = ""
    of: str = ""
    """Another ablation, whose finished policies are asked again; none is trained."""
    conditions: tuple[Condition, ...] = ()
    """How they are asked, beside their own prompts."""

    @model_validator(mode="after")
    def _names_arms(self) -> "Grid":
        unknown = {name for p in self.pairs for name in (p.first, p.second)} - set(self.arms)
        if unknown:
            raise ValueError(f"pairs name no arm: {', '.join(sorted(unknown))}")
        return self


@dataclass(frozen=True)
class Cell:
    """One policy of an ablation: an arm at a level, in a world, trained with a seed."""

    grid: str
    level: str
    arm: str
    world: int
    seed: int
    policy: str
    settings: Settings

    @property
    def name(self) -> str:
        """Of its folder: `noise/20-plain-w0-s1`."""
        words = re.findall(r"[a-z0-9.]+", f"{self.level} {self.arm}".lower())
        return f"{self.grid}/{'-'.join(words)}-w{self.world}-s{self.seed}"

    @property
    def target(self) -> str:
        """The stage that finishes it."""
        return f"{stages.EVALUATION}{self.policy}"


@cache
def grids() -> dict[str, Grid]:
    """All ablations, by name."""
    text = (resources.files("gubs.ablate") / "grids.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)
    return {name: Grid(**{"arms": entries.get(v.get("of"), v)["arms"], **v}) for name, v in entries.items()}


def find_grid(name: str) -> Grid:
    """The ablation of a name.

    Raises:
        SettingsError: there is none.
    """
    if name not in grids():
        raise SettingsError(f"there is no ablation {name!r}; there are {', '.join(grids())}")
    return grids()[name]


@dataclass(frozen=True)
class Choice:
    """Which cells of an ablation; empty = all of its arms and levels."""

    worlds: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = (0, 1, 2)
    arms: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()


def cells(name: str, choice: Choice, preset: str, overrides: Sequence[str] = ()) -> list[Cell]:
    """The cells of an ablation, those first that complete a comparison soonest.

    Args:
        name: of the ablation.
        choice: which worlds, seeds, arms and levels.
        preset: see `load_settings`.
        overrides: of the user, as `key=value`.

    Raises:
        SettingsError: no such ablation, arm or level; no world or seed; overrides name a seed; a setting is invalid.
    """
    grid = find_grid(name)
    _check_choice(name, grid, choice)
    if taken := [o for o in overrides if o.partition("=")[0].strip() in ("seed", "ufm.seed")]:
        raise SettingsError(f"{taken[0]}: worlds are named by --worlds, trainings by --seeds")
    base = load_settings(preset, overrides)
    return [
        _cell(name, level, arm, (world, seed), base, (preset, overrides))
        for level in choice.levels or grid.levels
        for world in choice.worlds
        for seed in choice.seeds
        for arm in choice.arms or grid.arms
    ]


def first_cells(chosen: Sequence[Cell]) -> list[Cell]:
    """The first cell of each level and world: the bars that need no training stand beside the policies once."""
    first: dict[tuple[str, int], Cell] = {}
    for cell in chosen:
        first.setdefault((cell.level, cell.world), cell)
    return list(first.values())


def _check_choice(name: str, grid: Grid, choice: Choice) -> None:
    for what, chosen, names in (("arm", choice.arms, grid.arms), ("level", choice.levels, grid.levels)):
        for one in chosen:
            if one not in names:
                raise SettingsError(f"ablation {name} has no {what} {one!r}; it has {', '.join(map(repr, names))}")
    if not choice.worlds or not choice.seeds:
        raise SettingsError("name at least one world and one seed: --worlds 0 --seeds 0")


def _cell(
    name: str, level: str, arm: str, place: tuple[int, int], base: Settings, given: tuple[str, Sequence[str]]
) -> Cell:
    grid, (world, seed), (preset, overrides) = grids()[name], place, given
    name = grid.of or name
    changes = {**grid.settings, **grid.levels[level], **grid.arms[arm].settings}
    own = [*overrides, *_as_overrides(changes, base), f"seed={world}", f"ufm.seed={seed}"]
    return Cell(name, level, arm, world, seed, grid.arms[arm].policy, load_settings(preset, own))


def _as_overrides(changes: Mapping[str, Times | Value], base: Settings) -> Iterator[str]:
    for key, value in changes.items():
        plain = max(1, round(value.times * value_at(base, key))) if isinstance(value, Times) else value
        yield f"{key}={json.dumps(plain)}"
