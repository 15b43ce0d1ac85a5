"""Best-of-n distillation: the policy learns, as if it were a gold solution, the best of its own n completions."""

import sys

from grpo import GroupScore, Session, TrainConfig


def best_alone(score):
    """1 for the best completion. None leaves the others out of the batch."""
    best = score.rewards.index(max(score.rewards))
    return GroupScore([1.0 if i == best else None for i in range(len(score.rewards))], {})


def minus_log_likelihood(logprobs, sampling_logprobs, advantages, mask):
    return -logprobs


with Session.open(TrainConfig.read(sys.argv[1], output_dir=sys.argv[2])) as session:
    for step in session.run.steps():
        groups = session.sample(session.prompts(step), step=step, group_size=16)
        batch = session.prepare(groups, list(map(best_alone, session.score(groups))))
        metrics = session.forward_backward(batch, minus_log_likelihood) | session.optim_step()
        session.sync_weights()
        session.record(step, metrics)
    print(session.finish())
