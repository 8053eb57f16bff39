"""The recipe of the testbed's models, ablations, separation and search."""
