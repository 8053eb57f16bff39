"""Captions written anew by a model behind an OpenAI-compatible server."""
