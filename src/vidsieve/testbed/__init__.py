"""Synthetic video worlds, questions about them, and tiny models trained on them."""
