"""Readers of published benchmarks, one file each."""
