"""Evaluation: metrics with their contracts, baselines, and the comparison of policies."""
