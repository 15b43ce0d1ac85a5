"""Dynamic sampling (DAPO, arXiv:2503.14476, 3.2): the next prompts take the place of tied groups, at most twice."""

OPTIONS = {"rollout.refill_draws": 2}
