"""Train workers that hang somewhere, each in a fork of this process: `python drive_worker.py RUN CHECKPOINT FOLDER
WHERE...` prints their exit codes."""

import json
import os
import sys
import time

from ufm_helpers import small_settings

from gubs.ufm.train_worker import Job, TrainWorker


class Hanging(TrainWorker):
    """Trains nothing, and does not come back from one of its parts."""

    def __init__(self, job: Job, where: str):
        super().__init__(job, 2, job.ufm.grpo.checkpoint)
        hang = lambda *_: time.sleep(60)  # noqa: E731
        if where == "resume":
            self.checkpoints.latest = hang
        if where == "report":
            self.monitor.report = hang
        self._where = where

    def step(self, step: int) -> dict[str, float]:
        with self.phases("train"):
            time.sleep(60 if self._where == "train" else 0)
        return {"loss": 1.0}


def exit_code(run: str, checkpoint: str, folder: str, where: str) -> int:
    """Of a worker that hangs there. What takes long to import has been imported."""
    short = ("ufm.workers.stuck_after_s=1", "ufm.grpo.checkpoint.timeout_s=1")
    settings = small_settings(*short, "ufm.workers.threads=1")
    child = os.fork()
    if not child:
        recorded = settings.model_dump(mode="json")
        Hanging(Job(run, settings.ufm, settings.seed, recorded, "grpo", folder, checkpoint, {}), where).run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration  # noqa: F401

    run, checkpoint, folder, *places = sys.argv[1:]
    print(json.dumps({where: exit_code(run, checkpoint, f"{folder}/{where}", where) for where in places}))
