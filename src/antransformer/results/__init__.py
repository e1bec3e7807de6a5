"""Files of results: comparisons, sweeps, and the observations that laws are fitted to."""
