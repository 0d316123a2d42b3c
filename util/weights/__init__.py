"""Files of weights: written safely, verified, read in several layouts. Knows nothing of runs."""
