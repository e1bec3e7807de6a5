"""Import from and export to Hugging Face transformers, and evaluation with lm_eval."""
