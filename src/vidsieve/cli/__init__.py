"""The command line: each command parses, calls the package, prints."""

from vidsieve.cli.main import app, main

__all__ = ["app", "main"]
