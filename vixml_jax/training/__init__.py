"""State, optimizer, step, loop, checkpoints and metric writing."""
