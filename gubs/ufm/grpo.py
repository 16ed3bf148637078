"""GA-GRPO on one train worker: the loop, a step of it, and the engine beside it.

Order of a step: generate -> rewards, advantages -> the reference's log-probabilities -> micro-batches, optimiser step
-> weights to the engine -> figures -> now and then a checkpoint. The engine sleeps while the trainer works (GPUs).
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from gubs.errors import PlatformError
from gubs.ufm import model as models
from gubs.ufm.inputs import Batch, Encoded, rows_of
from gubs.ufm.loss import Denominators, policy_loss
from gubs.ufm.rollout import Request, Response, Shape, start_rollout
from gubs.ufm.samples import Plan, Planner, Sample, answer_figures, answer_sums, evaluate, requests
from gubs.ufm.sync import WeightSync
from gubs.ufm.trainer import Trainer, Update, logprobs, micro_batches, most, reduce_sums
from gubs.ufm.worker import Job, Worker

_ENGINE_TRIES = 3
"""Times an engine is started anew within a step before the step gives up."""


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    return GRPOWorker(config["job"]).run()


class GRPOWorker(Worker):
    """One rank: a trainer, the frozen reference, and a rollout engine of its own."""

    def __init__(self, job: Job):
        super().__init__(job, job.settings.ufm.grpo.steps)
        self.grpo = job.settings.ufm.grpo
        self.planner = Planner(self.questions, self.inputs, job.tasks, self.grpo, job.settings.seed)
        model = models.load(job.start, self.ufm.model, train=True)
        self.trainer = Trainer(model, self.ufm.model, self.grpo.optimizer, self.steps, self.device, self.sees)
        self.reference = models.load(job.start, self.ufm.model) if self.grpo.beta else None
        self._share = models.attention(self.ufm.model) != "flash_attention_2"  # whose kernels take no mask
        self.engine = RolloutEngine(self, job.start)
        self._ahead = ThreadPoolExecutor(1, "plan")
        self._next: Future[Plan] | None = None

    def begin(self, step: int) -> None:
        """The engine gets the weights of the checkpoint that the run goes on from."""
        if step:
            self.engine.push(self.trainer.model)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its figures."""
        with self.phases("waiting for data"):
            plan = self._take_plan(step)
        figures = self._answer(plan, step)
        updates = []
        with self.phases("reference"):
            batches, references = self._references(plan.samples)
        with self.phases("train"):
            old: list[Any] = []
            for number in range(self.grpo.updates):
                updates.append(self._update(batches, references, old, step, first=number == 0))
        with self.phases("sync"):
            self.engine.push(self.trainer.model)
        self.skipped(step, updates[-1].skipped, [s.to_json() | {"ids": list(_ids(s))} for s in plan.samples])
        return plan.figures | figures | _update_figures(updates)

    def end(self) -> None:
        """Stops the thread that plans ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def _take_plan(self, step: int) -> Plan:
        """The plan of a step, made while the step before was computed; starts on the one after."""
        plan = self._next.result() if self._next else self.planner.plan(step, self.rank, self.world)
        following = step + 1
        self._next = self._ahead.submit(self.planner.plan, following, self.rank, self.world)
        return plan

    def _answer(self, plan: Plan, step: int) -> dict[str, float]:
        """Rollout, rewards and advantages; figures over all workers."""
        with self.phases("rollout"):
            responses = self.engine.generate(requests(self.inputs, plan.samples), self.trainer.model)
            reuse = self.engine.reuse()
        with self.phases("reward"):
            found = evaluate(plan.samples, responses, self.inputs.text, self.grpo)
            figures = answer_figures(reduce_sums(answer_sums(plan.samples, found), self.device))
        if self.grpo.samples_every and step % self.grpo.samples_every == 0:
            self.monitor.samples(step, [s.to_json() for s in _one_a_role(plan.samples)])
        return figures | reuse

    def _references(self, samples: Sequence[Sample]) -> tuple[list[tuple[Batch, list[Sample]]], list[Any]]:
        """Micro-batches, as many on every rank, and the reference's log-probabilities for each."""
        import torch

        rows = rows_of([s.encoded for s in samples], self._share)
        lengths = [len(samples[r[0]].encoded.ids) + sum(len(_ids(samples[i])) for i in r) for r in rows]
        dealt = micro_batches(lengths, self.grpo.micro_tokens)
        parts = [[samples[i] for row in part for i in rows[row]] for part in dealt]
        batches = [
            (self.inputs.collate([(s.encoded, _ids(s)) for s in part], share=self._share), part) for part in parts
        ]
        batches += [(self._empty(samples), [])] * (max(1, most(len(dealt), self.device)) - len(batches))
        if self.reference is None:
            return batches, [None] * len(batches)
        self.reference.to(self.device)
        with torch.no_grad():
            found = [logprobs(self.reference, b.to(self.device), sees=self.sees) for b, _ in batches]
        if self.device.type == "cuda":
            self.reference.to("cpu")  # the trainer needs the room more
        return batches, found

    def _empty(self, samples: Sequence[Sample]) -> Batch:
        """A micro-batch without response tokens: the same graph, no gradient."""
        encoded = samples[0].encoded if samples else Encoded([self.inputs.end] * 2, [self.inputs.end] * 2, None, None)
        return self.inputs.collate([(encoded, ())])

    def _update(
        self,
        batches: list[tuple[Batch, list[Sample]]],
        references: list[Any],
        old: list[Any],
        step: int,
        *,
        first: bool,
    ) -> Update:
        """One optimiser step on the batch; the first one notes the log-probabilities that later ones compare with."""
        import torch

        grpo = self.grpo
        masks = [b.response for b, _ in batches]
        mine = [Denominators.of(m) for m in masks]
        counts = {"samples": float(sum(d.samples for d in mine)), "tokens": float(sum(d.tokens for d in mine))}
        total = reduce_sums(counts, self.device)
        denominators = Denominators(max(1, int(total["samples"])), max(1, int(total["tokens"])))

        def loss_of(logp: Any, number: int) -> tuple[Any, dict[str, Any]]:
            batch, samples = batches[number]
            mask = batch.response.to(logp.device)
            if first:
                old.append(logp.detach())
            advantage = torch.tensor([s.advantage for s in samples] or [0.0], device=logp.device)
            said = [p for s in samples for p in (s.response.logprobs if s.response else ())]
            rollout = torch.tensor(said, device=logp.device) if grpo.tis_cap else None
            return policy_loss(
                _dense(logp, mask),
                None if first else _dense(old[number], mask),
                None if references[number] is None else _dense(references[number], mask),
                advantage,
                mask,
                denominators=denominators,
                beta=grpo.beta,
                clip=grpo.clip,
                rollout_logp=None if rollout is None else _dense(rollout, mask),
                tis_cap=grpo.tis_cap or 1.0,
                level=grpo.level,
            )

        return self.trainer.update([b for b, _ in batches], loss_of, step)


class RolloutEngine:
    """The engine beside a worker, started again where it died; what takes too long is named and ends the worker."""

    def __init__(self, worker: Worker, start: str):
        threads = 0 if worker.device.type == "cuda" else worker.threads
        ufm = worker.ufm
        self._shape = Shape(start, ufm.model, ufm.inputs, ufm.rollout, threads, worker.sees)
        self._place = worker.place()
        self._limit = ufm.workers.stuck_after_s
        self.sync: WeightSync | None = None
        self._counted: dict[str, float] = {}
        self._start(worker.trainer.model)

    def generate(self, asked: Sequence[Request], model: Any) -> list[Response]:
        """The answers to the requests; an engine that died is started again with the model's weights.

        Raises:
            PlatformError: it does not answer in time, or keeps dying.
        """
        from ray.exceptions import RayActorError

        for _ in range(_ENGINE_TRIES):
            try:
                answers: list[Response] = self._get(self.handle.generate.remote(list(asked)), "generate")
            except RayActorError:
                self._start(model)
                self.push(model)
            else:
                self.handle.sleep.remote()
                return answers
        raise PlatformError(f"the rollout engine died {_ENGINE_TRIES} times in one step; Ray's dashboard has its log")

    def push(self, model: Any) -> None:
        """New weights for the engine; one that died is started again.

        Raises:
            PlatformError: it does not take them in time.
        """
        from ray.exceptions import GetTimeoutError, RayActorError

        assert self.sync
        try:
            try:
                self.sync.push(model)
            except RayActorError:
                self._start(model)
                self.sync.push(model)
        except GetTimeoutError:
            raise self._end("take the weights") from None

    def reuse(self) -> dict[str, float]:
        """Since the last call: shares of the prompts' tokens and of the clips that the engine had in its caches."""
        totals: dict[str, float] = self._get(self.handle.figures.remote(), "count")
        before, self._counted = self._counted, totals
        found = {}
        for kind in ("prefix", "picture"):
            asked, hits = (totals[f"{kind}_{n}"] - before.get(f"{kind}_{n}", 0.0) for n in ("queries", "hits"))
            found[f"engine/{kind}_reuse"] = hits / asked if asked > 0 else 0.0
        return found

    def _start(self, model: Any) -> None:
        self.handle = start_rollout(self._shape, gpu_ids=self._place[1], node_id=self._place[0])
        self._get(self.handle.ready.remote(), "start")
        self._counted = {}
        version = self.sync.version if self.sync else 0
        self.sync = WeightSync(model, self.handle, self._limit, version)

    def _get(self, ref: Any, what: str) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError

        try:
            return ray.get(ref, timeout=self._limit)
        except GetTimeoutError:
            raise self._end(what) from None

    def _end(self, what: str) -> PlatformError:
        """Ends the engine that did not do something in time; returns the error that says so."""
        import ray

        ray.kill(self.handle)
        return PlatformError(
            f"the rollout engine did not {what} within {self._limit:g} s (ufm.workers.stuck_after_s) and was ended"
        )


def _dense(flat: Any, mask: Any) -> Any:
    """Values of response tokens, sequence by sequence, at their places in (s, r); zeros elsewhere."""
    import torch

    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def _ids(sample: Sample) -> tuple[int, ...]:
    return sample.response.ids if sample.response else ()


def _one_a_role(samples: Sequence[Sample]) -> list[Sample]:
    return list({s.role: s for s in reversed(samples)}.values())


def _update_figures(updates: Sequence[Update]) -> dict[str, float]:
    last = updates[-1]
    tokens = max(1.0, last.sums.get("tokens", 0.0))
    means = {k: v / tokens for k, v in last.sums.items() if k not in ("tokens", "samples", "loss")}
    return {
        **{f"health/{k}": v for k, v in means.items()},
        "loss": last.sums.get("loss", float("nan")),
        "grad_norm": last.grad_norm,
        "learning_rate": last.learning_rate,
        "skipped": float(sum(u.skipped for u in updates)),
    }
