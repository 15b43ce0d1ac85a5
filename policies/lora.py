"""LoRA through peft, injected in place. Merged weights are new tensors; the base is never written to."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate

from policies import four_bit
from policies.four_bit import is_held, plain_weight
from policies.sharding import Split, gathered, like, release

ADAPTER = "default"

DEFAULT_TARGETS = (
    "q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "k_proj", "v_proj", "o_proj",
    "gate_proj", "up_proj", "down_proj", "experts",
)  # fmt: skip
# Targets that are parameters rather than linear modules, by the ends of their names.
PARAMETERS = {
    "experts": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    "router": ("mlp.gate.weight",),
    "head_router": ("self_attn.gate.weight",),
}
HEAD = "mtp"


def inject(
    trunk: nn.Module, rank: int, alpha: float, targets: Sequence[str] | None = None, head: nn.Module | None = None
) -> None:
    """Freeze `trunk` and add adapters to the named modules of it, or without `targets` to every default one it has.

    "experts" and "router" mean the 3-D parameters of the routed experts and the routers' weights, "head_router" those
    of dynamic heads. "mtp" freezes the draft head too and adapts all of it: linear layers, experts, and the router if
    "router" is named too. Without "mtp" the draft head stays fully trainable. As peft starts B at zero, the first step
    changes B alone.

    Raises ValueError, which names a target that matches nothing and the nearest names, or where nothing can be adapted.

    >>> inject(policy.trunk, 8, 16.0, ["o_proj", "experts", "router", "mtp"], policy.mtp)
    """
    available = target_names(trunk) | ({HEAD} if head is not None else set())
    defaults = [target for target in DEFAULT_TARGETS if target in available]
    defaults = defaults or sorted(target_names(trunk.get_decoder()))  # GPT-NeoX and others have other names
    names = defaults if targets is None else list(targets)
    if not names:  # GPT-2, whose layers are convolutions in name
        raise ValueError("lora.rank: this policy has no linear layer that an adapter could be added to; leave lora out")
    for target in names:
        if target not in available:
            near = difflib.get_close_matches(target, available, n=3) or sorted(available)
            near = ["router", *near] if target == "gate" and "router" in available else near
            raise ValueError(f"lora.targets: {target!r} matches no module of this policy; it has {', '.join(near)}")
    if "lm_head" in names and getattr(trunk.config, "tie_word_embeddings", False):
        raise ValueError("lora.targets: 'lm_head' is also the embedding of this policy, which has no adapter; drop it")
    if set(names) == {HEAD}:
        raise ValueError("lora.targets: 'mtp' alone leaves the trunk nothing to learn with; name targets of it as well")
    _adapt(trunk, rank, alpha, [target for target in names if target != HEAD])
    if head is not None and HEAD in names:
        _adapt(head, rank, alpha, [target for target in target_names(head) if target != "router" or target in names])


def target_names(model: nn.Module) -> set[str]:
    """The names that `lora.targets` may hold: last names of linear modules of `model`, and keys of PARAMETERS."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target, ends in PARAMETERS.items():
        if any(name.endswith(ends) for name, _ in model.named_parameters()):
            names.add(target)
    return names


def _adapt(model: nn.Module, rank: int, alpha: float, targets: Collection[str]) -> None:
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=sorted(target for target in targets if target not in PARAMETERS),
        target_parameters=[name for target, names in PARAMETERS.items() if target in targets for name in names] or None,
    )
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        config._register_custom_module({nn.Linear: _Whole})
    holder = nn.ModuleList([model])
    holder.is_loaded_in_4bit = any(is_held(parameter) for parameter in model.parameters())  # peft asks for it
    # For a DeepSeek-V3 model peft takes gate_proj, up_proj and down_proj as the routed experts alone, so that the dense
    # and shared ones would get no adapter. Inside a plain container it takes the names as they are.
    inject_adapter_in_model(config, holder, adapter_name=ADAPTER)
    for name, layer in adapters(model):
        base = getattr(layer.get_base_layer(), "weight", None)
        if base is not None and is_held(base):  # beside codes peft leaves them in fp32
            for part in (layer.lora_A, layer.lora_B):
                part.to(base.quant_state.dtype)
        for part in _sharded(layer, whole_output=name == "lm_head"):
            part.register_hook(lambda grad: grad * model._tp_size)  # it is summed over more ranks than other gradients


class _Whole(Linear):
    """A and B for the whole of a weight that is sharded. peft would make them for the part of this rank."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features


def _sharded(layer: LoraLayer, whole_output: bool) -> list[Tensor]:
    """Let an adapter compute on its rank's part of a weight that tensor or expert parallel splits.

    A and B are whole on every rank, so nothing else has to know. Returns those of them whose gradient on one rank is a
    part of a sum over the ranks.
    """
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        split = Split.of(layer.get_param())
        return _adapt_parameter(layer, base, split) if split or isinstance(base, FSDPModule) else []
    split = Split.of(base.weight)
    return [] if split is None or whole_output else _adapt_linear(layer, split)


def _adapt_linear(layer: LoraLayer, split: Split) -> list[Tensor]:
    def writes_a_part(x: Tensor) -> Tensor:  # of the output, by rows of B; the gradient of x is a sum over the ranks
        x = DTensor.from_local(x, split.mesh, [Replicate()]).to_local(grad_placements=[Partial()])
        return F.linear(x, split.part(module.weight))

    def reads_a_part(x: Tensor) -> Tensor:  # of the input, by columns of A; the output is a sum over the ranks
        x = F.linear(x, split.part(module.weight))
        return DTensor.from_local(x, split.mesh, [Partial()]).redistribute(placements=[Replicate()]).to_local()

    rows = split.placement.dim == 0
    module = (layer.lora_B if rows else layer.lora_A)[ADAPTER]
    module.forward = writes_a_part if rows else reads_a_part
    return [module.weight]


def _adapt_parameter(layer: ParamWrapper, base: nn.Module, split: Split | None) -> list[Tensor]:
    """Routed experts and routers get W + ΔW inside their forward, where FSDP has gathered W; experts that are split
    compute with local tensors there."""
    name, forward = layer.parameter_name, base.forward

    def adapted(*inputs: Any) -> Any:
        weight = base._parameters[name]
        if layer.disable_adapters:
            return forward(*inputs)
        if split:  # [E, out, r] and [E, r, in], where the weight is [E, out, in]
            lhs, rhs, scale = layer.get_delta_factors(ADAPTER)
            parts = split.part(lhs, whole=2), split.part(rhs, whole=1)
            base._parameters[name] = torch.baddbmm(weight.to_local(), *parts, alpha=scale)
        else:
            base._parameters[name] = weight + layer.get_delta_weight(ADAPTER)
        try:
            return forward(*inputs)
        finally:
            base._parameters[name] = weight

    base.forward = adapted
    layer._activate_lora = lambda active: nullcontext()
    return [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight] if split else []


def adapters(model: nn.Module) -> Iterable[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def has_adapter(model: nn.Module) -> bool:
    return next(iter(adapters(model)), None) is not None


def effective_weight(module: nn.Module) -> Tensor:
    """The weight that `module` computes with: W + ΔW if it has an adapter that is on. Differentiable."""
    if not isinstance(module, LoraLayer):
        return gathered(module)
    base = plain_weight(gathered(module.get_base_layer()))
    return base if module.disable_adapters else base + module.get_delta_weight(ADAPTER)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Lets the model compute with its base weights alone: the reference policy of a LoRA run."""
    layers = [layer for _, layer in adapters(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight as it is published: A [E r, in] and B [out, E r] for E experts, 1 for a plain matrix.

    `transposed`: the weights of the experts are [in, out] each, and not [out, in].
    """

    a: Tensor
    b: Tensor
    scale: float
    experts: int = 1
    transposed: bool = False

    @torch.no_grad()
    def merge(self, base: Tensor) -> Tensor:
        """W + ΔW as a new tensor, in the precision of W; to the bit what peft's own layer would add."""
        base = plain_weight(base)
        a, b, dtype = self.a, self.b, self.b.dtype
        if self.experts > 1:
            a = a.reshape(self.experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, self.experts)
            delta = torch.einsum("o r e, e r i -> e i o" if self.transposed else "o r e, e r i -> e o i", b, a)
            delta = delta * self.scale
        elif b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            delta = (b.float() @ a.float() * self.scale).to(dtype)
        else:
            delta = b @ a * self.scale
        return base + like(delta.to(base.dtype), base)


def unmerged_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """The state dict of `model` under its names without adapters, and by these names the adapters of its weights.

    A weight in 4 bits is there as it is; `plain_weight` gives its numbers.
    """
    release(model)

    def plain(name: str) -> str:
        return name.replace(".base_layer", "")

    names = {id(parameter): plain(name) for name, parameter in model.named_parameters()}
    by_name = {}
    for _, layer in adapters(model):
        of_parameter = isinstance(layer, ParamWrapper)
        base = getattr(layer.get_base_layer(), layer.parameter_name if of_parameter else "weight")
        by_name[names[id(base)]] = Adapter(
            layer.lora_A[ADAPTER].weight.detach(),
            layer.lora_B[ADAPTER].weight.detach(),
            layer.scaling[ADAPTER],
            layer.num_experts if of_parameter else 1,
            of_parameter and not layer._did_swap_in_out_features,
        )
    state = four_bit.state_of(model)
    return {plain(name): tensor for name, tensor in state.items() if ".lora_" not in name}, by_name


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have if W + ΔW were its weights, under its names without adapters.

    peft's merge and unmerge in place drift by rounding; here the base is only read.
    """
    state, by_name = unmerged_state(model)
    return {name: by_name[name].merge(t) if name in by_name else plain_weight(t) for name, t in state.items()}
