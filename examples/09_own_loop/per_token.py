"""An estimator of your own with an advantage for every token: early tokens of a right answer earn more."""

import sys

from grpo import Session, TrainConfig

DISCOUNT = 0.98  # of the advantage, from each token to the next


def advantages(group, score):
    """[G][Lc]: the centred reward of each completion, less for each later token."""
    mean = sum(score.rewards) / len(score.rewards)
    return [
        [(reward - mean) * DISCOUNT**place for place in range(len(completion.token_ids))]
        for completion, reward in zip(group.completions, score.rewards, strict=True)
    ]


with Session.open(TrainConfig.read(sys.argv[1], output_dir=sys.argv[2])) as session:
    for step in session.run.steps():
        groups = session.sample(session.prompts(step), step=step)
        scores = session.score(groups)
        batch = session.prepare(groups, scores, list(map(advantages, groups, scores)))
        metrics = session.forward_backward(batch) | session.optim_step()
        session.sync_weights()
        session.record(step, metrics)
    print(session.finish())
