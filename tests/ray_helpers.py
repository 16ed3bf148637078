"""Ray for the tests of rooms that use Ray Data: without its debug lines, which bury what a failing test has to say.

Their conftest.py imports the fixture, which then stands in for that of tests/conftest.py.
"""

import logging

import pytest


@pytest.fixture(scope="session")
def ray_local(ray_local: None) -> None:
    """The session's cluster; Ray Data sets its level when it is imported, so it is imported first."""
    import ray.data

    logging.getLogger(ray.data.__name__).setLevel(logging.WARNING)
