"""A value function beside the policy, for PPO (`loss.advantage: gae`) and `loss.advantage: rank_softmax`.

The value head reads the hidden state that predicts a token, and predicts the score that is still to come. It belongs to
the learner: checkpoints keep it, samplers never see it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grpo.algorithm.values import gae, outcome_rewards, rank_softmax_weights, value_loss, whiten
from grpo.config.value import ValueOptions
from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.term import Term, Work
from policies.devices import wide
from policies.policy import Policy

if TYPE_CHECKING:
    from grpo.config.run import TrainConfig
    from rewards.group_score import GroupScore

METRICS = {
    "loss/value": "loss of the value head (PPO baseline), mean per token, squared score",
    "value/clip_fraction": "tokens whose value the clip holds back, fraction",
    "value/explained_variance": "1 - Var(return - value) / Var(return) over tokens; 1 is a perfect value function",
    "value/grad_norm": "norm of the value head's gradient before clipping",
}
HIDDEN = 128  # width of the value head's hidden layer
RATE = 1e-3  # its peak learning rate
WEIGHT = 0.1  # of its loss; AdamW's steps hardly depend on it
RANK_TEMPERATURE = 1.0  # weights are softmax(rank / this)


def term(policy: Policy, config: TrainConfig, load: object = None) -> ValueTerm | None:
    advantage = config.loss.advantage
    if advantage not in ValueTerm.estimators:
        return None
    return ValueTerm(policy, config.value, ranked=advantage == "rank_softmax")


class ValueTerm(Term):
    """PPO's clipped value loss. The advantages of every token come from the values that the states had when they were
    sampled."""

    name = "value"
    estimators = ("gae", "rank_softmax")
    in_total = False
    keeps_module = True

    def __init__(self, policy: Policy, options: ValueOptions, *, ranked: bool) -> None:
        """`ranked`: advantages are weighted by the completion's rank in its group."""
        self.options, self.ranked = options, ranked
        self.head = self.module = ValueHead(policy.config.get_text_config().hidden_size, HIDDEN).to(policy.device)

    def parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": list(self.head.parameters()), "peak": RATE, "weight_decay": 0.0}]

    @torch.no_grad()
    def prepare(self, batch: TrainingBatch, scores: Sequence[GroupScore], work: Work) -> TrainingBatch:
        started = time.perf_counter()
        values: dict[int, Tensor] = {}
        for mini in work.cut(work.rows):
            with work.likelihood.replaying(mini):
                states = mini.of_scored(work.likelihood.preceding(mini))
            values_CL = mini.by_completion(self.head(states))
            if mini.counts:
                values |= {s.index: values_CL[c, : len(s.token_ids)].cpu() for c, s in enumerate(mini.samples)}
        rewards_PG = [score.rewards for score in scores]
        weights_PG = rank_softmax_weights(rewards_PG, RANK_TEMPERATURE) if self.ranked else None
        values = work.ranks.union(values)
        batch = with_token_advantages(batch, values, rewards_PG, self.options, weights_PG=weights_PG)
        return replace(batch, seconds=time.perf_counter() - started)

    def teaches(self, batch: TrainingBatch) -> bool:
        """It teaches where a value was wrong, since equal advantages are 0 once they are whitened."""
        return any(sample.values != sample.returns for row in batch.rows for sample in row.samples)

    def needs(self, row: PackedRow, work: Work) -> bool:
        return True

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor | None:
        """The value loss; the trunk learns nothing from it. Samples whose advantages others have given, and gold
        solutions, have no returns to learn from."""
        if not any(sample.returns for sample in mini.samples):
            return None
        values = mini.by_completion(self.head(mini.of_scored(forward.preceding).detach()))
        loss, metrics = value_loss(
            values,
            mini.padded([sample.values for sample in mini.samples]),
            mini.padded([sample.returns for sample in mini.samples]),
            mini.loss_mask,
            num_completion_tokens=work.batch.num_completion_tokens,
        )
        for name, value in metrics.items():
            work.note(name, value)
        return WEIGHT * loss


class ValueHead(nn.Module):
    """Hidden states [..., D] -> values [...], fp32 whatever the policy's precision. Its first values are 0.

    >>> ValueHead(width=4, hidden_size=8)(torch.ones(2, 3, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # drawn apart: a run with a value head samples what one without it would
            last = nn.Linear(hidden_size or width, 1)
            hidden = [nn.Linear(width, hidden_size), nn.GELU()] if hidden_size else []
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*hidden, last)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden.float()).squeeze(-1)


def with_token_advantages(
    batch: TrainingBatch,
    values: Mapping[int, Tensor],  # by sample index, [Lc]: V before each token
    rewards_PG: Sequence[Sequence[float | None]],
    options: ValueOptions,
    *,
    weights_PG: Tensor | None = None,  # of rank_softmax
) -> TrainingBatch:
    """The batch with GAE's advantages, values and returns for every token; the score comes on the last one.

    Advantages are whitened over the step's tokens first, then times the completion's weight. `batch.advantages`
    becomes [P, G, Lc], nested lists.
    """
    samples = {sample.index: sample for row in batch.rows for sample in row.samples}
    if not samples:
        return batch
    group = len(rewards_PG[0])
    rewards = torch.tensor([rewards_PG[i // group][i % group] for i in samples])
    lengths = [len(sample.token_ids) for sample in samples.values()]
    learned = [torch.tensor(sample.sampled or [True] * len(sample.token_ids)) for sample in samples.values()]
    mask = pad_sequence(learned, batch_first=True)  # with False
    values_BT = pad_sequence([values[i].cpu() for i in samples], batch_first=True)
    advantages, returns = gae(outcome_rewards(rewards, mask), values_BT, mask, lam=options.lam)
    counted = mask & torch.tensor([[sample.in_loss] for sample in samples.values()])
    advantages = whiten(advantages, counted)
    if weights_PG is not None:
        advantages = advantages * weights_PG.flatten()[list(samples)][:, None]
    done: dict[int, Sample] = {
        i: replace(
            sample,
            advantage=0.0,
            token_advantages=advantages[b, : lengths[b]].tolist(),
            values=values_BT[b, : lengths[b]].tolist(),
            returns=returns[b, : lengths[b]].tolist(),
        )
        for b, (i, sample) in enumerate(samples.items())
    }
    rows = [replace(row, samples=[done[sample.index] for sample in row.samples]) for row in batch.rows]
    table = [
        [done[g * group + i].token_advantages if g * group + i in done else [] for i in range(group)]
        for g in range(len(rewards_PG))
    ]
    metrics = batch.metrics | explained_variance(values_BT[mask], returns[mask])
    return replace(batch, rows=rows, advantages=table, metrics=metrics)


def explained_variance(values_N: Tensor, returns_N: Tensor) -> dict[str, float]:
    """1 - Var(R - V) / Var(R): 1 for a perfect value function, 0 for a constant one; nothing where Var(R) = 0.

    >>> explained_variance(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 2.0, 4.0]))    # 1 - 1 / 4
    {'value/explained_variance': 0.75}
    """
    variance = wide(returns_N).var(correction=0)
    if variance <= 1e-12:
        return {}
    residual = wide(returns_N - values_N).var(correction=0)
    return {"value/explained_variance": 1.0 - (residual / variance).item()}
