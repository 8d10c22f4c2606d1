"""Training with torchrun: ranks, start and end of the process group, collectives, synchronised batch normalisation."""
