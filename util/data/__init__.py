"""From files to batches. Knows nothing of models and runs."""
