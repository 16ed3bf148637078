"""The main job: GA-GRPO, the policy before and after it on test users, and a page with the curves.

    ray job submit -- python ray_jobs/train_grpo.py
    ray job submit --working-dir . -- python ray_jobs/train_grpo.py --run /shared/run --preset paper model.path=/q7

The first line is for a cluster whose jobs start in this checkout; the second uploads it. Without arguments it takes the
preset `tiny` and the run `runs/demo-synthetic`. What the run lacks (data set with frames, groups, the teachers' labels
and examples, the SFT model) is made first, and said line by line. A relative --run stands in GUBS_HOME, or in ~/gubs
where the working folder is an upload, so that it outlives the job. Killed at any moment, the same command goes on from
the last checkpoint. --force trains again; --all checks the inputs' stages too.
"""

from gubs.jobs import job_main
from gubs.pipeline import demo, main_job

if __name__ == "__main__":
    job_main(main_job, default_run="runs/demo-synthetic", whole=demo)
