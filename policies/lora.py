"""LoRA through peft, injected in place. Merged weights are new tensors; the base is never written to."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from policies import four_bit
from policies.four_bit import is_held, plain_weight
from policies.sharding import Split, gathered, like, release

ADAPTER = "default"

HEAD = "mtp"
OWN_READING = r"self\.{}\.weight(?: @|\.(?!shape|dtype|device|data)\w+\()"  # in the code of the module around a layer
ASIDE = ("vision", "visual", "image", "audio", "speech", "pooler")  # in the decoder of some models, but not for text
BY_NAME = "adapted where `{}` is a target"
READ = "the module around it reads the weight itself"
INDEXER = "what an indexer chooses has no gradient"
SHARED = "its weight is another layer's too"
CONVOLUTION, OTHER = "a convolution", "no linear layer"


@dataclass(frozen=True)
class Matrix:
    """A matrix of a model, or a stack of them, and where its adapter would go.

    `parameter` is its name in `module`, and empty for a linear layer, which is adapted as a module. `targets` are the
    names by which `lora.targets` means it. `why_not`: why it has no adapter by default; empty where it has one.
    """

    module: str
    parameter: str
    numbers: int
    targets: tuple[str, ...]
    why_not: str


def matrices(model: nn.Module) -> Iterator[Matrix]:
    """The matrices of `model` without adapters and without its embeddings, by structure: what a router, an expert or a
    linear layer is called differs in every architecture."""
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        for parameter, weight in module.named_parameters(recurse=False):
            if weight.dim() < 2 or parameter.endswith("bias") or isinstance(module, nn.Embedding):
                continue
            path = name.split(".")
            last = path[-1]
            linear = isinstance(module, nn.Linear | Conv1D) and parameter == "weight"
            targets: tuple[str, ...] = (last,) if linear else ()
            why_not = ""
            if any(part == "gate" or "router" in part for part in path):
                targets = ("head_router" if "self_attn" in path else "router", *targets)
                why_not = BY_NAME.format(targets[0])
            elif any("indexer" in part for part in path):
                targets, why_not = (), INDEXER
            elif uses[id(weight)] > 1:
                targets, why_not = (), SHARED
            elif getattr(module, "out_features", 0) == 1:
                why_not = BY_NAME.format(last)
            elif linear and _is_read(model.get_submodule(name.rpartition(".")[0]), last):
                targets, why_not = (), READ
            elif not linear and weight.dim() == 3 and "expert" in f"{name} {type(module).__name__}".lower():
                targets = ("experts",)
            elif not linear:
                why_not = CONVOLUTION if isinstance(module, _ConvNd) else OTHER
            yield Matrix(name, "" if linear and _is_plain(module) else parameter, weight.numel(), targets, why_not)


def _is_plain(layer: nn.Module) -> bool:
    """Tells whether this computes x W. Some models have linear layers that compute something else."""
    own = type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
    return not (own and type(layer).__module__.startswith("transformers.models."))


def _is_read(around: nn.Module, name: str) -> bool:
    """Whether a module of transformers reads the weight of a linear layer that it has, past an adapter."""
    form: type = type(around)
    own = form.__module__.startswith("transformers.models.")
    return own and re.search(OWN_READING.format(re.escape(name)), _source(form)) is not None


@functools.cache
def _source(form: type) -> str:
    return inspect.getsource(form)


def inject(
    trunk: nn.Module, rank: int, alpha: float, targets: Sequence[str] | None = None, head: nn.Module | None = None
) -> None:
    """Freeze `trunk` and add adapters to the named modules of it, or without `targets` to every linear layer of its
    decoder and every stack of experts.

    "experts" and "router" mean the 3-D parameters of the routed experts and the routers' weights, "head_router" those
    of dynamic heads. "mtp" freezes the draft head too and adapts all of it: linear layers, experts, and the router if
    "router" is named too. Without "mtp" the draft head stays fully trainable. As peft starts B at zero, the first step
    changes B alone.

    Raises ValueError, which names a target that matches nothing and the nearest names.

    >>> inject(policy.trunk, 8, 16.0, ["o_proj", "experts", "router", "mtp"], policy.mtp)
    """
    _adapt(trunk, rank, alpha, _chosen(trunk, targets, head))
    if head is not None and targets is not None and HEAD in targets:
        routed = "router" in targets
        _adapt(head, rank, alpha, [each for each in matrices(head) if routed or "router" not in each.targets])


def _chosen(trunk: nn.Module, targets: Sequence[str] | None, head: nn.Module | None) -> list[Matrix]:
    there, everything = _of_decoder(trunk)
    if targets is None:
        return [each for each in there if not each.why_not]
    if "lm_head" in targets and getattr(trunk.config, "tie_word_embeddings", False):
        raise ValueError("lora.targets: 'lm_head' is also the embedding of this policy, which has no adapter; drop it")
    available = {target for each in everything for target in each.targets} | ({HEAD} if head is not None else set())
    for target in targets:
        if target not in available:
            near = difflib.get_close_matches(target, available, n=3) or sorted(available)
            near = ["router", *near] if target == "gate" and "router" in available else near
            raise ValueError(f"lora.targets: {target!r} matches no module of this policy; it has {', '.join(near)}")
    if not set(targets) - {HEAD}:
        named = "'mtp' alone" if targets else "an empty list"
        raise ValueError(f"lora.targets: {named} leaves the trunk nothing to learn with; name targets of it as well")
    return [each for each in everything if set(each.targets) & set(targets)]


def _of_decoder(trunk: nn.Module) -> tuple[list[Matrix], list[Matrix]]:
    """The matrices of the decoder, and these and the LM head's. Some models call themselves their decoder."""
    lm_head = trunk.get_output_embeddings()
    decoder = trunk.get_decoder()
    decoder = trunk.base_model if decoder is lm_head else decoder  # ModernBERT calls its LM head its decoder
    inside = {id(module) for module in decoder.modules()} - {id(lm_head)}
    place = {name: id(module) for name, module in trunk.named_modules() if not any(part in name for part in ASIDE)}
    everything = [each for each in matrices(trunk) if place.get(each.module) in inside | {id(lm_head)}]
    return [each for each in everything if place[each.module] in inside], everything


def reach(trunk: nn.Module, targets: Sequence[str] | None = None) -> tuple[float, dict[str, str]]:
    """The share of the decoder's matrices, embeddings apart, that `inject` would put adapters on, and the names of the
    others with the reason. The trunk has no adapters yet.

    >>> reach(policy.trunk, ["q_proj", "o_proj", "experts"])[1]
    {'gate_proj': 'not among lora.targets', 'mlp.gate': 'adapted where `router` is a target', ...}
    """
    there, _ = _of_decoder(trunk)
    chosen = set(_chosen(trunk, targets, trunk))  # whether there is a draft head changes nothing
    left: dict[str, str] = {}
    for each in there:
        if each not in chosen:
            path = f"{each.module}.{each.parameter}".removesuffix(".").removesuffix(".weight").split(".")
            name = ".".join([part for part in path if not part.isdigit()][-2:])
            left[name] = each.why_not or "not among lora.targets"
    return sum(each.numbers for each in there if each in chosen) / sum(each.numbers for each in there), left


def reach_in_words(share: float, left: dict[str, str]) -> str:
    """What `reach` gives, in a line.

    >>> reach_in_words(0.991, {"mamba.conv1d": "a convolution"})
    '99.1% of the matrices of the trunk; not mamba.conv1d (a convolution)'
    """
    names: dict[str, list[str]] = {}
    for name, why_not in left.items():
        names.setdefault(why_not, []).append(name)
    rest = ", ".join(f"{', '.join(each)} ({why_not})" for why_not, each in names.items())
    return f"{share:.1%} of the matrices of the trunk" + (f"; not {rest}" if rest else "")


def _adapt(model: nn.Module, rank: int, alpha: float, chosen: Collection[Matrix]) -> None:
    layers = [each.module for each in chosen if not each.parameter]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=[f"0.{name}" for name in layers],
        target_parameters=[f"0.{each.module}.{each.parameter}" for each in chosen if each.parameter] or None,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in layers),
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

    def adapted(*inputs: object) -> Tensor:
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

    `transposed`: the weight, or that of each expert, is [in, out] and not [out, in].
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
        if self.transposed and self.experts == 1:
            delta = delta.T
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
            getattr(layer, "fan_in_fan_out", False)
            or (of_parameter and layer.num_experts > 1 and not layer._did_swap_in_out_features),
        )
    state = four_bit.state_of(model)
    return {plain(name): tensor for name, tensor in state.items() if ".lora_" not in name}, by_name


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that the model would have if W + ΔW were its weights, under its names without adapters.

    peft's merge and unmerge in place drift by rounding; here the base is only read.
    """
    state, by_name = unmerged_state(model)
    return {name: by_name[name].merge(t) if name in by_name else plain_weight(t) for name, t in state.items()}
