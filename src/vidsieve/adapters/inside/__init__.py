"""Methods that act inside the LLM's layers, or while decoding."""
