"""The policies of an ablation against baselines, pooled over apps and trainings: `gubs ablate` compares arms only.

    python benchmarks/pooled.py --run runs/ablations --worlds 7,11,13 --seeds 0,1,2 --arms sft,weighted,plain

Reads what is stored (evaluations and bars) and trains nothing. Each user counts once, with the mean over the trainings.
Where equal shares are kept, they are kept in each app: scores of different apps need not compare.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gubs.artifacts import Run
from gubs.evaluate import table
from gubs.evaluate.metrics import Floats
from gubs.evaluate.predictors import CALIBRATED, KEYS, REWARD, Stored, _answers, collect, evaluations
from gubs.evaluate.scores import RANDOM, SHARE, compared_by, share_sums
from gubs.evaluate.verdicts import exchanges_for, paired, with_holm
from gubs.jobs import parse_numbers
from gubs.records import Task

TASK = Task.SEQUENTIAL
SHOWN = ("logistic, as shown", "boosting, as shown")
BY_REWARD = ("logistic, by reward", "boosting, by reward")
NEVER = "never skip"
RESAMPLES = 5000
Sums = Mapping[str, Floats]
"""Of each user, [U]."""


def trainings(cells: Path, arm: str, world: int, seeds: Sequence[int]) -> Iterator[Stored]:
    """The calibrated answers of an arm's trainings in one app."""
    for seed in seeds:
        (evaluation,) = evaluations(Run(cells / f"{arm}-w{world}-s{seed}"))
        answers = _answers(evaluation, TASK)
        yield Stored(f"{arm}/{seed}", answers.loc[answers["mode"] == CALIBRATED, [*KEYS, "failure"]], True, "policy")


def sums_of(cells: Path, world: int, seeds: Sequence[int], arms: Sequence[str]) -> dict[str, Sums]:
    """By predictor: what figures at an equal share kept, and the mean reward, are made of; arms are means of their
    trainings.
    """
    with_bars = [c for c in sorted(cells.glob(f"*-w{world}-s*")) if (c / "bars").exists()]
    if not with_bars:
        raise SystemExit(f"{cells}: no finished cell of world {world} with baselines; `gubs ablate` makes them")
    stored, happened = collect(Run(with_bars[0]), TASK, {})
    policies = [p for arm in arms for p in trainings(cells, arm, world, seeds)]
    predictors = [*(p for p in stored if p.kind == "baseline"), *policies]
    truth = table._common(predictors, happened, TASK)
    answers = {p.name: table._aligned(p, truth, TASK) for p in predictors}
    first = answers[predictors[0].name][0]
    rewards = table._constant_rewards(first) | table._rewards(predictors, answers, truth)
    users = np.unique(np.asarray(first.user, dtype=np.str_), return_inverse=True)[1]
    scores = {RANDOM: np.zeros(len(truth))} | {name: score for name, (_, score) in answers.items()}
    sums = {name: dict(share_sums(score, first, SHARE)) for name, score in scores.items()}
    for name, values in rewards.items():
        sums.setdefault(name, {"items": sums[RANDOM]["items"]})
        sums[name] = {**sums[name], REWARD: np.bincount(users, values).astype(np.float64)}
    mean = {arm: [sums[f"{arm}/{seed}"] for seed in seeds] for arm in arms}
    return sums | {arm: {n: np.mean([s[n] for s in own], axis=0) for n in own[0]} for arm, own in mean.items()}


def main() -> None:
    """Prints a line per predictor and a verdict per pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--ablation", default="rule")
    parser.add_argument("--worlds", required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--arms", default="sft,weighted,plain")
    args = parser.parse_args()
    cells, arms = Path(args.run) / "cells" / args.ablation, args.arms.split(",")
    worlds = [sums_of(cells, w, parse_numbers(args.seeds), arms) for w in parse_numbers(args.worlds)]
    pooled = {
        name: {n: np.concatenate([w[name][n] for w in worlds]) for n in worlds[0][name]}
        for name in worlds[0]
        if "/" not in name and all(name in w for w in worlds)
    }
    statistics = {**compared_by(TASK, SHARE), REWARD: lambda sums: sums[REWARD] / sums["items"]}
    for name, sums in pooled.items():
        total = {n: values.sum() for n, values in sums.items()}
        of_shares = [f"{m} {float(s(total)):.3f}" for m, s in statistics.items() if m != REWARD and "rate" in total]
        of_reward = [f"{REWARD} {float(statistics[REWARD](total)):.3f}"] if REWARD in total else []
        print(f"{name:<28}{'; '.join(of_shares + of_reward)}")
    for metric, statistic in statistics.items():
        rivals = (NEVER, *BY_REWARD) if metric == REWARD else (RANDOM, *SHOWN, *BY_REWARD)
        pairs = [(a, b) for a in arms for b in (*rivals, *arms[: arms.index(a)])]
        fine = {"resamples": RESAMPLES, "exchanges": exchanges_for(len(pairs)), "seed": 0}
        raw = [replace(paired(pooled[a], pooled[b], statistic, **fine), first=a, second=b) for a, b in pairs]
        for v in with_holm(raw):
            interval = f"{v.difference:+.3f} ({v.low:+.3f} to {v.high:+.3f}; detectable {v.detectable:.3f})"
            print(f"{metric}: {v.first}, {v.second}: {interval}: {v.word}")


if __name__ == "__main__":
    main()
