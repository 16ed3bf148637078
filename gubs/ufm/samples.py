"""The samples of a GA-GRPO step: which prompts are asked about each record, and how the answers are rewarded.

Each training record has six samples, a *group*: four from the training user's own prompt (T), one from a similar
user's (S), one from a group profile's (G), all judged against the record's gold option. `group` and `role` are data of
the sample; nothing is ever grouped by position.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gubs.artifacts import JsonObject
from gubs.prompts.answers import ANSWER_END, Failure, Reading
from gubs.records import TASK_OPTIONS, Option, Split, Task
from gubs.ufm.advantage import Advantages, SampleRole, advantages, contradicted
from gubs.ufm.held_out import HeldOut
from gubs.ufm.inputs import Encoded, Inputs, Prompt
from gubs.ufm.questions import SKIP, Item, Questions
from gubs.ufm.rewards import RewardParts, is_right, outcome_only, reward_answer, skip_right
from gubs.ufm.rollout import Request, Response
from gubs.ufm.sampling import BalancedSampler, Sampled, profile_sampling, sample_seed, shuffled
from gubs.ufm.settings import GRPOSettings

_BY_ROLE = ("reward_raw", "reward_weighted", "advantage")
_SUMS = (
    *(f"{name}/{role}" for role in SampleRole for name in ("count", *_BY_ROLE)),
    *(f"unparsed/{failure}" for failure in Failure),
    *("format", "skip", "choice", "right", "right_down", "wrong_up", "truncated", "response_tokens"),
)
"""Names of sums over samples: every worker has all of them, whatever its samples."""


@dataclass
class Sample:
    """One answer of a step, from the prompt to the advantage."""

    group: int
    """Slot in the step, over all workers; a record may be in two slots."""
    role: SampleRole
    k: int
    """Number among the samples of its role."""
    item: Item
    encoded: Encoded
    seed: int
    prompt: str = ""
    response: Response | None = None
    text: str = ""
    finished: bool = True
    """It ended by itself; false: the token limit cut it off."""
    reading: Reading | None = None
    parts: RewardParts | None = None
    advantage: float = 0.0
    doubted: bool = False
    """The record's label is taken for wrong (`ufm.grpo.doubt`)."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens of the response."""
        return self.response.ids if self.response else ()

    @property
    def right(self) -> bool:
        """Whether the answer is the gold option, or a skip where no more is known."""
        return self.reading is not None and is_right(self.reading.option, self.item.gold)

    @property
    def judged_right(self) -> bool:
        """Whether the answer is right about skip or not."""
        return self.reading is not None and skip_right(self.reading.option, self.item.gold)

    def to_json(self) -> JsonObject:
        """What a person may want to read."""
        read, parts = self.reading, self.parts
        return {
            "task": str(self.item.task),
            "group": self.group,
            "role": str(self.role),
            "user": self.item.user_id,
            "video": self.item.video_id,
            "gold": self.item.outcome,
            "prompt": self.prompt,
            "answer": self.text,
            "option": str(read.option) if read and read.option else None,
            "failure": str(read.failure) if read and read.failure else None,
            "reward": parts.total if parts else None,
            "advantage": round(self.advantage, 4),
        }


@dataclass
class StepPlan:
    """The samples of one worker for one step, before they are answered."""

    task: Task
    turn: int
    """How many earlier steps had this task."""
    slots: int
    """Records of the step, over all workers."""
    samples: list[Sample]
    dropped: int = 0
    """Samples of this worker whose prompt is too long."""
    without_peer: int = 0
    """How many similar users and groups this worker's records lack; the user's own prompt replaces them."""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Peers:
    """Who and what may be asked about beside the training user, in one task."""

    memberships: Mapping[str, Sequence[str]]
    members: Mapping[str, Sequence[str]]
    anybody: Sequence[str]
    """All training users of the task, where similar users are drawn at random; else empty."""
    shown: Mapping[str, str]
    """Group -> the group whose profile is shown for it."""
    records: Mapping[tuple[str, str], Item]
    """(user, video) -> that user's own record of the video, where it judges the user's answers; else empty."""
    viewers: Mapping[str, frozenset[str]]
    """Video -> the users with such a record."""

    @classmethod
    def of(cls, questions: Questions, task: Task, items: Sequence[Item], settings: GRPOSettings, seed: int) -> "Peers":
        """Those that the settings want; `items` are the records that may be trained on."""
        groups = list(questions.groups)
        own = settings.similar_gold == "own"
        records = {(i.user_id, i.video_id): i for i in items} if own else {}
        viewers: dict[str, set[str]] = {}
        for user, video in records:
            viewers.setdefault(video, set()).add(user)
        return cls(
            memberships=questions.memberships,
            members=questions.members(task),
            anybody=questions.ifvr.split_users(task, Split.TRAIN) if settings.similar == "random" else (),
            shown=shuffled(groups, seed) if settings.profiles == "shuffled" else {g: g for g in groups},
            records=records,
            viewers={video: frozenset(users) for video, users in viewers.items()},
        )

    def draw(self, item: Item, seed: int) -> Sampled:
        """The similar user and the group for a record."""
        rather = self.viewers.get(item.video_id, frozenset())
        return profile_sampling(item.user_id, seed, self.memberships, self.members, anybody=self.anybody, rather=rather)


class Planner:
    """Decides what each step asks. It depends on the step's number alone, so a resumed run asks the same."""

    def __init__(
        self,
        questions: Questions,
        inputs: Inputs,
        tasks: Sequence[Task],
        settings: GRPOSettings,
        held_out: HeldOut,
        seed: int,
    ):
        """Reads the training records of the tasks, but those of users that are held out.

        Raises:
            GubsError: an option has no record at all (see `BalancedSampler`).
        """
        self._questions, self._inputs, self._settings, self._seed = questions, inputs, settings, seed
        self.tasks = tuple(tasks)
        self._items = {t: questions.training_outcomes(t, held_out) for t in self.tasks}
        self._samplers = {t: self._sampler(t) for t in self.tasks}
        self._peers = {t: Peers.of(questions, t, self._items[t], settings, seed) for t in self.tasks}

    def plan(self, step: int, rank: int = 0, world_size: int = 1) -> StepPlan:
        """One worker's samples of a step; steps take the tasks in turn, each as often as it is named."""
        task, turn = self._turn(step)
        sampler = self._samplers[task]
        picked = sampler.batch(turn)
        figures = {**sampler.figures(turn), "resampled": float(sum(sampler.resampled(turn).values()))}
        plan = StepPlan(task, turn, len(picked), [], figures=figures)
        for slot in range(rank, len(picked), world_size):
            item = self._items[task][picked[slot]]
            prompts, sampled = self._prompts(item, step, slot)
            plan.without_peer += (sampled.similar is None) + (sampled.group is None)
            encoded = {role: self._inputs.encode(prompt) for role, prompt, _ in prompts}
            for role, prompt, count in prompts:
                if not self._inputs.fits(encoded[role]):
                    plan.dropped += count
                    continue
                judged = self._judged_by(item, sampled) if role == SampleRole.S else item
                for k in range(count):
                    seed = sample_seed(self._seed, step, slot, role, k)
                    plan.samples.append(Sample(slot, role, k, judged, encoded[role], seed, prompt.text))
        self._inputs.compute_pixels(s.encoded for s in plan.samples)
        return plan

    def _turn(self, step: int) -> tuple[Task, int]:
        """Task of a step, and how many earlier steps had that task."""
        rounds, place = divmod(step, len(self.tasks))
        task = self.tasks[place]
        return task, rounds * self.tasks.count(task) + self.tasks[:place].count(task)

    def _prompts(self, item: Item, step: int, slot: int) -> tuple[list[tuple[SampleRole, Prompt, int]], Sampled]:
        """Role, prompt and number of samples; the user's own prompt replaces a missing similar user or group."""
        ask, s = self._questions, self._settings
        own = ask.about_user(item.task, item.user_id, item.video_id)
        if not s.groups:
            return [(SampleRole.T, own, s.user_samples + 2)], Sampled("", "")
        seed, peers = sample_seed(self._seed, step, slot, "profiles", 0), self._peers[item.task]
        sampled = peers.draw(item, seed)
        similar = own
        if sampled.similar:
            own_record = self._judged_by(item, sampled) is not item  # whose history ends before that record
            before = None if own_record else item.timestamp
            similar = ask.about_user(item.task, sampled.similar, item.video_id, before=before)
        group = ask.about_group(item.task, peers.shown[sampled.group], item.video_id) if sampled.group else own
        return [(SampleRole.T, own, s.user_samples), (SampleRole.S, similar, 1), (SampleRole.G, group, 1)], sampled

    def _judged_by(self, item: Item, sampled: Sampled) -> Item:
        """The record that the similar user's answer is judged by."""
        return self._peers[item.task].records.get((sampled.similar or "", item.video_id), item)

    def _sampler(self, task: Task) -> BalancedSampler:
        items = self._items[task]
        golds = [i.outcome for i in items]
        options = [str(o) for o in TASK_OPTIONS[task]] if all(i.reasons_known for i in items) else [Option.A, SKIP]
        return BalancedSampler(golds, options, self._settings.prompts, self._seed, allow_missing=True)


def requests(inputs: Inputs, samples: Iterable[Sample]) -> list[Request]:
    """The engine's requests. Samples with the same prompt share one object, which is then sent once."""
    prompts: dict[int, JsonObject] = {}
    return [Request(prompts.setdefault(id(s.encoded), inputs.for_engine(s.encoded)), s.seed) for s in samples]


def assign_rewards(
    samples: Sequence[Sample], responses: Sequence[Response], text_of: Callable[..., tuple[str, bool]], s: GRPOSettings
) -> Advantages:
    """Puts responses, rewards and advantages into the samples."""
    for sample, response in zip(samples, responses, strict=True):
        sample.response = response
        item = sample.item
        sample.text, sample.finished = text_of(response.ids)
        rewards = s.rewards if item.reasons_known else outcome_only(s.rewards)
        sample.parts, sample.reading = reward_answer(sample.text, item.gold, item.task, rewards, sample.finished)
    result = advantages(
        [x.parts.total if x.parts else 0.0 for x in samples],
        [x.role for x in samples],
        [x.group for x in samples],
        s.advantage,
        right=[x.right for x in samples],
    )
    opposite = [x.reading is not None and x.reading.option is not None and not x.judged_right for x in samples]
    doubtful = contradicted(opposite, [x.group for x in samples], s.doubt)
    for sample, value, doubted in zip(samples, result.values.tolist(), doubtful.tolist(), strict=True):
        sample.advantage, sample.doubted = 0.0 if doubted else value, doubted
    return result


def excerpt(plan: StepPlan, every: int) -> list[Sample]:
    """Samples for people to read, one per role, from every n-th step of a task. Each time it is another record of the
    step; workers that do not have that record return none.
    """
    if not every or plan.turn % every:
        return []
    group = plan.turn // every % plan.slots
    first: dict[SampleRole, Sample] = {}
    for sample in plan.samples:
        if sample.group == group:
            first.setdefault(sample.role, sample)
    return list(first.values())


def answer_sums(plan: StepPlan, result: Advantages) -> dict[str, float]:
    """Counts and sums over this worker's samples, to be added over all workers; `answer_figures` divides."""
    groups = len({s.group for s in plan.samples})
    sums = dict.fromkeys(_SUMS, 0.0) | {
        "answers": float(len(plan.samples)),
        "groups": float(groups),
        "zero_variance": result.frac_zero_variance * groups,
        "doubted": float(len({s.group for s in plan.samples if s.doubted})),
        "dropped_too_long": float(plan.dropped),
        "without_peer": float(plan.without_peer),
    }
    for s in plan.samples:
        assert s.parts
        assert s.reading
        right = s.right
        sums[f"count/{s.role}"] += 1
        sums[f"reward_raw/{s.role}"] += s.parts.total
        sums[f"advantage/{s.role}"] += s.advantage
        sums["format"] += s.parts.format
        sums["skip"] += s.parts.skip
        sums["choice"] += s.parts.choice
        sums["right"] += right
        sums["right_down"] += right and s.advantage < 0
        sums["wrong_up"] += not right and s.advantage > 0
        sums["truncated"] += not s.finished and ANSWER_END not in s.text
        sums["response_tokens"] += len(s.ids)
        if s.reading.failure:
            sums[f"unparsed/{s.reading.failure}"] += 1
    for role, value in result.reward_weighted.items():
        sums[f"reward_weighted/{role}"] += value * sums[f"count/{role}"]
    return sums


def answer_figures(sums: dict[str, float]) -> dict[str, float]:
    """The figures of all workers that GA-GRPO always logs."""
    n = max(1.0, sums["answers"])
    figures = {
        f"{name}/{role}": sums[f"{name}/{role}"] / sums[f"count/{role}"]
        for role in SampleRole
        for name in _BY_ROLE
        if sums[f"count/{role}"]
    }
    total = sum(sums[f"reward_raw/{r}"] for r in SampleRole)
    figures |= {f"reward/{name}": sums[name] / n for name in ("format", "skip", "choice")}
    figures |= {f"unparsed/{f}": sums[f"unparsed/{f}"] / n for f in Failure}
    return figures | {
        "reward": total / n,
        "frac_zero_variance": sums["zero_variance"] / max(1.0, sums["groups"]),
        "frac_doubted": sums["doubted"] / max(1.0, sums["groups"]),
        "frac_right_pushed_down": sums["right_down"] / max(1.0, sums["right"]),
        "frac_wrong_pushed_up": sums["wrong_up"] / max(1.0, n - sums["right"]),
        "frac_truncated": sums["truncated"] / n,
        "response_tokens": sums["response_tokens"] / n,
        "tokens/rollout": sums["response_tokens"],
        "dropped_too_long": sums["dropped_too_long"],
        "without_peer": sums["without_peer"],
    }
