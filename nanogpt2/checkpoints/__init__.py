"""Open and save checkpoints: a model's files and their formats. This file imports nothing."""
