"""A policy in the form that decodes: absorbed attention over a latent cache."""
