"""Intervals, paired differences and gains, as pure functions."""
