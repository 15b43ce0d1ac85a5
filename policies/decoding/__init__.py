"""A policy laid out for decoding: absorbed attention over a latent cache."""
