"""vLLM with a method: plug-in, processors and models."""
