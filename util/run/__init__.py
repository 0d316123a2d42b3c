"""One training run: configuration, processes, steps, checkpoints, logs. Knows nothing of the method."""
