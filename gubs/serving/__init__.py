"""The UFM as a filter in front of a recommender, over HTTP: decisions, API, Ray Serve deployments, client."""
