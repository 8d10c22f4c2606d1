"""Measurements, each with its command and its committed result."""
