"""Ray job: logs and videos in, an IF-VR data set with frames out.

ray job submit --working-dir . -- python ray_jobs/build_ifvr.py --run s3://bucket/run --preset paper
python ray_jobs/build_ifvr.py            # joins RAY_ADDRESS, or starts a local cluster of its own
"""

from gubs.jobs import job_main
from gubs.pipeline import build_ifvr

if __name__ == "__main__":
    job_main(build_ifvr, default_run="runs/demo-synthetic")
