"""Checkpoints in and out: a model's files, their formats, and the model that they describe."""
