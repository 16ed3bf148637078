"""The main job: GA-GRPO, judging the policy before and after it on test users, and a page with the curves.

    ray job submit -- python ray_jobs/train_grpo.py
    ray job submit --working-dir . -- python ray_jobs/train_grpo.py --run /shared/run --preset paper model.path=/q7

The first line is for a cluster whose jobs start in this checkout; the second uploads it. Without arguments, the job
takes the preset `tiny` and the run `runs/demo-synthetic`. First it makes what the run lacks (data set with frames,
groups, the teachers' labels and examples, the SFT model), with a line per stage. A relative --run is in GUBS_HOME, or
in ~/gubs if the working folder is an upload, so that results outlive the job. Killed at any moment, the same command
resumes from the last checkpoint. --force trains again.
"""

from gubs.jobs import job_main, main_job

if __name__ == "__main__":
    job_main(main_job)
