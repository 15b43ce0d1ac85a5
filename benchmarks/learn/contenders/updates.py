"""Two updates of the optimizer on each batch; the ratio to π_old is clipped (PPO, arXiv:1707.06347, eq. 7)."""

OPTIONS = {"learner.updates_per_batch": 2}
