"""Ray job: logs and videos in, an IF-VR data set with frames out.

ray job submit --working-dir . -- python ray_jobs/build_ifvr.py --run s3://bucket/run --preset paper
python ray_jobs/build_ifvr.py            # joins RAY_ADDRESS, or starts its own local cluster
"""

from gubs.jobs import job_main, making

if __name__ == "__main__":
    job_main(making("frames"))
