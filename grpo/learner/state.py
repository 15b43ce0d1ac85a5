"""What a checkpoint keeps of a learner, and how it comes back to the same bits (contract 9)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import CODES, SCALE
from policies.policy import Policy
from policies.sharding import like, release

Tensors = dict[str, dict[str, Tensor]]


# Parts of a checkpoint that are not for `modules`: a draft vocabulary, and what was sampled ahead.
OTHERS = {"policy", "optimizer", "draft", "ahead"}


def collect_tensors(
    policy: Policy, masters: MasterWeights, optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module]
) -> Tensors:
    """Trained parameters (adapters as they are, masters for bf16), AdamW's moments (in 8 bits codes and scales), and
    the weights of `modules`, such as the reference or a value head, by name."""
    release(policy)
    trained = {n: masters.of(p).detach() for n, p in policy.named_parameters() if p.requires_grad}
    buffers = {n: b for n, b in policy.named_buffers() if n.endswith("e_score_correction_bias")}
    parts = _whole
    if hasattr(optimizer, "block_size"):
        from grpo.learner.eight_bit import parts
    names = {id(masters.of(p)): n for n, p in _named_parameters(policy, modules).items()}
    moments = {
        f"{names[id(p)]}/{key}{end}": part
        for p, state in optimizer.state.items()
        for key, value in state.items()
        for end, part in parts(value).items()
    }
    tensors = {"policy": trained | buffers, "optimizer": moments}
    for part, module in modules.items():
        tensors[part] = {n: p.detach() for n, p in module.named_parameters()}
    return tensors


def _whole(moment: Tensor) -> dict[str, Tensor]:
    return {"": moment}


@torch.no_grad()
def put(
    tensors: Mapping[str, Mapping[str, Tensor]],
    policy: Policy,
    masters: MasterWeights,
    optimizer: torch.optim.Optimizer,
    modules: Mapping[str, nn.Module],
) -> None:
    """The inverse of `collect_tensors`. Raises ValueError naming what does not fit; then nothing was changed."""
    release(policy)
    now = _named_parameters(policy, modules) | dict(policy.named_buffers())
    wrong = [f"{n} {list(t.shape)}" for n, t in tensors["policy"].items() if n not in now or now[n].shape != t.shape]
    if wrong:
        raise ValueError(f"the checkpoint is of another policy: {wrong[:5]} do not fit; check model and lora")
    lacking = [n for n, p in policy.named_parameters() if p.requires_grad and n not in tensors["policy"]]
    if lacking:
        raise ValueError(f"the checkpoint is of another policy: it lacks {lacking[:5]}; check model and lora")
    in_8_bits = hasattr(optimizer, "block_size")
    if not in_8_bits and any(name.endswith(CODES) for name in tensors["optimizer"]):
        raise ValueError("the checkpoint's moments have 8 bits; resume with learner.optimizer: adamw_8bit")
    for part in sorted({*modules, *tensors} - OTHERS):
        parameters = dict(modules[part].named_parameters()) if part in modules else {}
        saved = tensors.get(part, {})
        if {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in saved.items()}:
            raise ValueError(
                f"the checkpoint's {part} tensors are not those of this run; resume with the loss options that it had "
                "(loss.beta, loss.advantage, value), or start a new run from its policy"
            )
        for name, parameter in parameters.items():
            parameter.copy_(like(saved[name], parameter))
    put_weights(tensors["policy"], policy, masters)
    optimizer.state.clear()  # a checkpoint from before the first update has no moments
    for name, value in tensors["optimizer"].items():
        owner, key = name.removesuffix(CODES).rsplit("/", 1)
        moved = masters.of(now[owner])
        if key.endswith(SCALE):
            continue  # it was read with its codes
        if in_8_bits and key != "step":
            scale = tensors["optimizer"][f"{owner}/{key}{SCALE}"] if name.endswith(CODES) else None
            from grpo.learner.eight_bit import moment_of

            optimizer.state[moved][key] = moment_of(optimizer, moved, key == "exp_avg", value, scale)
            continue
        value = like(value, moved) if value.shape == moved.shape else value
        optimizer.state[moved][key] = value.to(moved.device, copy=True)


@torch.no_grad()
def put_weights(weights: Mapping[str, Tensor], policy: Policy, masters: MasterWeights) -> None:
    """The policy takes the weights that `collect_tensors` gives under "policy"."""
    release(policy)
    now = dict(policy.named_parameters()) | dict(policy.named_buffers())
    for name, tensor in weights.items():
        moved = masters.of(now[name])
        moved.copy_(like(tensor, moved))
    masters.write_back()


def _named_parameters(policy: Policy, modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The policy's parameters, and those of modules under names such as `value.layers.0.weight`."""
    named = dict(policy.named_parameters())
    for part, module in modules.items():
        named |= {f"{part}.{name}": parameter for name, parameter in module.named_parameters()}
    return named
