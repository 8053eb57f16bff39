"""What can be measured: one task a file, run by `vidsieve.evaluation.experiment`."""
