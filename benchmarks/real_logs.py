"""What policies of a run on real logs rank: P(skip), or P(no click), at the place of the letter, of test users.

Beside each policy stands a logistic regression on what the same prompts show (the digest, the first tag, whether it is
among the interests), trained on targets of all training users. No setting is chosen here.

    python benchmarks/real_logs.py --run RUN [key=value ...] [--users 4000] [--policies sft_model grpo]
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np

from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.evaluate.held_out import skipped
from gubs.evaluate.thresholds import auc
from gubs.ray_runtime import ray_session
from gubs.records import Split, Task
from gubs.stages import make
from gubs.teachers import script
from gubs.ufm.inputs import Inputs
from gubs.ufm.labels import Labels
from gubs.ufm.predict import Predictor, Query
from gubs.ufm.questions import Item, Questions
from gubs.ufm.stage import policy_or_base

_TRAINING = 30_000
"""Most training targets of the logistic regression."""


def main() -> None:
    """Asks and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--policies", nargs="*", default=["sft_model", "grpo"])
    parser.add_argument("--users", type=int, default=4000, help="test users, drawn at random")
    parser.add_argument("--preset", default="logs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value")
    args = parser.parse_args()
    settings, run = load_settings(args.preset, args.settings), Run(args.run)
    make(["labels"], run, settings)
    questions = Questions(run, settings.ufm.inputs, tastes=False)
    results = {}
    with ray_session(settings.ray):
        for task in dict.fromkeys(settings.ufm.grpo.tasks):
            items = drawn(questions, task, args.users)
            if len({skipped(i) for i in items}) < 2:
                continue
            rows = {"regression": regression(questions, task, items)}
            rows |= {policy: ask(questions, items, run, policy, settings) for policy in args.policies}
            users = len({i.user_id for i in items})
            print(
                f"{task}: {len(items):,} targets of {users:,} test users, {np.mean([*map(skipped, items)]):.3f} skipped"
            )
            for name, figures in rows.items():
                print(f"  {name:12}" + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
            results[str(task)] = {"targets": len(items), "users": users, **rows}
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


def drawn(questions: Questions, task: Task, count: int) -> list[Item]:
    """All targets of some test users."""
    items = questions.items(task, Split.TEST, unexplained=True)
    users = sorted({i.user_id for i in items})
    chosen = {users[u] for u in np.random.default_rng(71).permutation(len(users))[:count]}
    return [i for i in items if i.user_id in chosen]


def ask(questions: Questions, items: list[Item], run: Run, policy: str, settings: Settings) -> dict[str, float]:
    """The figures of a policy that answers greedily."""
    folder, began = policy_or_base(run, policy, settings.ufm), time.perf_counter()
    labels = Labels.of(Inputs(folder, settings.ufm.inputs), items[0].task)
    scores: list[float | None] = [None] * len(items)
    best: Counter[str] = Counter()
    queries = (
        Query(n, questions.about_user(i.task, i.user_id, i.video_id), labels=labels) for n, i in enumerate(items)
    )
    with Predictor(folder, settings.ufm, pictures=settings.ufm.inputs.vision and questions.pictures) as predictor:
        for prediction in predictor.stream(queries):
            if prediction.options:
                scores[prediction.key] = prediction.options.skip
                best[str(prediction.options.best)] += 1
    read = [n for n, score in enumerate(scores) if score is not None]
    truth = [skipped(items[n]) for n in read]
    figures = ranked([scores[n] or 0.0 for n in read], truth)
    answered = {f"says {option}": count / len(items) for option, count in sorted(best.items())}
    return {**figures, "unreadable": 1 - len(read) / len(items), **answered, "seconds": time.perf_counter() - began}


def ranked(scores: list[float], truth: list[bool]) -> dict[str, float]:
    """AUC, and balanced accuracy at one half."""
    from sklearn.metrics import balanced_accuracy_score

    accuracy = balanced_accuracy_score(truth, np.asarray(scores) > 1 / 2)
    return {"AUC": auc(scores, truth), "balanced accuracy": float(accuracy)}


def regression(questions: Questions, task: Task, items: list[Item]) -> dict[str, float]:
    """The figures of a logistic regression on what prompts show."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    candidates = questions.items(task, Split.TRAIN, unexplained=True)
    order = np.random.default_rng(73).permutation(len(candidates))[:_TRAINING]
    training = [candidates[n] for n in order]
    model = make_pipeline(DictVectorizer(), LogisticRegression(C=0.3, max_iter=500, class_weight="balanced"))
    model.fit([shown(questions, i) for i in training], [*map(skipped, training)])
    return ranked(model.predict_proba([shown(questions, i) for i in items])[:, 1].tolist(), [*map(skipped, items)])


def shown(questions: Questions, item: Item) -> dict[str, float]:
    """The features of a prompt: the parts of its digest, its tags, whether it fits."""
    person, video = questions.people(item.task)[item.user_id], questions.ifvr.videos[item.video_id]
    facts = script.facts(person, video, digest=True)
    parts = [f"{n} {part}" for n, part in enumerate(facts.digest.rstrip(".").split(", "))]
    return dict.fromkeys([*parts, f"fits {facts.fits}", f"topic {facts.topic}", *(f"tag {t}" for t in video.tags)], 1.0)


if __name__ == "__main__":
    main()
