"""Videos: reading and writing files."""
