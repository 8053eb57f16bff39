"""Prompts of a training: files of questions and captions, and scenes of the testbed."""
