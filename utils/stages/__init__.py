"""The stages of the paper's tables: their list, their cost in time and disk space, and the runner."""
