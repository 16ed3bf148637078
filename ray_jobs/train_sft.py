"""Ray job: the base model, fine-tuned on the teacher's examples.

    ray job submit --working-dir . -- python ray_jobs/train_sft.py --run /shared/run --preset paper model.path=/models/q

Where the run has no data set or no examples yet, they are made first.
"""

from gubs.jobs import job_main
from gubs.pipeline import sft_job

if __name__ == "__main__":
    job_main(sft_job, default_run="runs/demo-synthetic")
