"""Settings of the User Feedback Modeler: the model, what it is shown, SFT, rollouts, GA-GRPO."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gubs.records import Task
from gubs.section import Section

_APART = 1_000_003
"""Between the seeds of two trainings of a run: more than runs have seeds."""


class RewardSettings(Section):
    """The parts of the reward, Eq. 4; each can be turned off (paper, Table 10)."""

    format: bool = True
    """r_format: the answer has the required form."""
    skip: bool = True
    """r_skip: right about skip or not (click task: about clicking)."""
    choice: bool = True
    """r_choice: the right option."""


class AdvantageSettings(Section):
    """How the rewards of a group become advantages (paper, Table 11 for the weights)."""

    rule: Literal["paper", "weighted", "anchored"] = "paper"
    """`paper`: weighted rewards, standardised over the group. `weighted`: raw rewards standardised with the weights,
    then multiplied by them. `anchored`: measured against the mean and std of the user's own samples."""
    weight_user: float = Field(0.7, ge=0)
    """W_T, of samples about the training user (paper: 0.7)."""
    weight_group: float = Field(0.15, ge=0)
    """W_G, of samples about the user's group (paper: 0.15)."""
    weight_similar: float = Field(0.15, ge=0)
    """W_S, of samples about a similar user (paper: 0.15)."""
    eps: float = Field(1e-4, ge=0)
    """Added to the standard deviation."""


class ModelSettings(Section):
    """The vision-language model: a Qwen2.5-VL checkpoint."""

    path: str = ""
    """Folder of a checkpoint (any Qwen2.5-VL in the Hugging Face form); empty = one made here, of `size`."""
    size: Literal["tiny", "small", "7b"] = "tiny"
    """Checkpoint that `gubs model init` makes: tiny = about 1.3 M parameters from nothing, small = SmolLM2-135M's
    weights under a new vision tower. 7b = Qwen2.5-VL-7B, whose folder `path` has to name; `gubs plan` knows its numbers
    without it."""
    lessons: int = Field(0, ge=0)
    """Steps in which `tiny` is taught to read prompts and pictures before it sees any log; 0 = random weights."""
    own_words: bool = False
    """Teach `tiny` to read the run's own titles, tags and fields (of training users) instead of the simulated app's."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the weights in forward, backward and rollout; the optimiser keeps float32 masters."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """auto = flash attention if GPU and package have it, else SDPA. Only SDPA lets answers to the same prompt share a
    row, so that the prompt is computed once."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, a third more compute."""


class InputSettings(Section):
    """What a prompt shows."""

    style: Literal["full", "brief"] = "full"
    """`full` explains the task and its options in words; `brief` shows bare values, for small models that were trained
    on this task alone."""
    history_items: int = Field(20, ge=0)
    """How many of the user's latest views are shown; 0 = all."""
    digest: bool = False
    """Show how all of the user's earlier views went, in a few words: overall, at the video's length and with its
    tags. Large models can count for themselves; small ones cannot."""
    max_text: int = Field(200, ge=20)
    """Most characters shown of a title, a tag or another single field."""
    profile_chars: int = Field(20000, ge=40)
    """Most characters shown of a group profile."""
    vision: bool = True
    """Show the pictures (paper, Table 9)."""
    max_prompt_tokens: int = Field(8192, ge=64)
    """Longer prompts are dropped and counted, never truncated."""
    max_new_tokens: int = Field(512, ge=8)
    """Longest answer (paper: 512)."""


class OptimizerSettings(Section):
    """AdamW."""

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate (paper: 1e-5)."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay (paper: 0.01)."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear fall to 0 at the last step."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the running mean of gradients."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's decay of the running mean of squared gradients."""
    max_bad_steps: int = Field(3, ge=1)
    """Steps in a row with a loss or gradient that is not a number before the run stops; each is skipped and counted."""


class WorkerSettings(Section):
    """Ray Train workers, one per GPU."""

    count: int = Field(1, ge=1)
    """Workers (paper: 4)."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Give each worker a GPU; auto = if the cluster has GPUs."""
    cpus: float = Field(1.0, gt=0)
    """CPUs reserved for each worker."""
    threads: int = Field(0, ge=0)
    """Threads per worker on a CPU; 0 = the cores of its node / workers there."""
    max_failures: int = Field(2, ge=0)
    """How often the group of workers is restarted after one has died."""
    stuck_after_s: float = Field(900.0, gt=0)
    """A phase (rollout, sync, a collective) that takes longer is named and ends the attempt."""

    @field_validator("gpu", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        """YAML, and so the command line, reads yes and no as booleans."""
        return ("yes" if value else "no") if isinstance(value, bool) else value


class CheckpointSettings(Section):
    """Checkpoints of a training."""

    every: int = Field(50, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(2, ge=1)
    """How many of the newest checkpoints to keep, besides the best."""
    background: bool = False
    """Write them while training continues, from a copy in host memory."""
    timeout_s: float = Field(3600.0, gt=0)
    """Longest time that writing or loading one, or the policy, may take; beyond it the attempt ends."""


class SFTSettings(Section):
    """Supervised fine-tuning on the teacher's examples."""

    epochs: int = Field(1, ge=1)
    """Passes over the examples (paper: 1)."""
    min_steps: int = Field(0, ge=0)
    """Least number of optimiser steps: few examples are repeated for more epochs; 0 = no minimum."""
    batch: int = Field(16, ge=1)
    """Examples per step, over all workers."""
    micro_tokens: int = Field(16384, ge=64)
    """Most tokens in a micro-batch, padding included; it has at least one example."""
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings(every=500)


class DistilSettings(SFTSettings):
    """Teaching the trained policy to answer without a thought, for the service's mode `score`."""

    enabled: bool = True
    """Train for mode `score`; False = the filter has mode `reason` only."""
    items: int = Field(2000, ge=1)
    """Targets per task that it learns from."""
    samples: int = Field(8, ge=1)
    """Answers sampled per target; the mean of their option probabilities is learned."""
    keep: float = Field(0.5, ge=0)
    """Weight of the sampled answers themselves in the loss, so that thoughts stay what they were."""
    epochs: int = Field(4, ge=1)
    """Passes over the targets."""


class RolloutSettings(Section):
    """vLLM, one engine per worker. It samples at temperature 1 and top-p 1, as the paper does: with probabilities that
    the trainer does not compute with, answers would be off policy and no figure would show it.
    """

    min_new_tokens: int = Field(0, ge=0)
    """Fewest tokens of an answer; 0 = no minimum. For measurements with answers of equal length."""
    gpu_memory: float = Field(0.35, gt=0, lt=1)
    """Share of the GPU's memory for the engine while it is awake; its CUDA context and graphs come on top. Serving has
    a share of its own (`serving.gpu_memory`)."""
    kv_cache_gb: float = Field(1.0, gt=0)
    """Size of the key-value cache on a CPU, in GiB."""
    max_num_seqs: int = Field(64, ge=1)
    """Most answers generated at the same time."""
    sleep: bool = True
    """Give the GPU's memory to the trainer between rollouts (no effect on a CPU)."""
    enforce_eager: bool = False
    """Use no CUDA graphs (never used on a CPU)."""
    model_runner: Literal["auto", "v1", "v2"] = "auto"
    """Which vLLM model runner to use. auto = vLLM's choice: v2 on GPUs, v1 on CPUs."""


class GRPOSettings(Section):
    """Group-aware GRPO."""

    tasks: tuple[Task, ...] = (Task.SEQUENTIAL, Task.CLICK)
    """Tasks to train on, if the data set has them. Steps take them in turn; a task named twice comes twice as often."""
    start: Literal["sft", "base"] = "sft"
    """Policy to start from: after SFT, or the model as it is (paper, Table 7)."""
    groups: bool = True
    """Group-aware: S and G samples besides T. False = plain GRPO, all from the user's own prompt (paper, Table 7)."""
    profiles: Literal["own", "oracle", "shuffled"] = "own"
    """Whose groups: `own`, those of the stage `ugm`; `oracle`, the archetypes of a simulated app with all that is true
    of them; `shuffled`, `ugm`'s members, but each group with the profile of another one, which then says nothing about
    it."""
    similar: Literal["group", "random"] = "group"
    """Who the similar user is: another member of the user's groups, or anybody."""
    similar_gold: Literal["target", "own"] = "target"
    """What the similar user's answer is judged by: the training record, or that user's own record of the video. With
    `own`, somebody who has one is drawn where there is one; without any, the training record counts."""
    doubt: float = Field(0.0, ge=0, le=1)
    """Share of a record's answers that say the opposite of its label about skip or not, from which the label is taken
    for wrong: the record then gives no advantage in that step. 0 = every label is trusted."""
    steps: int = Field(200, ge=1)
    """Optimiser steps of the task that `tasks` names most often (paper: 200); other tasks get steps in proportion."""
    prompts: int = Field(4, ge=1)
    """Training records per step, over all workers, balanced over gold options (paper: 4)."""
    user_samples: int = Field(4, ge=1)
    """Answers from the user's own prompt (paper: 4); group and similar user add one each: 6 per record."""
    beta: float = Field(0.04, ge=0)
    """Weight of the KL divergence from the reference, the policy at the start (paper: 0.04)."""
    updates: int = Field(1, ge=1)
    """Optimiser steps on one batch of rollouts."""
    clip: float | None = None
    """PPO's clip of the ratio; the paper has none."""
    tis_cap: float = Field(2.0, ge=0)
    """Cap of the importance weight between engine and trainer; 0 = no correction."""
    level: Literal["sequence", "token"] = "sequence"
    """Mean over each answer's tokens and then over answers, or over all tokens."""
    micro_tokens: int = Field(16384, ge=64)
    """Most tokens in a micro-batch, padding included; it has at least one answer."""
    optimizer: OptimizerSettings = OptimizerSettings()
    rewards: RewardSettings = RewardSettings()
    advantage: AdvantageSettings = AdvantageSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    samples_every: int = Field(10, ge=0)
    """Steps of a task between excerpts of answers for people to read; 0 = none."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where figures go besides `metrics.jsonl` and Ray's metrics; wandb and mlflow must be installed."""

    def total_steps(self, tasks: Sequence[Task] = ()) -> int:
        """Steps of all tasks together; `tasks`: those in turn that the data set has, empty = all that are named."""
        return total_steps(self.steps, tasks or self.tasks)


def total_steps(steps: int, tasks: Sequence[str]) -> int:
    """Steps that tasks in turn take until the one named most often has had its `steps`, with the rest of a round that
    it completes.
    """
    main = max(tasks, key=tasks.count)
    places = [n for n, task in enumerate(tasks, 1) if task == main]
    rounds, more = divmod(steps, len(places))
    return rounds * len(tasks) + (places[more - 1] if more else 0)


class UFMSettings(Section):
    """The User Feedback Modeler."""

    seed: int = Field(0, ge=0)
    """Number of this training among those that differ only by chance: it changes the order of examples and records, the
    choice of similar users, and the sampled answers. Data, held-out users and evaluation follow the run's `seed`
    alone."""
    held_out: float = Field(0.15, gt=0, lt=1)
    """Share of the training users whose targets are not trained on: calibration, thresholds and the quality of `score`
    are measured on them."""
    model: ModelSettings = ModelSettings()
    inputs: InputSettings = InputSettings()
    workers: WorkerSettings = WorkerSettings()
    rollout: RolloutSettings = RolloutSettings()
    sft: SFTSettings = SFTSettings()
    grpo: GRPOSettings = GRPOSettings()
    distil: DistilSettings = DistilSettings()

    def training_seed(self, seed: int) -> int:
        """Seed of a training in a run with this `seed`."""
        return seed + _APART * self.seed

    @model_validator(mode="after")
    def _consistent(self) -> "UFMSettings":
        if self.grpo.prompts % self.workers.count:
            raise ValueError(
                f"ufm.grpo.prompts={self.grpo.prompts} cannot be divided evenly among {self.workers.count} workers"
            )
        return self
