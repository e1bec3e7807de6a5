"""Shared by all reports: labels, figures, HTML pages, the loss curve of a run."""
