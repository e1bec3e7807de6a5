"""Grid searches over learning rate, batch, size and width."""
