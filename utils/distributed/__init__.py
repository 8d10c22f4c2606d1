"""Training on several processes: who they are, how they are started, what they exchange."""
