"""Evaluation: metrics with their contract, baselines beside them, protocols and audits."""
