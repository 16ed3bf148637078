"""Does it learn? SFT, plain GRPO and GA-GRPO by each advantage rule, over several seeds, judged on held-out users.

Every seed trains its own SFT model on the same data set and every policy from there, as Ray jobs do; the policies then
answer the same targets of test users. Finished parts are kept in the folder: started again, it continues. On two cores
two processes with one thread each (`ufm.workers.threads=1`) and seeds of their own get through in about half the time.

    python benchmarks/learning.py --work /tmp/learning --json out.json
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gubs import stages
from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.evaluate.compare import compare
from gubs.ray_runtime import ray_session
from gubs.records import Task

POLICIES: Mapping[str, Sequence[str]] = {
    "plain": ["ufm.grpo.groups=false", "ufm.grpo.advantage.rule=weighted"],
    "paper": ["ufm.grpo.advantage.rule=paper"],
    "weighted": ["ufm.grpo.advantage.rule=weighted"],
    "anchored": ["ufm.grpo.advantage.rule=anchored"],
    "no-frames": ["ufm.grpo.advantage.rule=weighted", "ufm.inputs.vision=false"],
}
"""What differs between the policies. Plain: six samples from the user's own prompt, standardised without weights."""

SFT, BLIND = "sft", "sft, no frames"
DATA = ("raw", "truth", "videos", "ifvr", "frames", "ugm", "sft", "labels", "profiles")
"""Stages that all seeds share, as they were made with the data's own seed."""

FIGURES = (
    ("reward", "sequential", "balanced", "sampled"),
    ("reward", "sequential", "balanced", "greedy"),
    ("reward", "sequential", "natural", "sampled"),
    ("reward", "sequential", "natural", "greedy"),
    ("judge_f1", "sequential", "natural", "greedy"),
    ("judge_f1", "sequential", "natural", "sampled"),
    ("judge_balanced_acc", "sequential", "natural", "greedy"),
    ("reason_f1", "sequential", "natural", "greedy"),
    ("reason_f1", "sequential", "natural", "sampled"),
    ("reason_f1", "sequential", "balanced", "greedy"),
    ("reason_f1", "sequential", "balanced", "sampled"),
    ("reason_f1_B", "sequential", "balanced", "greedy"),
    ("share_kept", "sequential", "natural", "greedy"),
    ("share_watched_lost", "sequential", "natural", "greedy"),
    ("total_play_rate", "sequential", "natural", "greedy"),
    ("click_balanced_acc", "click", "natural", "greedy"),
)
"""Metric, task, mix of options, way of answering."""

BETTER: Mapping[str, int] = {"share_watched_lost": -1, "share_kept": 0}
"""Which way is better, where it is not up: down, or neither."""

FRAMES = "weighted"
"""The policy that `no-frames` is compared with: they differ in nothing else."""

Figures = dict[str, dict[str, float]]
"""Policy -> figure -> value."""
Plain = dict[str, dict[str, float]]
"""Figure -> n, base rate and what constants get."""


def main() -> None:
    """Trains what is missing, judges it, prints the table and draws the curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--curves", type=Path, help="SVG of the rewards; default: curves.svg in the folder")
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    shared = load_settings(args.preset, args.settings)
    plain: Plain = {}
    with ray_session(shared.ray):
        stages.make(["frames", "ugm", "sft", "labels"], Run(args.work / "data"), shared)
        found = {seed: run_seed(args, seed, plain) for seed in args.seeds}
    table = summary(found)
    print_table(table, plain, args.seeds)
    print_frames(found)
    draw_curves(args)
    if args.json:
        args.json.write_text(json.dumps({"seeds": found, "table": table, "without a model": plain}, indent=1))


def run_seed(args: argparse.Namespace, seed: int, plain: Plain) -> Figures:
    """All policies of one seed; what needs no model goes into `plain`."""
    run = linked(args.work / "data", args.work / f"seed-{seed}", DATA)
    base = [*args.settings, f"seed={seed}"]
    stages.make([stages.SFT], run, load_settings(args.preset, base), as_made=DATA)
    judge(run, stages.SFT, load_settings(args.preset, args.settings))
    blind = linked(Path(run.root), args.work / f"seed-{seed}-blind", (*DATA, stages.SFT))
    judge(blind, stages.SFT, load_settings(args.preset, [*args.settings, "ufm.inputs.vision=false"]))
    found = {SFT: dict(figures(run, stages.SFT, plain)), BLIND: dict(figures(blind, stages.SFT, {}))}
    for policy in args.policies:
        name = f"grpo-{policy}"
        settings = load_settings(args.preset, [*base, *POLICIES[policy]])
        stages.make([stages.named(stages.GRPO, name, settings)], run, settings, as_made=[*DATA, stages.SFT])
        judge(run, name, load_settings(args.preset, [*args.settings, *POLICIES[policy]]))
        found[policy] = dict(figures(run, name, {}))
    return found


def linked(data: Path, folder: Path, names: Sequence[str]) -> Run:
    """A run of its own that stands on stages of another."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in names:
        target = folder / stage
        if (data / stage).exists() and not target.exists():
            target.symlink_to((data / stage).absolute())
    return Run(folder)


def judge(run: Run, policy: str, settings: Settings) -> None:
    """Asks a policy about the test users; the seed is that of the data, so that all are asked the same."""
    stages.make([f"{stages.EVALUATION}{policy}"], run, settings, as_made=[*DATA, policy])


def figures(run: Run, policy: str, plain: Plain) -> Iterator[tuple[str, float]]:
    """The figures of one judged policy; what needs no model goes into `plain`."""
    rows = {(b.task, b.mix, r.name): r for b in compare(run, [policy]) for r in b.rows}
    for name, task, mix, mode in FIGURES:
        if row := rows.get((task, mix, name)):
            value = row.figures[policy][mode].value
            figure = f"{name} {task} {mix} {mode}"
            fixed = {"n": float(row.n), "base rate": row.base_rate, **dict(list(row.constants.items())[:2])}
            plain[figure] = {k: math.nan if v is None else v for k, v in fixed.items()}
            yield figure, math.nan if value is None else value


def summary(found: Mapping[int, Figures]) -> dict[str, dict[str, Any]]:
    """Figure -> policy -> `gain` over SFT, as it says, with the mean and standard deviation over the seeds."""
    table: dict[str, dict[str, Any]] = {}
    for figure in next(iter(found.values()))[SFT]:
        values = {p: [f[p][figure] for f in found.values()] for p in next(iter(found.values()))}
        for policy, mine in values.items():
            cell = {"mean": statistics.fmean(mine), "std": statistics.stdev(mine) if len(mine) > 1 else math.nan}
            table.setdefault(figure, {})[policy] = cell | gain(figure, values[SFT], mine)
    return table


def gain(figure: str, before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """The least gain of a seed, and whether every seed gained more than the larger of both standard deviations."""
    better = BETTER.get(figure.split()[0], 1)
    least = min(better * (a - b) for b, a in zip(before, after, strict=True))
    beyond = len(after) > 1 and least > max(map(statistics.stdev, (before, after)))
    return {"least_gain": least, "in_every_seed_beyond_the_spread": beyond}


def print_frames(found: Mapping[int, Figures]) -> None:
    """What the frames are worth: each figure with them minus without them, seed by seed."""
    if not all({FRAMES, "no-frames"} <= set(f) for f in found.values()):
        return
    print(f"\n{FRAMES} minus no-frames, seed by seed; * = all better by more than both deviations over the seeds")
    for figure in next(iter(found.values()))[SFT]:
        without, seen = ([f[p][figure] for f in found.values()] for p in ("no-frames", FRAMES))
        star = "*" if gain(figure, without, seen)["in_every_seed_beyond_the_spread"] else ""
        print(f"{figure:<50}" + "".join(f"{s - w:>+9.3f}" for w, s in zip(without, seen, strict=True)), star)


def print_table(table: Mapping[str, Mapping[str, Any]], plain: Plain, seeds: Sequence[int]) -> None:
    """One row a figure, one column a policy: mean +- standard deviation; * = every seed gained more than that."""
    policies, fixed = list(next(iter(table.values()))), list(next(iter(plain.values())))[:2]
    print(
        f"mean +- standard deviation over seeds {', '.join(map(str, seeds))}; * every seed gained more over SFT than "
        "the larger of both deviations; the constants say yes (always skip, always click) and no"
    )
    print(f"{'':<50}" + "".join(f"{p:>18}" for p in policies) + "".join(f"{p:>11}" for p in (*fixed, "yes", "no")))
    for figure, row in table.items():
        cells = [
            f"{c['mean']:.3f} +- {c['std']:.3f}{'*' if c['in_every_seed_beyond_the_spread'] else ' '}"
            for c in row.values()
        ]
        plainly = "".join(f"{v:>11.{0 if k == 'n' else 3}f}" for k, v in plain[figure].items())
        print(f"{figure:<50}" + "".join(f"{c:>18}" for c in cells) + plainly)


def draw_curves(args: argparse.Namespace) -> None:
    """The reward of the training user's own samples against the step, a line a policy: mean over the seeds."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.figure import Figure

    from gubs.report.training import smooth

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for policy in args.policies:
        curves = [_rewards(args.work / f"seed-{s}", f"grpo-{policy}") for s in args.seeds]
        mean = np.mean(curves, axis=0)
        axes.plot(np.arange(len(mean)) + 1, smooth(mean, max(1, len(mean) // 6)), label=policy)
    axes.set_xlabel("step of the sequential task (all policies get the same records)")
    axes.set_ylabel("raw reward of T")
    axes.legend(frameon=False)
    with mpl.rc_context({"svg.hashsalt": "learning"}):
        figure.savefig(args.curves or args.work / "curves.svg", format="svg", metadata={"Date": None})


def _rewards(folder: Path, stage: str) -> Any:
    """Raw reward of T at the steps of the sequential task."""
    import numpy as np

    steps = Run(folder).artifact(stage).table("steps")
    rewards = steps["reward_raw/T"].to_numpy()
    tasks = np.resize(Run(folder).artifact(stage).manifest.info["tasks"], len(rewards))
    return rewards[tasks == Task.SEQUENTIAL]


if __name__ == "__main__":
    main()
