"""Parts that all reports share: labels, figures, HTML pages, the loss curve of a run."""
