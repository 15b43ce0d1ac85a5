"""Dynamic sampling (DAPO, arXiv:2503.14476, section 3.2): the next prompts take the place of tied groups, twice at most."""

OPTIONS = {"rollout.refill_draws": 2}
