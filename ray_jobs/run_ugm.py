"""Ray job: an IF-VR data set in, group profiles and memberships out (summarize -> cluster -> reflect).

    ray job submit --working-dir . -- python ray_jobs/run_ugm.py --run /shared/run --preset my-endpoints.yaml

Without an endpoint, a small local model answers. Where the run has no data set yet, it is built first.
"""

from gubs.jobs import job_main
from gubs.pipeline import run_ugm

if __name__ == "__main__":
    job_main(run_ugm, default_run="runs/demo-synthetic")
