"""Measuring methods: accuracy with errors clustered by video, in one run with its baselines."""
