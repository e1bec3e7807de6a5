"""Settings, the training loop, checkpoints and metrics."""
