"""Ray job: judges every trained policy of a run on the test users; prints a table and writes a page.

ray job submit --working-dir . -- python ray_jobs/evaluate.py --run /shared/run --preset paper
"""

from gubs.jobs import evaluate_job, job_main

if __name__ == "__main__":
    job_main(evaluate_job)
