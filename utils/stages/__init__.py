"""The paper as a list of stages: what each reads and writes, what all of it takes, and the process that runs it."""
