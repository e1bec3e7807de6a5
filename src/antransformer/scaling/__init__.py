"""Scaling laws: fitting, files of laws, charts, and the planner that uses them."""
