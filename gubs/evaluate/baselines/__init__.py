"""Baselines that stand beside every model's figures: constants, rates, popularity, neighbours, factors, statistics.

Small own code on scipy and scikit-learn. None of them can be switched off.
"""
