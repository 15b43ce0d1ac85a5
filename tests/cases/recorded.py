"""Groups and their scores as a run would have recorded them."""

import torch

from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup


def groups_of(count: int, seed: int = 5, experts: int = 0) -> tuple[list[RolloutGroup], list[GroupScore]]:
    """`count` groups of three. With `experts`, two of them are recorded for every token of one MoE layer."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 100, (length,), generator=generator).tolist()

    def routing(length: int) -> torch.Tensor | None:
        chosen = [torch.randperm(experts, generator=generator)[:2] for _ in range(length if experts else 0)]
        return torch.stack(chosen)[:, None] if chosen else None

    groups, scores = [], []
    for p in range(count):
        completions = []
        for g in range(3):
            tokens = ids(3 + (5 * p + 3 * g) % 8)
            logprobs = [-2.0 - 0.01 * g] * len(tokens)
            completions.append(Completion(tokens, logprobs, "", "stop", 0, routing=routing(len(tokens))))
        prompt = Prompt(str(p), "", ids(6 + p), {})
        groups.append(RolloutGroup(prompt, completions, prompt_routing=routing(len(prompt.token_ids))))
        scores.append(GroupScore([0.3 * p, 1.0, 0.1], {}))
    return groups, scores
