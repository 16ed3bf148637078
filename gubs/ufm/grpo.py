"""GA-GRPO on one train worker: the loop, a step of it, and the engine beside it.

Order of a step: generate -> rewards, advantages -> the reference's log-probabilities -> (first step of an attempt: a
second pass for the health check) -> micro-batches, optimiser step -> weights to the engine -> figures -> a checkpoint,
if one is due. On a GPU the engine sleeps while the trainer works.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from gubs.artifacts import JsonObject
from gubs.console import say
from gubs.errors import PlatformError
from gubs.ufm import health
from gubs.ufm import model as models
from gubs.ufm.held_out import HeldOut
from gubs.ufm.inputs import Batch
from gubs.ufm.loss import Denominators, policy_loss
from gubs.ufm.reference import Reference
from gubs.ufm.rollout import FIGURES, Request, Response, Shape, start_rollout
from gubs.ufm.samples import Planner, Sample, StepPlan, answer_figures, answer_sums, assign_rewards, excerpt, requests
from gubs.ufm.sync import WeightSync
from gubs.ufm.train_worker import Job, TrainWorker
from gubs.ufm.trainer import Trainer, Update, logprobs, packed, reduce_max, reduce_sums, release_cache

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

MicroBatches = list[tuple[Batch, list[Sample]]]
"""Micro-batches of a step, each with its samples."""
_ENGINE_TRIES = 3
"""How often a step restarts the engine before it gives up."""


def train_loop(config: JsonObject) -> JsonObject:
    """What Ray Train runs on every worker."""
    return GRPOWorker(config["job"]).run()


class GRPOWorker(TrainWorker):
    """One rank: a trainer, the frozen reference, and its own rollout engine."""

    def __init__(self, job: Job):
        super().__init__(job, job.ufm.grpo.total_steps(job.tasks), job.ufm.grpo.checkpoint)
        self.grpo = job.ufm.grpo
        held_out = HeldOut(self.ufm.held_out, job.seed)
        self.planner = Planner(self.questions, self.inputs, job.tasks, self.grpo, held_out, job.training_seed)
        with self.phases("load"):
            model = models.load(job.start, self.ufm.model, train=True)
            self.trainer = Trainer(model, self.ufm.model, self.grpo.optimizer, self.steps, self.device, self.vision)
            self.reference = Reference(models.load(job.start, self.ufm.model), self.device) if self.grpo.beta else None
        self._share = models.attention(self.ufm.model) == "sdpa"  # see attention.py
        self.engine.open(self.trainer.model)
        self._ahead = models.background_thread("plan", self.device)
        self._next: Future[StepPlan] | None = None
        self._first = 0

    def launch(self) -> None:
        """Starts the engine's process, whose imports take as long as everything that this worker loads."""
        self.engine = RolloutEngine(self, self.job.start)

    def begin(self, step: int) -> None:
        """Sends the engine the weights of the checkpoint that the run resumes from."""
        self._first = step
        if step:
            self.engine.push(self.trainer.model)

    def step(self, step: int) -> dict[str, float]:
        """One step; returns its figures."""
        with self.phases("waiting for data"):
            plan = self._take_plan(step)
        figures = self._answer(plan, step)
        with self.phases("reference"):
            batches, references = self._references(plan.samples)
        again = self._second_pass(plan.samples) if step == self._first else None
        old: list[Tensor] = []
        with self.phases("train"):
            updates = [self._update(batches, references, old, step, first=n == 0) for n in range(self.grpo.updates)]
        self.skipped(step, updates[-1].skipped, [s.to_json() | {"ids": list(s.ids)} for s in plan.samples])
        health_figures = _update_figures(updates[0])
        if again is not None:
            health_figures |= self._compared(batches, old, again)
            health.check(health_figures, step, self.ufm.model.dtype)
        with self.phases("sync"):
            self.engine.push(self.trainer.model)
        whole = sum(len(s.encoded.ids) + len(s.ids) for s in plan.samples)
        computed = sum(b.tokens for b, _ in batches)  # a prompt that answers share counts once, padding counts too
        trained = reduce_sums({"tokens/train": computed, "tokens/sequences": whole}, self.device)
        for update in updates[1:]:
            health_figures |= _update_figures(update)
        health_figures["skipped"] = float(sum(u.skipped for u in updates))
        return plan.figures | figures | trained | self._with_alarm(health_figures, step)

    def end(self) -> None:
        """Stops the thread that plans ahead."""
        self._ahead.shutdown(wait=False, cancel_futures=True)

    def _take_plan(self, step: int) -> StepPlan:
        """The plan of a step, made during the previous step; starts making the next one."""
        plan = self._next.result() if self._next else self.planner.plan(step, self.rank, self.world_size)
        self._next = self._ahead.submit(self.planner.plan, step + 1, self.rank, self.world_size)
        return plan

    def _answer(self, plan: StepPlan, step: int) -> dict[str, float]:
        """Rollout, rewards and advantages; figures over all workers."""
        with self.phases("rollout"):
            responses = self.engine.generate(requests(self.inputs, plan.samples), self.trainer.model)
            check_versions(responses, self.engine.sync)
            reuse = self.engine.reuse()
        with self.phases("reward"):
            result = assign_rewards(plan.samples, responses, self.inputs.text, self.grpo)
            figures = answer_figures(reduce_sums(answer_sums(plan, result), self.device))
        self.monitor.samples(step, [s.to_json() for s in excerpt(plan, self.grpo.samples_every)])
        return figures | _reuse_shares(reduce_sums(reuse, self.device))

    def _references(self, samples: Sequence[Sample]) -> tuple[MicroBatches, Sequence[Tensor | None]]:
        """Micro-batches, as many on every rank, and the reference's log-probabilities for each."""
        numbers = packed([(s.encoded, s.ids) for s in samples], self._share, self.grpo.micro_tokens)
        parts = [[samples[i] for i in part] for part in numbers]
        batches = [(self.inputs.collate([(s.encoded, s.ids) for s in part], share=self._share), part) for part in parts]
        filler = self.inputs.collate([(samples[0].encoded if samples else self.inputs.nothing(), ())])  # no gradient
        batches += [(filler, [])] * (max(1, reduce_max(len(parts), self.device)) - len(batches))
        if self.reference is None:
            return batches, [None] * len(batches)
        with self.reference as reference, torch.no_grad():
            logps = [logprobs(reference, b.to(self.device), vision=self.vision) for b, _ in batches]
        return batches, logps

    def _second_pass(self, samples: Sequence[Sample]) -> dict[int, Tensor]:
        """See `health.second_pass`; by identity of the sample."""
        with self.phases("check"):
            sequences = [(s.encoded, s.ids) for s in samples]
            logp = health.second_pass(
                self.trainer.logprobs, self.inputs, sequences, self.grpo.micro_tokens, self.device
            )
        return {id(s): values for s, values in zip(samples, logp, strict=True)}

    def _compared(self, batches: MicroBatches, old: list[Tensor], again: dict[int, Tensor]) -> dict[str, float]:
        """Figures of the second pass against the log-probabilities that were trained with."""
        if not old:  # a step without a token
            return {}
        second = [old[0][:0], *(again[id(s)] for _, part in batches for s in part)]  # a rank may have no sample
        return health.compared(torch.cat(old).float(), torch.cat(second).float())

    def _with_alarm(self, figures: dict[str, float], step: int) -> dict[str, float]:
        problem = health.alarm(figures, self.ufm.model.dtype)
        if problem and self.rank == 0:
            say(f"step {step}: engine and trainer drift apart: {problem}")
        return figures | {health.ALARM: float(bool(problem))}

    def _update(
        self, batches: MicroBatches, references: Sequence[Tensor | None], old: list[Tensor], step: int, *, first: bool
    ) -> Update:
        """One optimiser step on the batch; the first one adds to `old` what later ones are compared with."""
        grpo = self.grpo
        own = sum((Denominators.of(b.response) for b, _ in batches), Denominators(0, 0))
        total = reduce_sums({"samples": own.samples, "tokens": own.tokens}, self.device)
        if not total["tokens"]:  # all prompts too long: no gradient, and Adam's momentum must not move the weights
            return Update(skipped=False, grad_norm=0.0, learning_rate=0.0, sums={})
        denominators = Denominators(int(total["samples"]), int(total["tokens"]))

        def loss_of(logp: Tensor, number: int) -> tuple[Tensor, dict[str, Tensor]]:
            (batch, samples), reference = batches[number], references[number]
            mask = batch.response.to(logp.device)
            if first:
                old.append(logp.detach())
            advantage = torch.tensor([s.advantage for s in samples] or [0.0], device=logp.device)
            sampled = [p for s in samples for p in (s.response.logprobs if s.response else ())]
            rollout = torch.tensor(sampled, device=logp.device)
            return policy_loss(
                _dense(logp, mask),
                None if first else _dense(old[number], mask),
                None if reference is None else _dense(reference, mask),
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


class RolloutEngine:
    """The engine beside a worker, restarted if it dies; a call that takes too long ends it, and the error names it."""

    def __init__(self, worker: TrainWorker, start: str):
        """Starts its process; returns at once."""
        ufm, largest = worker.ufm, worker.questions.largest
        self._shape = Shape(start, ufm.model, ufm.inputs, ufm.rollout, worker.threads, worker.vision, largest)
        self._node, self._gpus = worker.place()
        self._device, self._limit = worker.device, ufm.workers.stuck_after_s
        self.sync: WeightSync | None = None
        self._counted: dict[str, float] = {}
        self._launch()

    def open(self, model: "Qwen2_5_VLForConditionalGeneration") -> None:
        """Has the engine load its model and ties it to the trainer's. The trainer's model must be loaded first: on a
        GPU vLLM takes its share of the memory that is free then.
        """
        release_cache(self._device)
        self._get(self.handle.ready.remote(), "start")
        self._counted = {}
        version = self.sync.version if self.sync else 0
        self.sync = WeightSync(model, self.handle, self._limit, version)

    def generate(self, asked: Sequence[Request], model: "Qwen2_5_VLForConditionalGeneration") -> list[Response]:
        """The answers to the requests; an engine that died is restarted with the model's weights.

        Raises:
            PlatformError: it does not answer in time, or keeps dying.
        """
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

    def push(self, model: "Qwen2_5_VLForConditionalGeneration") -> None:
        """Sends new weights to the engine; one that died is restarted.

        Raises:
            PlatformError: it does not take them in time.
        """
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
        """See `Engine.figures`, since the last call; zeros if it died meanwhile (the next call restarts it)."""
        try:
            totals: dict[str, float] = self._get(self.handle.figures.remote(), "count")
        except RayActorError:
            self._counted = {}
            return dict.fromkeys(FIGURES, 0.0)
        before, self._counted = self._counted, totals
        return {name: value - before.get(name, 0.0) for name, value in totals.items()}

    def _launch(self) -> None:
        self.handle = start_rollout(self._shape, gpu_ids=self._gpus, node_id=self._node)

    def _start(self, model: "Qwen2_5_VLForConditionalGeneration") -> None:
        self._launch()
        self.open(model)

    def _get(self, ref: ray.ObjectRef, what: str) -> Any:
        try:
            return ray.get(ref, timeout=self._limit)
        except GetTimeoutError:
            raise self._end(what) from None

    def _end(self, what: str) -> PlatformError:
        """Ends an engine that did not do something in time; returns the error that says so."""
        ray.kill(self.handle)
        return PlatformError(
            f"the rollout engine did not {what} within {self._limit:g} s (ufm.workers.stuck_after_s) and was ended"
        )


def check_versions(responses: Sequence[Response], sync: WeightSync | None) -> None:
    """Checks that all answers were written with the weights that the engine was sent last.

    Raises:
        PlatformError: some were not.
    """
    sent = sync.version if sync else 0
    if old := {r.version for r in responses} - {sent}:
        raise PlatformError(
            f"the rollout engine answered with weights {sorted(old)}, not with those it was sent: {sent}"
        )


def _dense(flat: Tensor, mask: Tensor) -> Tensor:
    """Values of response tokens, sequence by sequence, at their places in (s, r); zeros elsewhere."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(mask, flat)


def _reuse_shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Shares of prompt tokens and of clips that the engines' caches had."""
    return {
        f"engine/{kind}_reuse": counts[f"{kind}_hits"] / max(1.0, counts[f"{kind}_queries"])
        for kind in ("prefix", "picture")
    }


def _update_figures(update: Update) -> dict[str, float]:
    tokens = max(1.0, update.sums.get("tokens", 0.0))
    means = {k: v / tokens for k, v in update.sums.items() if k not in ("tokens", "samples", "loss")}
    return {
        **{f"health/{k}": v for k, v in means.items()},
        "loss": update.sums.get("loss", float("nan")),
        "grad_norm": update.grad_norm,
        "learning_rate": update.learning_rate,
        "skipped": float(update.skipped),
    }
