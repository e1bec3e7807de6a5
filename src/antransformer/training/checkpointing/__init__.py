"""Checkpoints: folders of sharded safetensors files and one JSON file, ``state.json``."""
