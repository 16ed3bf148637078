"""A small simulated run that was judged, made without Ray or an engine: a stand-in policy answers by what its prompt
shows.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from artifact_helpers import put
from PIL import Image
from small_world import WORLD

from gubs import stages
from gubs.artifacts import Run
from gubs.config import Settings, load_settings
from gubs.evaluate import answers, judge, sensitivity
from gubs.evaluate.bars import STORED
from gubs.evaluate.held_out import held_out_items
from gubs.prompts.answers import as_answer
from gubs.records import SCHEMAS, TASK_OPTIONS, Option, Task
from gubs.ufm.held_out import HeldOut
from gubs.ufm.labels import Labels, OptionProbabilities
from gubs.ufm.predict import Prediction, Query
from gubs.ufm.questions import Questions
from gubs.video.decoded import Decoded, DecodeOptions, Verdict
from gubs.video.frame_store import FrameStore

SETTINGS = load_settings(
    "tiny",
    [
        *WORLD,
        *("teachers.profiles=false", "teachers.author=script", "teachers.train_labels=truth"),
        *("teachers.test_labels=truth", "ufm.held_out=0.3"),
        *("evaluate.bootstrap=40", "evaluate.sensitivity.items=40", "evaluate.least_slice=20"),
        "evaluate.decision.thoughts=1",
    ],
)
POLICY = "grpo"


class Reader:
    """The stand-in policy. It skips long videos, and all whose title it is not told; its letter says little more."""

    asked: ClassVar[list[Query]] = []
    left: ClassVar[int] = 10**9
    """Answers until it dies."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, queries: Iterable[Query]) -> Iterator[Prediction]:
        for query in queries:
            if not Reader.left:
                raise KeyboardInterrupt
            Reader.left -= 1
            Reader.asked.append(query)
            yield answer(query)


def answer(query: Query) -> Prediction:
    """By the words of the prompt alone."""
    text = query.prompt.text
    task = Task.CLICK if text.startswith(("Offered", "A page offers")) else Task.SEQUENTIAL
    about = next(line for line in text.splitlines() if line.startswith(("Video: ", "Offered: ", "Now playing: ")))
    fields = json.loads(about.partition(": ")[2])
    seconds = int(re.match(r"\d+", fields.get("length", "0 s"))[0])
    skip = 0.9 if "title" not in fields else min(0.95, seconds / 14)
    letters = TASK_OPTIONS[task]
    said = letters[1] if skip >= 0.5 else letters[0]
    shares = {o: (skip / (len(letters) - 1) if o != Option.A else 1 - skip) for o in letters}
    return Prediction(
        query.key, as_answer(f"It takes {seconds} s.", said), True, None, OptionProbabilities(shares, 1.0)
    )


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the stand-in answer in the place of engines."""
    monkeypatch.setattr(answers, "Predictor", Reader)
    monkeypatch.setattr(answers, "use_gpu", lambda _: False)
    for module in (judge, sensitivity):
        monkeypatch.setattr(module, "Inputs", lambda *_: None)
        monkeypatch.setattr(module, "policy_or_base", lambda *_: Path())
    monkeypatch.setattr(Labels, "of", lambda *_: None)
    Reader.asked.clear()
    Reader.left = 10**9


def make_run(folder: Path, settings: Settings = SETTINGS) -> Run:
    """Data, labels, frames, groups and a trained policy; nothing judged yet."""
    run = Run(folder / "run")
    stages.make(["raw", "truth", "ifvr"], run, settings)
    stages.make_stage("labels", run, settings)
    put_frames(run, folder / "store", settings)
    put_groups(run)
    put(run, POLICY, {"steps": pa.table({"step": [0]})}, settings=settings)
    return run


def put_frames(run: Run, store: Path, settings: Settings) -> None:
    """Two frames of one colour for each video."""
    videos = run.artifact("ifvr").table("videos")["video_id"].to_pylist()
    decoded = []
    for n, video in enumerate(videos):
        buffer = io.BytesIO()
        Image.new("RGB", (56, 56), (n * 5 % 256, 90, 160)).save(buffer, "JPEG")
        jpeg = buffer.getvalue()
        decoded.append((f"hash-{video}", Decoded(Verdict.OK, frames=[jpeg] * 2, cover=jpeg, duration_s=4.0)))
    FrameStore(str(store), DecodeOptions.of(settings.frames)).write_part("0", decoded)
    table = pa.table({"video_id": videos, "content_hash": [h for h, _ in decoded], "frames": [2] * len(videos)})
    put(run, "frames", {"frames": table}, settings=settings, info={"store_uri": str(store)})


def put_groups(run: Run) -> None:
    """Two groups by hand: every other user is in the first or the second, every fifth in none."""
    users = sorted(run.artifact("ifvr").table("users")["user_id"].to_pylist())
    rows = [
        {
            "group_id": f"g{g}",
            "name": f"Viewers <b>{g}</b>",
            "features": "likes pets",
            "typical_user": users[g],
            "threshold": 0.1,
            "initial_profile": f"Group {g} likes pets.",
            "members": [],
            "version": "1",
        }
        for g in range(2)
    ]
    places = [{"user_id": u, "group_id": f"g{n % 2}", "similarity": 0.5, "how": "matched"} for n, u in enumerate(users)]
    tables = {
        "groups": pa.Table.from_pylist(rows, schema=SCHEMAS["groups"]),
        "memberships": pa.Table.from_pylist([p for n, p in enumerate(places) if n % 5]),
    }
    put(run, "ugm", tables, inputs=["ifvr"])


def put_judged(run: Run, settings: Settings = SETTINGS, policy: str = POLICY) -> None:
    """The artifact `eval-<policy>`, from the stand-in's answers about all test targets."""
    questions = Questions(run, settings.ufm.inputs)
    items = judge.test_items(questions, 0, settings.seed)
    held_out = held_out_items(
        questions, tuple(Task), HeldOut(settings.ufm.held_out, 0), settings.evaluate.decision, settings.seed
    )
    found = {
        (way, n): answer(Query((way, n), questions.about_user(i.task, i.user_id, i.video_id)))
        for ways, asked in (((judge.GREEDY, judge.SAMPLED), [i for i, _ in items]), (("held out",), held_out))
        for n, i in enumerate(asked)
        for way in ways
    }
    options = judge.held_out_options(held_out, found, settings.evaluate.decision.thoughts)
    rules = judge.decision_rules(held_out, options, settings.evaluate.decision)
    rows = judge.predictions(items, found, rules)
    tables = {
        "predictions": pa.Table.from_pylist(rows, schema=judge.PREDICTIONS),
        "held_out": judge.held_out_table(held_out, options),
        "metrics": pa.Table.from_pylist(judge.measure(rows, settings.evaluate.bootstrap, settings.seed)),
    }
    info = {"decisions": {str(t): json.loads(json.dumps(judge.asdict(r))) for t, r in rules.items()}}
    put(run, f"eval-{policy}", tables, settings=settings, inputs=[policy], info=info)


def put_bars(
    run: Run, methods: Sequence[str] = ("popularity", "logistic regression"), by_reward: Sequence[str] = ()
) -> None:
    """The artifact `bars`: the first guesses, the others know half of what happened; some choose options by reward."""
    rng, rows = np.random.default_rng(0), []
    judged = run.artifact(f"eval-{POLICY}").table("predictions").to_pylist()
    for known, method in enumerate(methods):
        for r in (r for r in judged if r["mode"] == judge.GREEDY and r["natural"]):
            bad = not r["clicked"] if r["task"] == Task.CLICK else r["play_rate"] < 0.3
            score = 0.5 * known * bad + 0.6 * rng.random()
            row = {"method": method, "score": score, "predicted": "B" if score > 0.5 else "A"}
            rows.append(row | {n: r[n] for n in ("task", "user_id", "interaction_id", "play_rate", "clicked")})
    info = {str(t): {"videos_trained_on": 1.0, "by_reward": list(by_reward)} for t in Task}
    put(run, "bars", {"predictions": pa.Table.from_pylist(rows, schema=STORED)}, info=info)
