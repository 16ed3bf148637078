"""A simulated app that is made in seconds, as overrides of preset `tiny`."""

WORLD = (
    "synthetic.users=60",
    "synthetic.videos=40",
    "views_per_user=24",
    "exposures_per_user=24",
    "filters.min_video_views=2",
    "filters.min_user_exposures=8",
    "splits.test_users=8",
    "splits.click_targets=6",
    "sft_click_users=10",
    "sft_views=40",
)
