"""Checkpoints: folders of safetensors and a JSON state."""
