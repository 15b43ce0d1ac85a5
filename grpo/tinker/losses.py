"""The losses of Tinker's API by their published formulas. Each is a sum over the tokens of a datum, not a mean.

The formulas: https://tinker-docs.thinkingmachines.ai/tinker/losses. Axes: N tokens of a datum, K targets of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.tinker.wire import Datum, Refused

CLIPS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
Settings = Mapping[str, float]
Inputs = Mapping[str, Tensor]


def cross_entropy(logprobs: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """-Σ w log p. The weights are 0 where nothing is to be learned.

    >>> cross_entropy(torch.tensor([-2.0, -3.0]), {"weights": torch.tensor([0.0, 1.0])}, {})
    tensor(3.)
    """
    return -(logprobs * inputs["weights"]).sum()


def importance_sampling(logprobs: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """-Σ p/q A, with q what sampled.

    >>> sampled = {"logprobs": torch.tensor([-1.0]), "advantages": torch.tensor([2.0])}
    >>> importance_sampling(torch.tensor([-1.0]), sampled, {})
    tensor(-2.)
    """
    return -((logprobs - inputs["logprobs"]).exp() * inputs["advantages"]).sum()


def ppo(logprobs: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """-Σ min(r A, clip(r) A) with r = p/q (Schulman et al., 2017, arXiv 1707.06347, equation 7)."""
    ratio = (logprobs - inputs["logprobs"]).exp()
    return -torch.minimum(ratio * inputs["advantages"], _clip(ratio, settings) * inputs["advantages"]).sum()


def cispo(logprobs: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """-Σ sg(clip(r)) A log p: what is clipped weighs the gradient (MiniMax, 2025, arXiv 2506.13585)."""
    ratio = (logprobs.detach() - inputs["logprobs"]).exp()
    return -(_clip(ratio, settings) * logprobs * inputs["advantages"]).sum()


def dro(logprobs: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """-Σ (log p A - β/2 (log p/q)²): a quadratic penalty for leaving what sampled (arXiv 2405.19107)."""
    penalty = (logprobs - inputs["logprobs"]).square()
    return -(logprobs * inputs["advantages"] - 0.5 * settings["beta"] * penalty).sum()


def gspo(logprobs: Tensor, inputs: Inputs, settings: Settings) -> Tensor:
    """PPO's sum with one ratio for the sequence, the geometric mean over the tokens of `sequence_ratio_mask`; its value
    is every token's, and its gradient is that of the token (Zheng et al., 2025, arXiv 2507.18071, GSPO-token)."""
    log_ratio = (logprobs.detach() - inputs["logprobs"])[inputs["sequence_ratio_mask"] != 0].mean()
    ratio = (log_ratio + logprobs - logprobs.detach()).exp()
    return -torch.minimum(ratio * inputs["advantages"], _clip(ratio, settings) * inputs["advantages"]).sum()


def _clip(ratio: Tensor, settings: Settings) -> Tensor:
    return ratio.clamp(settings["clip_low_threshold"], settings["clip_high_threshold"])


@dataclass(frozen=True)
class Loss:
    """`inputs` are what it reads beside `target_tokens`; `settings` what may be set, with what it is otherwise."""

    of: Callable[[Tensor, Inputs, Settings], Tensor]
    inputs: tuple[str, ...]
    settings: Settings


OF_POLICY = ("logprobs", "advantages")
LOSSES = {
    "cross_entropy": Loss(cross_entropy, ("weights",), {}),
    "importance_sampling": Loss(importance_sampling, OF_POLICY, {}),
    "ppo": Loss(ppo, OF_POLICY, CLIPS),
    "cispo": Loss(cispo, OF_POLICY, CLIPS),
    "dro": Loss(dro, OF_POLICY, {"beta": 0.05}),
    "gspo": Loss(gspo, (*OF_POLICY, "sequence_ratio_mask"), CLIPS),
}
UNPUBLISHED = {
    "stable_reinforce": "its formula is not published; use importance_sampling, ppo, cispo or gspo",
    "custom": "a loss that the server compiles; the SDK runs forward_backward_custom at the client here",
}


def loss_of(name: str, changes: Mapping[str, float | str]) -> tuple[Loss, dict[str, float]]:
    """The loss of this name with its settings. Raises Refused for another name, or a setting that it has not."""
    if name not in LOSSES:
        why = UNPUBLISHED.get(name, f"there is none of this name; use {', '.join(LOSSES)}")
        raise Refused(f"loss_fn={name!r}: {why}")
    loss = LOSSES[name]
    settings = dict(loss.settings)
    for key, value in changes.items():
        if key not in settings or not isinstance(value, int | float):
            known = ", ".join(settings) or "nothing"
            raise Refused(f"loss_fn_config[{key!r}]={value!r}: {name} takes numbers for {known}")
        if not math.isfinite(value):
            raise Refused(f"loss_fn_config[{key!r}]={value}: use a finite number")
        settings[key] = float(value)
    return loss, settings


def check_datum(datum: Datum, place: int, name: str, vocabulary: int, context: int) -> None:
    """Raises Refused for a datum that this loss cannot read, and says where."""
    tokens, targets = len(datum.tokens), datum.inputs.get("target_tokens")
    if not 0 < tokens <= context:
        raise Refused(f"data[{place}].model_input has {tokens} tokens; the context is 1 to {context}")
    if targets is None or targets.is_floating_point() or targets.dim() not in (1, 2) or len(targets) != tokens:
        raise Refused(f"data[{place}]: target_tokens must be int64 of shape [{tokens}] or [{tokens}, K]")
    for what, ids in (("model_input", torch.tensor(datum.tokens)), ("target_tokens", targets)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise Refused(f"data[{place}].{what} has a token outside the vocabulary of {vocabulary}")
    wanted = LOSSES[name].inputs
    if name == "cross_entropy" and "weights" not in datum.inputs:
        datum.inputs["weights"] = torch.ones(targets.shape)
    for key, value in datum.inputs.items():
        if key not in (*wanted, "target_tokens"):
            raise Refused(f"data[{place}].loss_fn_inputs[{key!r}]: {name} reads target_tokens, {', '.join(wanted)}")
        if value.shape != targets.shape:
            raise Refused(f"data[{place}].{key} is {list(value.shape)}, and target_tokens is {list(targets.shape)}")
        if not torch.isfinite(value).all():
            raise Refused(f"data[{place}].{key} has a number that is not finite")
    for key in wanted:
        if key not in datum.inputs:
            raise Refused(f"data[{place}]: {name} reads {key}, which is missing")
    if "sequence_ratio_mask" in wanted and not datum.inputs["sequence_ratio_mask"].any():
        raise Refused(f"data[{place}].sequence_ratio_mask marks no token")
