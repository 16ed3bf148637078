"""The UFM as a filter in front of a recommender, over HTTP: decisions, API, Ray Serve deployments, client."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gubs.serving.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    """The clients, imported when they are asked for: engines and replicas need none."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gubs.serving import client

    return getattr(client, name)
