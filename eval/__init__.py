"""Verification accuracy, fairness and the paper's tables."""
