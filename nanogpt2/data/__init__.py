"""Text files -> token ids (corpus.py) -> batches (loader.py). Nothing here knows the model."""
