"""Measurements of norms and activations, in trained models and during training."""
