"""Files of a run: written whole or not at all, journals, checkpoints, versions."""
