"""Deploys the filter of a run on the cluster that runs this job; the service stays when the job has ended.

    ray job submit -- python ray_jobs/serve_ufm.py --run /shared/run serving.keys_file=/shared/keys.json

First it makes the filter if the run lacks it: the policy taught to answer without a thought, thresholds from held-out
users, everything a replica needs in one folder. A further version is deployed beside the first and gets no requests
until `gubs serve split` or `gubs serve promote` says so. The cluster must have been started with
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=gubs.serving.guard:middlewares (see docs/serving.md).
"""

from gubs.jobs import job_main, serve_job

if __name__ == "__main__":
    job_main(serve_job)
