"""Fixtures of the simulator's tests."""

from ray_helpers import ray_local  # noqa: F401
