"""A game of two policies: both answer the same prompts, and whoever writes the shorter completion wins.

They share one frozen base, in memory once, and have adapters of their own (the configuration needs `lora`).
"""

import sys

from grpo import GroupScore, Session, TrainConfig


def wins(group, other):
    """For each completion the share of the other player's that are longer."""
    lengths = [len(completion.token_ids) for completion in other.completions]
    shares = [sum(length > len(c.token_ids) for length in lengths) / len(lengths) for c in group.completions]
    return GroupScore(shares, {})


first, second = (TrainConfig.read(sys.argv[1], output_dir=sys.argv[2 + seed], seed=seed) for seed in (0, 1))
with Session.open(first) as one, Session.open(second, base=one) as two:
    for step, _ in zip(one.run.steps(), two.run.steps(), strict=True):
        prompts = one.prompts(step)
        groups = [player.sample(prompts, step=step) for player in (one, two)]
        for player, own, other in ((one, *groups), (two, *reversed(groups))):
            batch = player.prepare(own, list(map(wins, own, other)))
            metrics = player.forward_backward(batch) | player.optim_step()
            player.sync_weights()
            player.record(step, metrics)
    print(one.finish(), two.finish(), sep="\n")
