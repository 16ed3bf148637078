"""Compares judged policies, beside baselines that need no model.

A block is one task on one mix of options; its rows are metrics, its columns the policies, greedy and sampled. Each
figure has its n and its 95 % interval over users; constants and base rates are always shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gubs import console
from gubs.artifacts import Artifact, JsonObject, Run
from gubs.errors import ArtifactError
from gubs.evaluate.judge import BASE, CALIBRATED, FILTER, GREEDY, MIXES, MODES, STAGE_PREFIX, as_predictions
from gubs.evaluate.metrics import well_formed_rewards
from gubs.records import TASK_OPTIONS, Option, Task

if TYPE_CHECKING:
    from rich.table import Table

REWARD = "reward"
LABELS = {
    REWARD: "Mean reward (0-3)",
    "judge_f1": "Judge F1",
    "judge_acc": "Judge Acc",
    "judge_balanced_acc": "Judge balanced Acc",
    "judge_mcc": "Judge MCC",
    "reason_acc": "Reason Acc",
    "reason_f1": "Reason F1",
    "reason_f1_B": "Reason F1 of B",
    "reason_f1_C": "Reason F1 of C",
    "reason_f1_D": "Reason F1 of D",
    "click_f1": "Click F1",
    "click_acc": "Click Acc",
    "click_balanced_acc": "Click balanced Acc",
    "click_mcc": "Click MCC",
    "share_kept": "Share kept",
    "share_watched_lost": "Watched videos lost",
    "share_clicked_lost": "Clicked videos lost",
    "person_play_rate": "Person play rate, kept",
    "total_play_rate": "Total play rate, kept",
    "finish_rate": "Finish rate, kept",
    "play_rate_above_30": "Not skipped, kept",
    "click_rate": "Click rate, kept",
    "users_without_video": "Users without a video",
}
"""Metrics in the order shown, with their labels."""

CONSTANTS = {
    Task.SEQUENTIAL: ("always skip", "never skip", "coin"),
    Task.CLICK: ("always click", "never click", "coin"),
}
DROP = "random drop"
"""Baseline of the filter: the expected values when as many videos as the last policy's filter drops go at random."""
_LOG_WIDTH = 152
"""Width of the tables, in characters, when the output is not a terminal."""
_PRINTED = (GREEDY, CALIBRATED, FILTER)
"""Modes in the printed tables; the page has all."""


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    value: float | None
    """None if undefined."""
    low: float | None
    high: float | None
    n: int

    @property
    def text(self) -> str:
        """The value, with its interval if there is one."""
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One metric for all policies."""

    name: str
    label: str
    n: int
    base_rate: float | None
    constants: Mapping[str, float | None]
    figures: Mapping[str, Mapping[str, Figure]]
    """policy -> mode -> value."""


@dataclass(frozen=True)
class Block:
    """One task on one mix of options."""

    task: str
    mix: str
    policies: tuple[str, ...]
    items: int
    users: int
    golds: Mapping[str, int]
    unanswered: Mapping[str, Mapping[str, int]]
    """policy -> mode -> number of unreadable answers."""
    rows: tuple[Row, ...]

    def to_json(self) -> JsonObject:
        """The block as plain JSON."""
        return asdict(self)


def judged_policies(run: Run) -> list[str]:
    """Names of the judged policies: the base first, then in order of training."""
    stages = run.stages()
    names = [s.removeprefix(STAGE_PREFIX) for s in stages if s.startswith(STAGE_PREFIX)]

    def created(name: str) -> str:
        return "" if name == BASE or name not in stages else run.artifact(name).manifest.created

    return sorted(names, key=lambda n: (created(n), n))


def compare(run: Run, policies: Sequence[str] = ()) -> list[Block]:
    """One block per task and mix.

    Args:
        run: has the artifact `eval-<policy>` of each policy.
        policies: in display order; empty = all judged policies.

    Raises:
        ArtifactError: a policy was not judged, none was, or they were judged on different targets.
    """
    names = list(policies) or judged_policies(run)
    if not names:
        raise ArtifactError(f"{run.uri} has no judged policy: run `gubs judge sft_model grpo` first")
    judged = [_Judged(run.artifact(STAGE_PREFIX + n), n) for n in names]
    for other in judged[1:]:
        if other.targets != judged[0].targets:
            raise ArtifactError(
                f"{other.name} and {judged[0].name} were judged on different targets: judge both with the same settings"
            )
    return [b for task in Task for mix in MIXES if (b := _block(judged, task, mix))]


class _Judged:
    """The answers and metrics of one policy."""

    def __init__(self, artifact: Artifact, name: str):
        self.name = name
        self.rows = artifact.table("predictions").to_pylist()
        if missing := set(MODES) - {r["mode"] for r in self.rows}:
            modes = ", ".join(sorted(missing))
            raise ArtifactError(f"{artifact.uri} has no answers in mode {modes}: run `gubs judge {name} --force`")
        self.targets = {(r["interaction_id"], r["natural"], r["balanced"], r["gold"]) for r in self.rows}
        metrics = artifact.table("metrics").to_pylist()
        self.metrics = {(m["task"], m["mix"], m["mode"], m["method"], m["name"]): m for m in metrics}
        settings = artifact.manifest.settings
        self.resamples, self.seed = settings["evaluate"]["bootstrap"], settings["seed"]

    def of(self, task: Task, mix: str, mode: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if r["task"] == task and r["mode"] == mode and r[mix]]

    def reward(self, task: Task, mix: str, mode: str) -> Figure:
        """Mean R of Eq. 4; the interval is over users."""
        rows = [r for r in self.of(task, mix, mode) if r["reward"] is not None]
        users, user_codes = np.unique([r["user_id"] for r in rows], return_inverse=True)
        rewards = np.array([r["reward"] for r in rows])
        sums, counts = np.bincount(user_codes, rewards), np.bincount(user_codes)
        low = high = None
        if len(users) > 1 and self.resamples:
            drawn = np.random.default_rng(self.seed).integers(len(users), size=(self.resamples, len(users)))
            means = sums[drawn].sum(1) / counts[drawn].sum(1)
            low, high = (float(v) for v in np.percentile(means, (2.5, 97.5)))
        return Figure(float(rewards.mean()), low, high, len(rows))


def _block(judged: Sequence[_Judged], task: Task, mix: str) -> Block | None:
    rows = judged[0].of(task, mix, MODES[0])
    if not rows:
        return None
    return Block(
        task=str(task),
        mix=mix,
        policies=tuple(p.name for p in judged),
        items=len(rows),
        users=len({r["user_id"] for r in rows}),
        golds={str(o): sum(r["gold"] == o for r in rows) for o in TASK_OPTIONS[task]},
        unanswered={p.name: {m: sum(not r["predicted"] for r in p.of(task, mix, m)) for m in MODES} for p in judged},
        rows=(_reward_row(judged, task, mix, rows), *_metric_rows(judged, task, mix)),
    )


def _metric_rows(judged: Sequence[_Judged], task: Task, mix: str) -> list[Row]:
    rows = []
    for name, label in LABELS.items():
        first = judged[0].metrics.get((task, mix, MODES[0], "model", name))
        if first is None:
            continue
        constants = {c: judged[0].metrics.get((task, mix, MODES[0], c, name)) for c in CONSTANTS[task]}
        figures = {p.name: {m: _figure(p.metrics[task, mix, m, "model", name]) for m in MODES} for p in judged}
        values = {c: _defined(m["value"]) for c, m in constants.items() if m}
        if drop := judged[-1].metrics.get((task, mix, FILTER, f"{DROP}, expected", name)):
            values[DROP] = _defined(drop["value"])
        rows.append(Row(name, label, first["n"], _defined(first["base_rate"]), values, figures))
    return rows


def _reward_row(judged: Sequence[_Judged], task: Task, mix: str, rows: Sequence[dict[str, Any]]) -> Row:
    """The mean reward; a constant's is that of a well-formed answer that always names the same option."""
    skips = [Option(r["gold"]) for r in rows if r["gold"] and r["gold"] != Option.A]
    commonest = max(set(skips), key=skips.count) if skips else Option.B
    yes, no = (Option.A, Option.B) if task == Task.CLICK else (commonest, Option.A)
    constants = {
        name: float(np.nanmean(well_formed_rewards(as_predictions([r | {"predicted": option} for r in rows], task))))
        for name, option in zip(CONSTANTS[task], (yes, no), strict=False)
    }
    figures = {p.name: {m: p.reward(task, mix, m) for m in MODES} for p in judged}
    return Row(REWARD, LABELS[REWARD], figures[judged[0].name][MODES[0]].n, None, constants, figures)


def _figure(metric: Mapping[str, Any]) -> Figure:
    return Figure(_defined(metric["value"]), _defined(metric["low"]), _defined(metric["high"]), metric["n"])


def _defined(value: float | None) -> float | None:
    return None if value is None or value != value else float(value)


def verdict(blocks: Sequence[Block]) -> list[str]:
    """What the last policy is worth as a filter, in at most eight lines: natural mix, beside the baselines."""
    natural = [b for b in blocks if b.mix == MIXES[0]]
    if not natural:
        return []
    users = max(b.users for b in natural)
    lines = [f"{natural[0].policies[-1]} as a filter, on the targets of {users:,} test users as they come:"]
    for block in natural:
        lines += verdict_on(block)
    return lines


def verdict_on(block: Block) -> list[str]:
    """What the last policy is worth as a filter on one block, in at most three lines."""
    rows = {row.name: row for row in block.rows}
    click = block.task == Task.CLICK
    rate, lost, judge = (
        ("click_rate", "share_clicked_lost", "click_balanced_acc")
        if click
        else ("play_rate_above_30", "share_watched_lost", "judge_balanced_acc")
    )
    good, kept_are = ("clicked", "clicked") if click else ("watched", "not skipped")
    if (positive := block.golds[Option.A]) in (0, block.items):
        which = f"all of {block.items:,} videos were" if positive else f"none of {block.items:,} videos was"
        return [f"  {block.task}: cannot be judged: {which} {good}"]

    def share(name: str, column: str = "") -> str:
        row = rows[name]
        value = row.constants.get(column) if column else row.figures[block.policies[-1]][FILTER].value
        return "–" if value is None else f"{100 * value:.0f} %"

    unfiltered = rows[rate].base_rate
    quality = f"right about {'the click' if click else 'the skip'}: balanced accuracy {share(judge)} (constants 50 %)"
    if "reason_f1" in rows and len([n for n in block.golds.values() if n]) > 1:  # else no reason is known
        constant = share("reason_f1", CONSTANTS[Task.SEQUENTIAL][0])
        quality += f"; reason F1 {share('reason_f1')} (always the commonest {constant})"
    return [
        f"  {block.task}: keeps {share('share_kept')} of {block.items:,} videos; {share(rate)} of these are {kept_are} "
        f"(unfiltered {100 * (unfiltered or 0.0):.0f} %)",
        f"    drops {share(lost)} of the {good} videos (random drop {share(lost, DROP)})",
        f"    {quality}",
    ]


def print_blocks(blocks: Sequence[Block]) -> None:
    """Prints one table per block with its first and last policy on stdout."""
    from rich.console import Console

    screen = console.out if console.out.is_terminal else Console(width=_LOG_WIDTH, highlight=False)
    for block in blocks:
        screen.print(_as_table(block))


def _as_table(block: Block) -> "Table":
    from rich import box
    from rich.table import Table

    title = f"{block.task.capitalize()} task, {block.mix} mix: {block.items:,} targets of {block.users:,} users"
    title += f" ({', '.join(f'{n:,} {o}' for o, n in block.golds.items())})"
    unanswered = [
        f"{block.unanswered[p][m]:,} {p}, {m}" for p in block.policies for m in MODES if block.unanswered[p][m]
    ]
    title += f"; without a readable answer: {'; '.join(unanswered)}" if unanswered else ""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric (95 % interval)", no_wrap=True)
    table.add_column("n", justify="right")
    policies = list(dict.fromkeys((block.policies[0], block.policies[-1])))
    for mode in _PRINTED:
        for policy in policies:
            table.add_column(f"{policy}\n{mode}", justify="right")
    constants = (*CONSTANTS[Task(block.task)], DROP)
    for name in ("base rate", *constants):
        table.add_column(name.replace(" ", "\n"), justify="right")
    for row in block.rows:
        table.add_row(*_cells(row, policies, constants))
    return table


def _cells(row: Row, policies: Sequence[str], constants: Sequence[str]) -> list[str]:
    figures = [row.figures[p][m].text for m in _PRINTED for p in policies]
    baselines = [row.base_rate, *(row.constants.get(c) for c in constants)]
    return [row.label, f"{row.n:,}", *figures, *("–" if v is None else f"{v:.3f}" for v in baselines)]
