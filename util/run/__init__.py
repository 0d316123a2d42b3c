"""One training run: configuration, processes, steps, checkpoints, logs. Only `reconstruction` knows the method."""
