"""The terms of the loss, a file each; `TERMS` in grpo/learner/build.py lists them in the order in which they add up."""
