"""What a checkpoint keeps of a learner, and how it comes back to the same bits (contract 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from grpo.learner.learner import Learner

Tensors = dict[str, dict[str, Tensor]]


def take(learner: Learner) -> tuple[Tensors, dict]:
    """Trained parameters (adapters as they are, masters for bf16), AdamW's moments, reference, value head, counters."""
    policy, masters = learner.policy, learner.masters
    trained = {n: masters.of(p).detach() for n, p in policy.named_parameters() if p.requires_grad}
    buffers = {n: b for n, b in policy.named_buffers() if n.endswith("e_score_correction_bias")}
    names = {id(masters.of(p)): n for n, p in _named_parameters(learner).items()}
    moments = {
        f"{names[id(p)]}/{key}": value for p, state in learner.optimizer.state.items() for key, value in state.items()
    }
    tensors = {"policy": trained | buffers, "optimizer": moments}
    if learner.reference is not None:
        tensors["reference"] = dict(learner.reference.named_parameters())
    if learner.value_head is not None:
        tensors["value"] = {n: p.detach() for n, p in learner.value_head.named_parameters()}
    return tensors, {"policy_version": learner.policy_version, "skipped_in_a_row": learner.skipped_in_a_row}


@torch.no_grad()
def put(learner: Learner, tensors: Tensors, state: dict) -> None:
    """The inverse of `take`. Raises ValueError naming what does not fit this learner; then nothing was changed."""
    policy, masters = learner.policy, learner.masters
    own = _named_parameters(learner) | dict(policy.named_buffers())
    wrong = [f"{n} {list(t.shape)}" for n, t in tensors["policy"].items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise ValueError(f"the checkpoint is of another policy: {wrong[:5]} do not fit; check model and lora")
    lacking = [n for n, p in policy.named_parameters() if p.requires_grad and n not in tensors["policy"]]
    if lacking:
        raise ValueError(f"the checkpoint is of another policy: it lacks {lacking[:5]}; check model and lora")
    for part, module, option in (
        ("reference", learner.reference, "loss.beta"),
        ("value", learner.value_head, "loss.advantage"),
    ):
        shapes = {n: p.shape for n, p in module.named_parameters()} if module is not None else {}
        if shapes != {n: t.shape for n, t in tensors.get(part, {}).items()}:
            raise ValueError(
                f"the checkpoint's {part} tensors are not those of this run; resume with the {option} (and value "
                "options) that it had, or start a new run from its policy"
            )
        for name, parameter in module.named_parameters() if module is not None else ():
            parameter.copy_(tensors[part][name])
    for name, tensor in tensors["policy"].items():
        masters.of(own[name]).copy_(tensor)
    masters.write_back()
    for name, value in tensors["optimizer"].items():
        owner, key = name.rsplit("/", 1)
        moved = masters.of(own[owner])
        learner.optimizer.state[moved][key] = value.to(moved.device, copy=True)
    learner.policy_version = state["policy_version"]
    learner.skipped_in_a_row = state["skipped_in_a_row"]


def _named_parameters(learner: Learner) -> dict[str, nn.Parameter]:
    """Those of the policy, and of the value head under `value.`."""
    named = dict(learner.policy.named_parameters())
    if learner.value_head is not None:
        named |= {f"value.{name}": parameter for name, parameter in learner.value_head.named_parameters()}
    return named
