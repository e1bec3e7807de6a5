"""Many training runs: the queue, its worker process, the grid search."""
