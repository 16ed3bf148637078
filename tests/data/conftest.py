"""Ray for the tests of this folder: without Ray Data's debug lines, which bury what a failing test has to say."""

import logging

import pytest


@pytest.fixture(scope="session")
def ray_local(ray_local: None) -> None:
    """The session's cluster; Ray Data sets its level when it is imported, so it is imported first."""
    import ray.data

    logging.getLogger(ray.data.__name__).setLevel(logging.WARNING)
