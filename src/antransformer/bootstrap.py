"""Shared by all bootstraps: the confidence level and the number of resamples."""

RESAMPLES = 2000
CONFIDENCE = 0.95
