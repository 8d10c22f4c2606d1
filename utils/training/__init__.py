"""The training loop and the inference loop, and what a run folder holds of them."""
