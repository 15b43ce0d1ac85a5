"""Twins: to each completion another one that differs from it, so that no group says the same twice.

A is sampled. Its twin B is a sample of the policy given that it is not A: it leaves A at token t with probability
∏ π(a_s) · (1 − π(a_t)), s < t, which the log-probabilities of A say, begins there with another token than a_t, and is
sampled from there on. With R their rewards

    (1 − π(A)) · ½ (R(A) − R(B)) · (∇ log π(A) − ∇ log π(B))

is the policy gradient without bias: a pair of independent samples has it too (leave one out, G = 2), is the same twice
with probability π(A), and has the rest of its mass exactly where B is.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from grpo.algorithm.dynamic_sampling import Drawn
from rollout.group import Completion, Prompt, RolloutGroup

PAIRS = 128  # of a step: as many completions as 32 groups of 8
OPTIONS: dict[str, object] = {"prompts_per_step": PAIRS}


def draw(session: Any, step: int) -> tuple[Drawn, list[list[list[float]]]]:
    """A pair for each prompt of a step, and the advantages of its tokens."""
    groups = session.sample(session.prompts(step), step=step, group_size=1)
    leaves = [leaving(group.completions[0].logprobs, noise(session, step, group.prompt)) for group in groups]
    pairs, weights = with_twins(session, step, groups, leaves)
    scores = session.score(pairs)
    by_token = [
        advantages(pair, score.rewards, at, weight)
        for pair, score, (at, _), weight in zip(pairs, scores, leaves, weights, strict=True)
    ]
    return Drawn(pairs, scores, [0] * len(pairs)), by_token


def noise(session: Any, step: int, prompt: Prompt) -> random.Random:
    return random.Random(f"{session.config.seed}/{step}/{prompt.prompt_id}")


def leaving(logprobs: Sequence[float], rng: random.Random) -> tuple[int, float]:
    """Where a twin leaves a completion of these log-probabilities, and 1 − π of the completion.

    >>> leaving([math.log(0.5), math.log(0.25)], random.Random(0))    # 1/2 at the first, 1/2 · 3/4 at the second
    (1, 0.875)
    """
    before, shares = 1.0, []
    for logprob in logprobs:
        shares.append(-math.expm1(logprob) * before)
        before *= math.exp(logprob)
    if sum(shares) <= 0:
        return len(logprobs) - 1, 0.0
    [at] = rng.choices(range(len(shares)), shares)
    return at, 1 - before


def with_twins(
    session: Any, step: int, groups: Sequence[RolloutGroup], leaves: Sequence[tuple[int, float]]
) -> tuple[list[RolloutGroup], list[float]]:
    tokenizer, stops = session.policy.tokenizer, session.policy.stop_token_ids
    limit = session.config.rollout.max_completion_tokens
    begun = beginnings(session, step, groups, [at for at, _ in leaves])
    going = [i for i, (ids, _) in enumerate(begun) if ids[-1] not in stops and len(ids) < limit]
    prompts = []
    for i in going:
        prompt = groups[i].prompt
        ids = [*prompt.token_ids, *begun[i][0]]
        prompts.append(Prompt(prompt.prompt_id, prompt.text, ids, prompt.columns, first_sample=1))
    rests = dict(zip(going, session.sample(prompts, step=step, group_size=1), strict=True)) if prompts else {}
    pairs = []
    for i, (group, (ids, logprobs)) in enumerate(zip(groups, begun, strict=True)):
        reason = "stop" if ids[-1] in stops else "length"
        version = group.completions[0].policy_version
        if i in rests:
            rest = rests[i].completions[0]
            ids, logprobs = [*ids, *rest.token_ids][:limit], [*logprobs, *rest.logprobs][:limit]
            reason = rest.finish_reason if len(ids) == len(begun[i][0]) + len(rest.token_ids) else "length"
        shown = ids[:-1] if reason == "stop" else ids
        text = tokenizer.decode(shown, skip_special_tokens=True)
        twin = Completion(ids, logprobs, text, reason, version)
        pairs.append(RolloutGroup(group.prompt, [group.completions[0], twin]))
    return pairs, [weight for _, weight in leaves]


@torch.no_grad()
def beginnings(
    session: Any, step: int, groups: Sequence[RolloutGroup], places: Sequence[int]
) -> list[tuple[list[int], list[float]]]:
    """The tokens of each twin up to the first that is its own, and their log-probabilities."""
    policy, temperature = session.policy, session.config.rollout.temperature
    rows, ends = [], []
    for group, at in zip(groups, places, strict=True):
        read = [*group.prompt.token_ids, *group.completions[0].token_ids[:at]]
        rows.append(torch.tensor(read))
        ends.append(len(read) - 1)
    ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor(ends)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    segments = torch.where(positions <= lengths[:, None], 1, -1)
    hidden = policy.hidden(ids, positions, segments)[torch.arange(len(ids)), lengths]
    logprobs = (policy.output.logits(hidden).float() / temperature).log_softmax(-1)
    begun = []
    for group, at, row in zip(groups, places, logprobs, strict=True):
        one = group.completions[0]
        others = row.exp()
        others[one.token_ids[at]] = 0.0
        rng = noise(session, step, group.prompt)
        rng.random()
        [token] = rng.choices(range(len(others)), others.tolist())
        begun.append(([*one.token_ids[:at], token], [*one.logprobs[:at], row[token].item()]))
    return begun


def advantages(pair: RolloutGroup, rewards: Sequence[float | None], at: int, weight: float) -> list[list[float]]:
    """Â of the tokens of both: ± weight · (R(A) − R(B)) / 2 from where they part; before it they cancel.

    >>> one, twin = (Completion([1, last], [], "", "stop", 0) for last in (2, 3))
    >>> advantages(RolloutGroup(Prompt("a", "", []), [one, twin]), [1.0, 0.0], at=1, weight=0.5)
    [[0.0, 0.25], [0.0, -0.25]]
    """
    half = weight * ((rewards[0] or 0.0) - (rewards[1] or 0.0)) / 2
    first, second = (len(completion.token_ids) for completion in pair.completions)
    return [[0.0] * at + [half] * (first - at), [0.0] * at + [-half] * (second - at)]
