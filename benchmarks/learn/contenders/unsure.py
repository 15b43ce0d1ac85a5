"""Of four prompts the one of whose first completion the policy is least sure, and two updates on each batch.

Where π of a completion is near 1 the group will be tied. SPEED (arXiv:2506.09016) screens by the rewards of a few
completions; the likelihood of one says it too, and needs no reward.
"""

OPTIONS = {"curriculum.candidates": 4, "prompts_per_step": 21, "learner.updates_per_batch": 2}
