"""One training run: configuration, processes, steps, checkpoints, logs. The method is known to `reconstruction` alone."""
