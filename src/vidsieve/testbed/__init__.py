"""A synthetic video world, questions about it, and a tiny model trained on it."""
