"""Ray job: fine-tunes the base model on the teacher's examples, after making whatever the run lacks.

ray job submit --working-dir . -- python ray_jobs/train_sft.py --run /shared/run --preset paper model.path=/models/q
"""

from gubs.jobs import job_main, making

if __name__ == "__main__":
    job_main(making("sft_model"))
