"""Measurements inside a trained or training model."""
