"""Benchmarks of speed and memory: variants are timed in alternation within one process."""
