"""Processes in which reward functions run, apart from the training."""
