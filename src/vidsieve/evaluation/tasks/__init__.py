"""Tasks, one a file, which `vidsieve.evaluation.experiment` runs."""
