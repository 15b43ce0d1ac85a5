"""The rewards that have a name."""
