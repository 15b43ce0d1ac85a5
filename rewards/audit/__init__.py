"""Recorded rollouts of any trainer, and what is wrong with them. Nothing heavy is loaded here."""
