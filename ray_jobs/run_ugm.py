"""Ray job: makes group profiles and memberships (summarize -> cluster -> reflect), after whatever the run lacks.

    ray job submit --working-dir . -- python ray_jobs/run_ugm.py --run /shared/run --preset my-endpoints.yaml

Without an endpoint, a small local model answers.
"""

from gubs.jobs import job_main, making

if __name__ == "__main__":
    job_main(making("ugm"))
