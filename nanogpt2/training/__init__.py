"""The parts of a training run that are not its lesson: optimizer, checkpoints, figures."""
