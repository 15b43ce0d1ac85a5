"""What the commands of `quartet` do besides training."""
