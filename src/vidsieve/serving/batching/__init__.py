"""The parts of `vidsieve batch`: rows, the videos read ahead of them, what answers them, the journal, Ray."""
