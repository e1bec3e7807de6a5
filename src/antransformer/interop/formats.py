"""Formats of exported models and the data types of their weights; importable without torch."""

DTYPES = ("float32", "bfloat16", "float16")
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
# Format -> dtypes of its weights; the first is the default.
FORMATS = {"native": DTYPES, "exaone4": DTYPES, "qwen3": DTYPES, "gguf": GGUF_DTYPES}
