"""To and from Hugging Face's transformers."""
