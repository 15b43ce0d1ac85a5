"""The contenders: a file each. OPTIONS are over those of the task; most are features of `quartet train`.

A contender may also have `listeners(session)`, which are added to those of the run, and `draw(session, step)`, which
gives the groups of a step and their advantages.
"""

NAMES = (
    "grpo",
    "unsure",
    "difficulty",
    "difficulty_updates",
    "refill",
    "updates",
    "replay",
    "maxrl",
    "sizes",
    "hint",
    "hint_beside",
    "hint_wrong",
)
