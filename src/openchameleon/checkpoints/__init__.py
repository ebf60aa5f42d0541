"""Checkpoints of other layouts <-> ours: Hugging Face's and Meta's, and warm starts from text."""
