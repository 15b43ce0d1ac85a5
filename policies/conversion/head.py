"""A draft head for a trunk that has none. It starts as the trunk's last layer and can draft before any training.

The last layer turns the residual stream x_n into what predicts token n + 1. A draft head does not have x_n, but the
embedding of token n and the hidden state before it. `eh_proj` is the linear map of these two that is nearest to x_n on
given text (ridge regression with each token weighed by 1 / |x_n|², since the layer norms its input).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from policies.devices import wide
from policies.mtp import MTPHead
from policies.policy import Policy

RIDGE = 1e-3  # of the mean diagonal


@torch.no_grad()
def start_head(
    trunk: DeepseekV3ForCausalLM, windows: Sequence[Tensor], on_window: Callable[[], None] = lambda: None
) -> MTPHead:
    """A draft head of `trunk`, fitted on `windows`, token ids [T] each, T ≥ 2. Nothing in it is random."""
    with torch.random.fork_rng(devices=[]):
        head = MTPHead(trunk.config).to(trunk.device)
    last = trunk.model.layers[-1]
    state = head.block.state_dict()  # without a router of attention heads: a draft head uses all of them
    head.block.load_state_dict({name: tensor for name, tensor in last.state_dict().items() if name in state})
    head.norm.load_state_dict(trunk.model.norm.state_dict())
    seen: list[Tensor] = []
    width = trunk.config.hidden_size
    gram = torch.zeros(2 * width, 3 * width, dtype=torch.float64)
    with last.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("hidden_states", *args)), with_kwargs=True
    ):
        for window in windows:
            ids = window[None].to(trunk.device)
            hidden = trunk.model(ids, use_cache=False).last_hidden_state[0, :-1]
            target = seen.pop()[0, 1:]
            embeddings = trunk.model.embed_tokens(ids)[0, 1:]
            inputs = torch.cat([head.enorm(embeddings), head.hnorm(hidden)], dim=1)
            rows = wide(torch.cat([inputs, target], dim=1))
            rows = (rows / wide(target).norm(dim=1, keepdim=True)).cpu()
            gram += rows[:, : 2 * width].T @ rows
            on_window()
    within, towards = gram[:, : 2 * width], gram[:, 2 * width :]
    diagonal = within.diagonal()
    diagonal += RIDGE * diagonal.mean()
    head.eh_proj.weight.copy_(torch.linalg.solve(within, towards).T)
    return head


def self_written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int = 40, length: int = 128, seed: int = 0
) -> list[Tensor]:
    """Text that `model` samples after a start token, `rows` of `length` tokens [T], for use when no text is given.

    Raises ValueError if the tokenizer has no token to start from.
    """
    start = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), None)
    if start is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token to start a text from; give calibrate=FILE")
    ids = torch.full((rows, 1), start, device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = {"min_new_tokens": length - 1, "max_new_tokens": length - 1}
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **new, **sampling)
    return list(written.cpu())


@torch.no_grad()
def draft_agreement(policy: Policy, windows: Sequence[Tensor]) -> float:
    """The share of tokens whose first draft is the policy's own first choice. Each window [T] is read once."""
    assert policy.mtp is not None
    agreed = total = 0
    for window in windows:
        ids = window[None].to(policy.device)
        positions = torch.arange(len(window), device=policy.device)[None]
        segment = torch.ones_like(ids)
        hidden = policy.hidden(ids, positions, segment)
        before = F.pad(hidden, (0, 0, 1, 0))[:, :-1]
        segment[:, 0] = -1  # the first token has no entry, since nothing precedes it
        (drafts,) = policy.unroll(before, ids, positions, segment, depth=1)
        agree = F.linear(drafts, policy.lm_head).argmax(-1) == F.linear(hidden, policy.lm_head).argmax(-1)
        agreed, total = agreed + int(agree[:, 1:].sum()), total + agree.numel() - 1
    return agreed / total
