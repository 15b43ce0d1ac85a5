"""A loss of one's own for quartet: the ratio, not clipped."""

from grpo import objective


@objective(aggregate="dapo")
def unclipped(ratio, advantages, policy_logprobs, options):
    return ratio * advantages
