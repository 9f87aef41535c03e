"""The supporting parts of a training run: preparation, optimizers, checkpoints, reports."""
