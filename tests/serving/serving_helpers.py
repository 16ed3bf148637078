"""A filter without a model, and an engine that answers by a rule: what the service does around them is the same."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from gubs.artifacts import Recipe, Run, writing
from gubs.evaluate.calibration import Calibration, Curve
from gubs.evaluate.held_out import DecisionRule
from gubs.evaluate.thresholds import Threshold
from gubs.records import SCHEMAS, GroupMember, GroupProfile, Option, Task, User, Video
from gubs.serving.bundle import CONFIG, FilterConfig, write_config
from gubs.serving.engine import Answer, EngineDiedError
from gubs.serving.filter import Mode
from gubs.serving.stage import HELD_OUT
from gubs.ufm.inputs import Prompt
from gubs.ufm.labels import OptionProbabilities
from gubs.ufm.settings import InputSettings, ModelSettings, RolloutSettings
from gubs.ugm.cluster import TfidfEncoder
from gubs.ugm.placement import Placement
from gubs.ugm.stage import MEMBERSHIPS
from gubs.video.frame_store import FrameStore

DEADLY = "This title ends the engine"
BUG = "This title meets a bug"
_LINE = Curve((-9.0, 9.0), (-9.0, 9.0))
RULE = DecisionRule(Calibration("none", _LINE, {}, 0.2, 0.2, 0.25, (), 100), Threshold(0.5, 0.7, 0.6, 0.2, 100), 0.8)
"""Decides by the engine's own probabilities."""
_GROUPED = [User("u0", 30, "female", tags=["pets"]), User("u1", 31, "female", tags=["pets", "cooking"])]
_USERS = [*_GROUPED, User("u2", 50, "male", tags=["cars"]), User("ü 3/4", None, None, other={"city": "Köln"})]
_SIMILARITY = {"u0": 1.0, "u1": 0.7}
_VIDEOS = [Video(f"v{i}", f"Title {i}", 10.0 + i, tags=["pets" if i % 2 else "cars"]) for i in range(200)]


def make_filter(
    folder: Path,
    *,
    name: str = "filter",
    refused: str = "",
    skip_prompt: str = "cars",
    frames: Mapping[str, str] | None = None,
    store: FrameStore | None = None,
) -> str:
    """Writes a filter without a policy; returns its path. With a store, `frames` has content hashes of videos."""
    run = Run(folder)
    config = _config(skip_prompt, refused, store)
    views = [
        {
            "interaction_id": f"i{k}",
            "user_id": u,
            "video_id": f"v{k}",
            "task": "sequential",
            "play_rate": 0.9,
            "timestamp": k,
        }
        for k, u in enumerate(["u0", "u0", "u1", "u2"])
    ]
    members = [GroupMember("u0", 1.0, True), GroupMember("u1", 0.7, True)]
    group = GroupProfile("g00", "Pet lovers", "They like pets.", "u0", 0.5, None, "Loves pets.", members, "1")
    tables = {
        "users": _with_tastes(pa.Table.from_pylist([u.to_row() for u in _USERS], schema=SCHEMAS["users"])),
        "videos": pa.Table.from_pylist([v.to_row() for v in _VIDEOS], schema=SCHEMAS["videos"]),
        "views": pa.Table.from_pylist(views, schema=_view_schema()),
        "groups": pa.Table.from_pylist([group.to_row()], schema=SCHEMAS["groups"]),
        "memberships": pa.Table.from_pylist(
            [
                {"user_id": u, "group_id": "g00", "similarity": s, "how": "matched"}
                for u, s in (("u0", 1.0), ("u1", 0.7))
            ],
            schema=MEMBERSHIPS,
        ),
        **_placement().tables(),
        "frames": pa.Table.from_pylist(
            [{"video_id": v, "content_hash": h} for v, h in (frames or {}).items()],
            schema=pa.schema([("video_id", pa.string()), ("content_hash", pa.string())]),
        ),
        "held_out": HELD_OUT.empty_table(),
    }
    with writing(run, name, recipe=Recipe(settings={"skip": skip_prompt}), settings={}, kind="filter") as out:
        for table, rows in tables.items():
            out.write_table(table, rows)
        write_config(out.path(CONFIG), config, run.fs)
        out.content = f"version-{name}"
    return run.path(name)


def _config(skip_prompt: str, refused: str, store: FrameStore | None) -> FilterConfig:
    return FilterConfig(
        name=f"run-{skip_prompt}",
        policy="grpo",
        tasks=(Task.SEQUENTIAL, Task.CLICK),
        model=ModelSettings(),
        inputs=InputSettings(style="brief"),
        rollout=RolloutSettings(),
        pictures=store is not None,
        decisions={t: dict.fromkeys(Mode, RULE) for t in Task},
        modes=(Mode.REASON,) if refused else tuple(Mode),
        refused=refused,
        prompts={},
        frame_store=store.uri if store else "",
        frames=store.options if store else None,
    )


def _placement() -> Placement:
    encoder = TfidfEncoder("interest")
    encoder.fit(_GROUPED)
    return Placement(encoder, ["g00"], encoder.encode(_GROUPED[:1]), [0.5])


def _with_tastes(users: pa.Table) -> pa.Table:
    n = users.num_rows
    users = users.append_column("taste", pa.nulls(n, pa.string()))
    users = users.append_column("taste_tags", pa.nulls(n, pa.list_(pa.string())))
    return users.append_column("taste_until", pa.nulls(n, pa.int64()))


def _view_schema() -> pa.Schema:
    names = ("interaction_id", "user_id", "video_id", "timestamp", "play_rate", "clicked", "rating", "liked", "task")
    return pa.schema([SCHEMAS["interactions"].field(n) for n in names])


class RuleEngine:
    """Skips videos about cars, with a thought; each question takes a while, some at a time."""

    def __init__(self, seconds: float = 0.0, at_once: int = 8, word: str = "cars"):
        self.seconds, self.word = seconds, word
        self._slots = asyncio.Semaphore(at_once)
        self.asked: list[Prompt] = []
        self.salts: set[str] = set()
        self.running = self.peak = 0
        self.finished = 0
        self.quiet_s = 0.0

    async def ask(self, task: Task, mode: Mode, prompts: Sequence[Prompt], salt: str = "") -> list[Answer]:
        self.salts.add(salt)
        return list(await asyncio.gather(*(self._ask(task, mode, p) for p in prompts)))

    async def _ask(self, task: Task, mode: Mode, prompt: Prompt) -> Answer:
        if DEADLY in prompt.text:
            raise EngineDiedError("as if its process had ended")
        if BUG in prompt.text:
            raise KeyError(prompt.text)
        self.asked.append(prompt)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            async with self._slots:
                await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        self.finished += 1
        skip = 0.9 if self.word in prompt.text.rsplit("Video", 1)[-1] else 0.2
        rest = [Option.B] if task == Task.CLICK else [Option.B, Option.C, Option.D]
        shares = {Option.A: 1 - skip, **{o: skip / len(rest) for o in rest}}
        text = (
            f"<think>about {self.word}</think><answer>{'B' if skip > 0.5 else 'A'}</answer>"
            if mode is Mode.REASON
            else ""
        )
        texts = ((text, True),) if text else ()
        return Answer(OptionProbabilities(shares, 0.99), texts, prompt_tokens=10, cached_tokens=4, answer_tokens=5)

    async def check(self) -> None:
        """Healthy."""

    def close(self) -> None:
        """Nothing to end."""
