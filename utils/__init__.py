"""Mechanism that all stages share: data, losses, training and inference loops, checkpoints, generated faces."""
