"""Analytical models of the memory and time of a training step."""
