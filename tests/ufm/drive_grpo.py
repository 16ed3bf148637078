"""The command of a training job, as a process that a test can kill: `python drive_grpo.py RUN NAME [key=value ...]`."""

import sys

from ufm_helpers import small_settings

from gubs.artifacts import Run
from gubs.config import Settings
from gubs.ray_runtime import ray_session
from gubs.stages import GRPO, make_stage, named

STEPS = 6


def resume_settings(*overrides: str) -> Settings:
    """Short steps, a checkpoint every second one, nothing thrown away."""
    return small_settings(
        f"ufm.grpo.steps={STEPS // 2}",  # of each of two tasks
        "ufm.grpo.checkpoint.every=2",
        "ufm.grpo.checkpoint.keep=10",
        "ufm.grpo.optimizer.learning_rate=0.001",
        "ufm.grpo.trackers=[]",
        "ufm.sft.optimizer.learning_rate=0.003",
        "ufm.sft.checkpoint.every=40",
        "ufm.inputs.max_new_tokens=16",
        "ufm.inputs.max_prompt_tokens=256",
        "ufm.rollout.kv_cache_gb=0.1",
        "ufm.rollout.max_num_seqs=32",
        "ufm.workers.threads=1",
        "ufm.workers.stuck_after_s=200",
        "ray.num_cpus=2",
        *overrides,
    )


if __name__ == "__main__":
    settings = resume_settings(*sys.argv[3:])
    with ray_session(settings.ray):
        make_stage(named(GRPO, sys.argv[2], settings), Run(sys.argv[1]), settings)
