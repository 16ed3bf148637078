"""Ray job: every trained policy of a run is asked about the test users; metrics, a table, and a page.

ray job submit --working-dir . -- python ray_jobs/evaluate.py --run /shared/run --preset paper
"""

from gubs.jobs import job_main
from gubs.pipeline import evaluate_job

if __name__ == "__main__":
    job_main(evaluate_job, default_run="runs/demo-synthetic")
