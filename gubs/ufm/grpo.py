"""GA-GRPO on one train worker: the loop, a step of it, and the engine beside it.

Order of a step: generate -> rewards, advantages -> the reference's log-probabilities -> (first step of an attempt: a
second pass for the health check) -> micro-batches, optimiser step -> weights to the engine -> figures -> now and then a
checkpoint. The engine sleeps while the trainer works (GPUs).
"""

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from gubs.console import say
from gubs.errors import PlatformError
from gubs.ufm import health
from gubs.ufm import model as models
from gubs.ufm.inputs import Batch, rows_of
from gubs.ufm.loss import Denominators, policy_loss
from gubs.ufm.rollout import FIGURES, Request, Response, Shape, start_rollout
from gubs.ufm.samples import Planner, Sample, StepPlan, answer_figures, answer_sums, assign_rewards, requests, shown
from gubs.ufm.sync import WeightSync
from gubs.ufm.train_worker import Job, TrainWorker
from gubs.ufm.trainer import Trainer, Update, logprobs, micro_batches, most, reduce_sums, release_cache

if TYPE_CHECKING:
    from torch import Tensor

_ENGINE_TRIES = 3
"""Times an engine is started anew within a step before the step gives up."""


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    return GRPOWorker(config["job"]).run()


class GRPOWorker(TrainWorker):
    """One rank: a trainer, the frozen reference, and a rollout engine of its own."""

    def __init__(self, job: Job):
        super().__init__(job, job.ufm.grpo.steps)
        self.grpo = job.ufm.grpo
        self.planner = Planner(self.questions, self.inputs, job.tasks, self.grpo, job.seed)
        with self.phases("load"):
            model = models.load(job.start, self.ufm.model, train=True)
            self.trainer = Trainer(model, self.ufm.model, self.grpo.optimizer, self.steps, self.device, self.vision)
            self.reference = Reference(models.load(job.start, self.ufm.model), self.device) if self.grpo.beta else None
        self._share = models.attention(self.ufm.model) == "sdpa"  # the one that takes a mask of what sees what
        self.engine.open(self.trainer.model)
        self._ahead = models.beside("plan", self.device)
        self._next: Future[StepPlan] | None = None
        self._first = 0

    def launch(self) -> None:
        """The engine's process, whose imports take as long as all that this worker loads."""
        self.engine = RolloutEngine(self, self.job.start)

    def begin(self, step: int) -> None:
        """The engine gets the weights of the checkpoint that the run goes on from."""
        self._first = step
        if step:
            self.engine.push(self.trainer.model)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its figures."""
        with self.phases("waiting for data"):
            plan = self._take_plan(step)
        figures = self._answer(plan, step)
        updates: list[Update] = []
        with self.phases("reference"):
            batches, references = self._references(plan.samples)
        again = self._second_pass(plan.samples) if step == self._first else None
        with self.phases("train"):
            old: list[Any] = []
            for number in range(self.grpo.updates):
                updates.append(self._update(batches, references, old, step, first=number == 0))
        self.skipped(step, updates[-1].skipped, [s.to_json() | {"ids": list(_ids(s))} for s in plan.samples])
        health_figures = _update_figures(updates[:1])
        if again is not None:
            health_figures |= self._compared(batches, old, again)
            health.check(health_figures, step, self.ufm.model.dtype)
        with self.phases("sync"):
            self.engine.push(self.trainer.model)
        trained = reduce_sums({"tokens/train": float(sum(b.tokens for b, _ in batches))}, self.device)
        health_figures |= _update_figures(updates[1:]) | {"skipped": float(sum(u.skipped for u in updates))}
        return plan.figures | figures | trained | self._with_alarm(health_figures, step)

    def end(self) -> None:
        """Stops the thread that plans ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def _take_plan(self, step: int) -> StepPlan:
        """The plan of a step, made while the step before was computed; starts on the one after."""
        plan = self._next.result() if self._next else self.planner.plan(step, self.rank, self.world)
        following = step + 1
        self._next = self._ahead.submit(self.planner.plan, following, self.rank, self.world)
        return plan

    def _answer(self, plan: StepPlan, step: int) -> dict[str, float]:
        """Rollout, rewards and advantages; figures over all workers."""
        with self.phases("rollout"):
            responses = self.engine.generate(requests(self.inputs, plan.samples), self.trainer.model)
            of_these_weights(responses, self.engine.sync)
            reuse = self.engine.reuse()
        with self.phases("reward"):
            result = assign_rewards(plan.samples, responses, self.inputs.text, self.grpo)
            figures = answer_figures(reduce_sums(answer_sums(plan, result), self.device))
        self.monitor.samples(step, [s.to_json() for s in shown(plan, self.grpo.samples_every)])
        return figures | _shares(reduce_sums(reuse, self.device))

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
        with self.reference as reference, torch.no_grad():
            logps = [logprobs(reference, b.to(self.device), vision=self.vision) for b, _ in batches]
        return batches, logps

    def _second_pass(self, samples: Sequence[Sample]) -> "dict[int, Tensor]":
        """See `health.second_pass`; by identity of the sample."""
        with self.phases("check"):
            sequences = [(s.encoded, _ids(s)) for s in samples]
            logp = health.second_pass(
                self.trainer.logprobs, self.inputs, sequences, self.grpo.micro_tokens, self.device
            )
        return {id(s): values for s, values in zip(samples, logp, strict=True)}

    def _compared(
        self, batches: "list[tuple[Batch, list[Sample]]]", old: "list[Tensor]", again: "dict[int, Tensor]"
    ) -> dict[str, float]:
        """Figures of the second pass against the log-probabilities that were trained with."""
        import torch

        if not old:  # a step without a token
            return {}
        second = [old[0][:0], *(again[id(s)] for _, part in batches for s in part)]  # a rank may have no sample
        return health.compared(torch.cat(old).float(), torch.cat(second).float())

    def _with_alarm(self, figures: dict[str, float], step: int) -> dict[str, float]:
        problem = health.alarm(figures, self.ufm.model.dtype)
        if problem and self.rank == 0:
            say(f"step {step}: engine and trainer drift apart: {problem}")
        return figures | {health.ALARM: float(bool(problem))}

    def _empty(self, samples: Sequence[Sample]) -> Batch:
        """A micro-batch without response tokens: the same graph, no gradient."""
        return self.inputs.collate([(samples[0].encoded if samples else self.inputs.nothing(), ())])

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
        own = [Denominators.of(m) for m in masks]
        counts = {"samples": float(sum(d.samples for d in own)), "tokens": float(sum(d.tokens for d in own))}
        total = reduce_sums(counts, self.device)
        if not total["tokens"]:  # all prompts too long: no gradient, and Adam's momentum must not move the weights
            return Update(skipped=False, grad_norm=0.0, learning_rate=0.0, sums={})
        denominators = Denominators(int(total["samples"]), int(total["tokens"]))

        def loss_of(logp: Any, number: int) -> tuple[Any, dict[str, Any]]:
            batch, samples = batches[number]
            mask = batch.response.to(logp.device)
            if first:
                old.append(logp.detach())
            advantage = torch.tensor([s.advantage for s in samples] or [0.0], device=logp.device)
            sampled = [p for s in samples for p in (s.response.logprobs if s.response else ())]
            rollout = torch.tensor(sampled, device=logp.device)
            return policy_loss(
                _dense(logp, mask),
                None if first else _dense(old[number], mask),
                None if references[number] is None else _dense(references[number], mask),
                advantage,
                mask,
                denominators=denominators,
                beta=grpo.beta,
                clip=grpo.clip,
                rollout_logp=_dense(rollout, mask),
                tis_cap=grpo.tis_cap,
                level=grpo.level,
            )

        return self.trainer.update([b for b, _ in batches], loss_of, step)


class Reference:
    """The frozen policy of the start. On a GPU only while it is asked (`with`): the trainer needs the room more."""

    def __init__(self, model: Any, device: Any):
        self._model, self._device = model, device
        self._kept: list[tuple[Any, Any]] = []
        if device.type == "cuda":
            for weight in itertools.chain(model.parameters(), model.buffers()):
                self._kept.append((weight, weight.data.pin_memory()))
        self._leave()

    def __enter__(self) -> Any:
        for weight, host in self._kept:
            weight.data = host.to(self._device, non_blocking=True)
        return self._model

    def __exit__(self, *_: object) -> None:
        self._leave()

    def _leave(self) -> None:
        for weight, host in self._kept:
            weight.data = host
        release_cache(self._device)


class RolloutEngine:
    """The engine beside a worker, started again where it died; what takes too long is named and ends the worker."""

    def __init__(self, worker: TrainWorker, start: str):
        """Starts its process; returns at once."""
        threads = 0 if worker.device.type == "cuda" else worker.threads
        ufm = worker.ufm
        self._shape = Shape(start, ufm.model, ufm.inputs, ufm.rollout, threads, worker.vision)
        self._place, self._device = worker.place(), worker.device
        self._limit = ufm.workers.stuck_after_s
        self.sync: WeightSync | None = None
        self._counted: dict[str, float] = {}
        self._launch()

    def open(self, model: Any) -> None:
        """Has the engine load its model, and ties it to the trainer's. It comes second: on a GPU vLLM takes its share
        of the memory that is free then.
        """
        release_cache(self._device)
        self._get(self.handle.ready.remote(), "start")
        self._counted = {}
        version = self.sync.version if self.sync else 0
        self.sync = WeightSync(model, self.handle, self._limit, version)

    def generate(self, asked: Sequence[Request], model: Any) -> list[Response]:
        """The answers to the requests; an engine that died is started again with the model's weights.

        Raises:
            PlatformError: it does not answer in time, or keeps dying.
        """
        from ray.exceptions import RayActorError

        for _ in range(_ENGINE_TRIES):
            try:
                answers: list[Response] = self._get(self.handle.generate.remote(list(asked)), "generate")
                self._get(self.handle.sleep.remote(), "sleep")
            except RayActorError:
                self._start(model)
                self.push(model)
            else:
                return answers
        raise PlatformError(f"the rollout engine died {_ENGINE_TRIES} times in one step; Ray's dashboard has its log")

    def push(self, model: Any) -> None:
        """New weights for the engine; one that died is started again.

        Raises:
            PlatformError: it does not take them in time.
        """
        from ray.exceptions import GetTimeoutError, RayActorError

        assert self.sync
        release_cache(self._device)
        try:
            try:
                self.sync.push(model)
            except RayActorError:
                self._start(model)
                self.sync.push(model)
        except GetTimeoutError:
            raise self._end("take the weights") from None

    def reuse(self) -> dict[str, float]:
        """Since the last call: see `Engine.figures`. Zeros where it died since: the next call starts it again."""
        from ray.exceptions import RayActorError

        try:
            totals: dict[str, float] = self._get(self.handle.figures.remote(), "count")
        except RayActorError:
            self._counted = {}
            return dict.fromkeys(FIGURES, 0.0)
        before, self._counted = self._counted, totals
        return {name: value - before.get(name, 0.0) for name, value in totals.items()}

    def _launch(self) -> None:
        self.handle = start_rollout(self._shape, gpu_ids=self._place[1], node_id=self._place[0])

    def _start(self, model: Any) -> None:
        self._launch()
        self.open(model)

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


def of_these_weights(responses: Sequence[Response], sync: WeightSync | None) -> None:
    """Every answer carries the version of the weights that wrote it.

    Raises:
        PlatformError: this rank's engine answered with other weights than it was sent last.
    """
    sent = sync.version if sync else 0
    if old := {r.version for r in responses} - {sent}:
        raise PlatformError(
            f"the rollout engine answered with weights {sorted(old)}, not with those it was sent: {sent}"
        )


def _dense(flat: Any, mask: Any) -> Any:
    """Values of response tokens, sequence by sequence, at their places in (s, r); zeros elsewhere."""
    import torch

    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def _ids(sample: Sample) -> tuple[int, ...]:
    return sample.response.ids if sample.response else ()


def _shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Of all workers' engines: shares of the prompts' tokens and of the clips that were found in the caches."""
    return {
        f"engine/{kind}_reuse": counts[f"{kind}_hits"] / max(1.0, counts[f"{kind}_queries"])
        for kind in ("prefix", "picture")
    }


def _update_figures(updates: Sequence[Update]) -> dict[str, float]:
    """Figures of the last of some updates; none of none."""
    if not updates:
        return {}
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
