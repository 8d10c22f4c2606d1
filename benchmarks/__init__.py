"""Benchmarks: each module is a command that writes its result to benchmarks/results."""
