"""Comparisons and ablations: plan, runs, statistics, charts and report."""
