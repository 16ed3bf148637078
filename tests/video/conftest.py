"""Fixtures of the video tests."""

from ray_helpers import ray_local  # noqa: F401
