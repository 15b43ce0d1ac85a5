"""Reward functions run in processes of their own."""
