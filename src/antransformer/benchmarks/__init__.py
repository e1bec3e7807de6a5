"""Benchmarks: variants timed in alternation within one process."""
