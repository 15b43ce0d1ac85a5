"""The terms of the loss, a file each; grpo/config/features.py lists them in the order in which they add up."""
