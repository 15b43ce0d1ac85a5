"""Does a model that we did not write compute what we rely on? Five tokens and their continuations tell."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from grpo.learner.batch import PackedRow, Sample, collate
from policies.logprobs import token_logprobs
from policies.policy import Policy, PolicyError
from rollout.group import Prompt
from rollout.sampling import SamplingParams

RESCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}  # of a log-probability; what is really wrong is off by more


@torch.no_grad()
def check_agreement(policy: Policy) -> None:
    """Sampler, learner and the model's own forward must give the same log-probabilities.

    A model whose logits are not LM head · hidden state, whose positions do not follow `position_ids` or which has
    something else than attention under our mask would be trained on numbers that are not its own. Raises PolicyError
    naming the model type.
    """
    kind = policy.config.model_type
    if policy.trunk.get_output_embeddings() is None:
        raise _refusal(kind, "it has no LM head")
    refuse_rescaled(policy.config)
    dtype = next(policy.parameters()).dtype
    try:
        sampled, packed, plain = _three_ways(policy, dtype)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise _refusal(kind, f"{type(error).__name__}: {error}") from error
    for name, got in (("sampler", sampled), ("learner", packed)):
        difference = (got - plain).abs().max().item()
        if not difference <= TOLERANCE[dtype]:
            raise _refusal(
                kind, f"the {name} computes other log-probabilities than its own forward, by {difference:.1g}"
            )


def refuse_rescaled(shape: PretrainedConfig) -> None:
    """Raises PolicyError where logits are made of LM head · hidden state by a further step."""
    if scaled := [name for name in RESCALED if getattr(shape, name, None) not in (None, 1.0)]:
        value = getattr(shape, scaled[0])
        raise _refusal(shape.model_type, f"its logits are not LM head · hidden state ({scaled[0]}={value})")


def _refusal(kind: str, reason: str) -> PolicyError:
    return PolicyError(
        f"a model of type {kind!r} cannot be trained here: {reason}. Llama, Qwen, Mistral, OLMo and their kin can; "
        "so can a DeepSeek-V3 model"
    )


def _three_ways(policy: Policy, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of sampled tokens by the engine, by the learner's packed row, and by the model itself."""
    from rollout.engine import Engine

    prompt = list(range(2, 7))
    params = SamplingParams(group_size=2, max_completion_tokens=4)
    [group] = Engine(policy, dtype).sample([Prompt("agreement", "", prompt)], params)
    ids = [completion.token_ids for completion in group.completions]
    sampled = torch.tensor([value for completion in group.completions for value in completion.logprobs])

    mini = collate([PackedRow(prompt, [Sample(i, tokens) for i, tokens in enumerate(ids)])], policy.device)
    hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
    preceding = hidden.gather(1, mini.before[..., None].expand_as(hidden))[mini.scored]
    packed = token_logprobs(preceding @ policy.lm_head.T, mini.token_ids[mini.scored])

    rows = torch.tensor([prompt + tokens for tokens in ids], device=policy.device)
    logits = policy.trunk(input_ids=rows, use_cache=False).logits[:, len(prompt) - 1 : -1]
    plain = token_logprobs(logits, rows[:, len(prompt) :]).flatten()
    return sampled, packed.cpu(), plain.cpu()
