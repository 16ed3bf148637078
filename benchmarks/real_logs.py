"""What policies of a run on real logs rank: P(skip), or P(no click), at the place of the letter, of test users.

Beside each policy stands a logistic regression on what the same prompts show (the digest, the first tag, whether it is
among the interests), trained on targets of all training users. No setting is chosen here. Figures have 95 % intervals
over users, as in the IF-VR table; an unreadable answer is wrong and ranks last. `--out FOLDER` stores what each said,
as files that `gubs evaluate ifvr NAME=FILE.parquet` takes.

    python benchmarks/real_logs.py --run RUN [key=value ...] [--users 4000] [--policies sft_model grpo] [--out FOLDER]
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.evaluate.held_out import skipped
from gubs.evaluate.metrics import Predictions, evaluate
from gubs.evaluate.scores import Figures, auc_over_users, figures_at
from gubs.evaluate.table import VERDICT_METRIC
from gubs.ray_runtime import ray_session
from gubs.records import Option, Split, Task
from gubs.stages import make
from gubs.teachers import script
from gubs.ufm.inputs import Inputs
from gubs.ufm.labels import Labels
from gubs.ufm.predict import Predictor, Query
from gubs.ufm.questions import Item, Questions
from gubs.ufm.stage import policy_or_base

_TRAINING = 30_000
"""Most training targets of the logistic regression."""


@dataclass(frozen=True)
class Said:
    """What one predictor said about the targets, [N] each."""

    options: Sequence[Option | None]
    """None without a readable answer."""
    scores: Sequence[float | None]
    """P(skip), P(no click)."""
    seconds: float = 0.0


def main() -> None:
    """Asks and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--policies", nargs="*", default=["sft_model", "grpo"])
    parser.add_argument("--users", type=int, default=4000, help="test users, drawn at random")
    parser.add_argument("--preset", default="logs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help="folder for what each predictor said, as Parquet")
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    settings, run = load_settings(args.preset, args.settings), Run(args.run)
    make(["labels"], run, settings)
    questions = Questions(run, settings.ufm.inputs, tastes=False)
    fine, results = {"resamples": settings.evaluate.bootstrap, "seed": settings.seed}, {}
    with ray_session(settings.ray):
        for task in dict.fromkeys(settings.ufm.grpo.tasks):
            items = drawn(questions, task, args.users)
            if len({skipped(i) for i in items}) < 2:
                continue
            answers = {"regression": regression(questions, task, items)}
            answers |= {policy: ask(questions, items, run, policy, settings) for policy in args.policies}
            users = len({i.user_id for i in items})
            print(
                f"{task}: {len(items):,} targets of {users:,} test users, {np.mean([*map(skipped, items)]):.3f} skipped"
            )
            rows = {name: figures(items, said, **fine) for name, said in answers.items()}
            for name, row in rows.items():
                print(f"  {name:12}{in_words(row)}; {about(answers[name])}")
                if args.out:
                    store(args.out / f"{task}-{name}.parquet", items, answers[name])
            results[str(task)] = {"targets": len(items), "users": users, **rows}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def figures(items: Sequence[Item], said: Said, *, resamples: int, seed: int) -> Figures:
    """AUC, balanced accuracy at one half, and what is kept at 70 %, with intervals over users."""
    task, fine = items[0].task, {"resamples": resamples, "seed": seed}
    clicks = task is Task.CLICK
    truth = Predictions(
        user=[i.user_id for i in items],
        gold=[str(i.gold) if i.gold else None for i in items],
        predicted=[str(o) if o else None for o in said.options],
        task=task,
        play_rate=None if clicks else [i.play_rate for i in items],
        clicked=[i.gold == Option.A for i in items] if clicks else None,
    )
    score = np.array([s or 0.0 for s in said.scores])
    judged = next(m for m in evaluate(truth, **fine) if m.name == VERDICT_METRIC[task])
    kept = {f"{name} at 70 % kept": figure for name, figure in figures_at(score, truth, **fine).items()}
    accuracy = {"value": judged.value, "low": judged.low, "high": judged.high}
    return {"AUC": auc_over_users(truth, score, **fine), "balanced accuracy": accuracy, **kept}


def in_words(row: Figures) -> str:
    """Figures with half the width of their intervals."""
    return ", ".join(f"{name} {f['value']:.3f} ±{(f['high'] - f['low']) / 2:.3f}" for name, f in row.items())


def about(said: Said) -> str:
    """How often each option was named, and the time."""
    named = Counter(str(o) if o else "unreadable" for o in said.options)
    shares = ", ".join(f"{option} {n / len(said.options):.3f}" for option, n in sorted(named.items()))
    return f"says {shares}" + (f"; {said.seconds:.0f} s" if said.seconds else "")


def store(file: Path, items: Sequence[Item], said: Said) -> None:
    """Writes what a predictor said, one row per target."""
    file.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "interaction_id": [i.interaction_id for i in items],
        "user_id": [i.user_id for i in items],
        "task": [str(i.task) for i in items],
        "predicted": pa.array([str(o) if o else None for o in said.options], pa.string()),
        "score": pa.array([s or 0.0 for s in said.scores], pa.float64()),
    }
    pq.write_table(pa.table(columns), file)


def drawn(questions: Questions, task: Task, count: int) -> list[Item]:
    """All targets of some test users."""
    items = questions.items(task, Split.TEST, unexplained=True)
    users = sorted({i.user_id for i in items})
    chosen = {users[u] for u in np.random.default_rng(71).permutation(len(users))[:count]}
    return [i for i in items if i.user_id in chosen]


def ask(questions: Questions, items: list[Item], run: Run, policy: str, settings: Settings) -> Said:
    """What a policy says that answers greedily."""
    folder, began = policy_or_base(run, policy, settings.ufm), time.perf_counter()
    labels = Labels.of(Inputs(folder, settings.ufm.inputs), items[0].task)
    scores: list[float | None] = [None] * len(items)
    options: list[Option | None] = [None] * len(items)
    queries = (
        Query(n, questions.about_user(i.task, i.user_id, i.video_id), labels=labels) for n, i in enumerate(items)
    )
    with Predictor(folder, settings.ufm, pictures=settings.ufm.inputs.vision and questions.pictures) as predictor:
        for prediction in predictor.stream(queries):
            if prediction.options:
                scores[prediction.key] = prediction.options.skip
                options[prediction.key] = prediction.options.at(1 / 2)
    return Said(options, scores, time.perf_counter() - began)


def regression(questions: Questions, task: Task, items: list[Item]) -> Said:
    """What a logistic regression says that learned from what prompts show."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labelled = questions.items(task, Split.TRAIN, unexplained=True)
    order = np.random.default_rng(73).permutation(len(labelled))[:_TRAINING]
    training = [labelled[n] for n in order]
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=0.3, max_iter=500, class_weight="balanced"))
    model.fit([shown(questions, i) for i in training], [*map(skipped, training)])
    scores = model.predict_proba([shown(questions, i) for i in items])[:, 1].tolist()
    return Said([Option.B if s > 1 / 2 else Option.A for s in scores], scores)


def shown(questions: Questions, item: Item) -> dict[str, float]:
    """The features of a prompt: the parts of its digest, its tags, whether it fits."""
    person, video = questions.people(item.task)[item.user_id], questions.ifvr.videos[item.video_id]
    facts = script.facts(person, video, digest=True)
    parts = [f"{n} {part}" for n, part in enumerate(facts.digest.rstrip(".").split(", "))]
    return dict.fromkeys([*parts, f"fits {facts.fits}", f"topic {facts.topic}", *(f"tag {t}" for t in video.tags)], 1.0)


if __name__ == "__main__":
    main()
