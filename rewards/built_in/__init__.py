"""The rewards that are used by name."""
