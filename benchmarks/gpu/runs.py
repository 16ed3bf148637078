"""A small run with pictures as the paper has them: `python benchmarks/gpu/runs.py RUN`. No GPU is needed.

Sixty simulated users and forty videos of eight frames with 308 x 308 pixels; prompts in full. The groups are made by
the embedded text model, in a minute or two on two cores: what they say does not matter here, how long it is does.
"""

import argparse
from pathlib import Path

from gubs.artifacts import Run
from gubs.config import Settings, load_settings

WORLD = [
    "synthetic.users=60",
    "synthetic.videos=40",
    "views_per_user=24",
    "exposures_per_user=24",
    "filters.min_video_views=2",
    "filters.min_user_exposures=8",
    "splits.test_users=8",
    "splits.ugm_users=12",
    "splits.click_targets=6",
    "teachers.author=script",
    "teachers.train_labels=truth",
    "teachers.test_labels=truth",
    "teachers.script_flaws=true",
    "teachers.profile_users=1",
    "sft_click_users=10",
    "render.size=320",
    "render.max_seconds=4",
    "ugm.groups=3",
    "ugm.top=6",
    "ugm.min_matched=1",
    "ugm.context_tokens=3200",
    "ugm.shown_members=3",
    "ugm.history_items=3",
    "ugm.max_text=60",
    "llm.roles.summarizer.max_tokens=640",
    "llm.roles.profiler.max_tokens=80",
    "llm.roles.matcher.max_tokens=32",
    "ufm.grpo.start=base",
    "ufm.grpo.tasks=[sequential]",
    "ufm.grpo.trackers=[]",
]


def settings(*overrides: str) -> Settings:
    """Preset `paper` on the small world."""
    return load_settings("paper", [*WORLD, *overrides])


def main() -> None:
    """Makes data set, frames, labels and groups."""
    from gubs.stages import make

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    make(["frames", "labels", "ugm"], Run(args.run), settings("ufm.workers.gpu=no"))


if __name__ == "__main__":
    main()
