"""Rounds of decoding as graphs: for few rows of a small policy, whose operators cost more to call than to compute."""
