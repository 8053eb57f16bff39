"""Serving video LLMs: answering many requests, and what that takes."""
