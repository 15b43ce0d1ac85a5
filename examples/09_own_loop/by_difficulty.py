"""Prompts by difficulty: problems whose last group had different rewards are drawn more often, since they teach."""

import random
import sys
from statistics import pvariance

from grpo import Session, TrainConfig
from grpo.steps.callback import Callback


class ByDifficulty(Callback):
    """Draws in proportion to the variance of the last rewards, without replacement (Efraimidis & Spirakis 2006)."""

    def __init__(self, examples):
        self.examples, self.variances = examples, {}

    def choose_prompts(self, count, step, draw):
        noise = random.Random(f"{step}/{draw}")

        def key(example):
            variance = self.variances.get(example.example_id, 0.25)  # a new problem counts as half solved: p(1 - p)
            return noise.random() ** (1 / max(variance, 0.01))  # the policy changes: nothing is left out for good

        return sorted(self.examples, key=key)[-count:]

    def on_groups_sampled(self, step, groups, scores):
        for group, score in zip(groups, scores, strict=True):
            rewards = [reward for reward in score.rewards if reward is not None] or [0.0, 1.0]
            self.variances[group.prompt.prompt_id] = pvariance(rewards)


with Session.open(TrainConfig.read(sys.argv[1], output_dir=sys.argv[2])) as session:
    session.collector.callbacks.append(ByDifficulty(session.task.unsolved))
    for step in session.run.steps():
        metrics = session.learn(session.prepare(session.draw(step)))
        session.sync_weights()
        session.record(step, metrics)
    print(session.finish())
