"""Several runs compared in numbers."""
