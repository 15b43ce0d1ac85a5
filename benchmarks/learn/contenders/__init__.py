"""The contenders: a file each. OPTIONS are over those of the task.

A contender may also have `draw(session, step)`, which gives what a step learns from. Its metrics are the completions
and tokens that were sampled only to choose by.
"""

NAMES = ("grpo", "unsure")
