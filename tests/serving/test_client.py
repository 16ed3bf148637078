"""The client by itself: where it is imported from, and how long it waits."""

import time
from email.utils import formatdate

import pytest

import gubs.serving
from gubs.serving.client import AsyncClient, Client, _seconds


def test_the_clients_are_in_the_package():
    assert (gubs.serving.Client, gubs.serving.AsyncClient) == (Client, AsyncClient)
    with pytest.raises(AttributeError):
        _ = gubs.serving.Server


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3), ("0.5", 0.5), ("", 0), ("soon", 0), (formatdate(time.time() - 100, usegmt=True), 0)],
)
def test_retry_after_may_be_anything(header, seconds):
    assert _seconds(header) == seconds


def test_retry_after_may_be_a_date():
    assert 90 < _seconds(formatdate(time.time() + 100, usegmt=True)) <= 100
