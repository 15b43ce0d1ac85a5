"""Memory of a run by device, from its configuration alone: models are built without storage, no weight is loaded.

These are exact to the byte: weights (codes and scales of a base in 4 bits), fp32 copies, gradients, moments,
reference, teacher, the sampler and its derived tensors, W + ΔW. What a rank holds of a sharded learner is in shares.py.
These are rough, to a third or so:

    activations   each token keeps, for the backward pass, the input and the output of every linear module and of the
                  experts that it uses, and of every norm its fp32 input, that normalised, and the result; with
                  gradient checkpointing the input of every layer and all this for one layer. Also the attention mask of
                  rows up to 2,048 tokens, one tile of logits in four copies, and a gradient of the LM head.
    rollout       latents of all rows at full length, and the logits of one forward; prompts are not counted
    host          whole policies that are built in main memory before they are moved to a device, and what
                  a worker that has left its device keeps there

These are not counted: what torch itself needs (about 0.4 GiB a process, with CUDA 0.5 GiB on the device), fragmentation
(leave a fifth free), reward models, the evaluation of `quartet sft`, weights on their way to Ray workers, a compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, PretrainedConfig

from grpo.cli.commands.memory_table import SFT_STAGE, DeviceMemory, each_of, on_devices
from grpo.cli.commands.shares import Shares, largest_bytes, moment_bytes
from grpo.config.mtp import HeadOptions, MtpConfig
from grpo.config.policy import ModelOptions
from grpo.config.run import LearningConfig, TrainConfig
from grpo.learner.optimizer import freeze_exact_parts
from grpo.source.policy_source import meta_policy, read_shape
from policies import four_bit, lora
from policies.anatomy import cache_numbers, layer_numbers
from policies.attention import PIECE
from policies.decoding.linear import FixedLinear, will_block
from policies.devices import device_of
from policies.logprobs import CHUNK_ELEMENTS
from policies.policy import Policy
from rollout.backends import derive

Part = TypeVar("Part")

MAX_ROWS = 256  # that an engine decodes together
ASSUMED_PROMPT = 256  # where prompts are not known yet


class MemoryOfRun:
    """Foretells what a run with a policy of this `shape` holds; `head`: it has a draft head."""

    def __init__(self, shape: PretrainedConfig, head: bool, config: LearningConfig | MtpConfig) -> None:
        self.shape, self.head, self.config = shape, head, config
        self.text = shape.get_text_config(decoder=True)  # of a model that reads pictures, the part that writes
        self.dtype = getattr(torch, config.dtype)

    def devices(self, gpus: float = 0) -> list[DeviceMemory]:
        """Returns one entry per kind of device: an SFT stage, the learner (rank 0 with the sampler where there are no
        Ray workers), the other ranks where there are any, and a Ray worker, or what is on a GPU together. `gpus`: see
        `on_devices`. Raises ValueError for adapters that the model cannot have, and for a `learner.parallel` that fits
        no run."""
        config, rollout, warm = self.config, self.config.whole_rollout, list[DeviceMemory]()
        reads_weights = rollout.backend != "vllm"  # a sampler beside one learner reads its weights, see LocalPool
        if isinstance(config, MtpConfig):
            learner = self.head_learner()
        elif isinstance(config, TrainConfig):
            teacher, learner = self._teacher_bytes(), self.learner()
            learner = replace(learner, teacher=teacher, host=max(learner.host, teacher))
            reads_weights = reads_weights and not config.lora
            warm = [replace(self.learner(sft_stage=True), name=SFT_STAGE)] if config.sft.steps else []
        else:
            learner = self.learner()
            return [learner if gpus else replace(learner, host=0)]
        ranks, sampler = learner.count, self.sampler(on_gpu=bool(gpus))
        if workers := rollout.samplers:
            sampler = replace(sampler, name=each_of(workers, "worker"), count=workers)
            devices = [*warm, *on_devices(learner, sampler, config, gpus)]
        else:
            alone = gpus > ranks and rollout.backend == "vllm" and not rollout.vllm.url
            if ranks == 1 and reads_weights:
                sampler = replace(sampler, sampler=0, host=0)
            name = "learner and sampler" if ranks == 1 else "rank 0, which samples"
            sleeps = bool(gpus) and rollout.backend == "vllm" and not rollout.staleness
            both = replace(learner, count=1).beside(sampler, name, in_turn=sleeps)
            both = replace(both, host=max(learner.host, sampler.host))  # one is moved before the other is made
            others = [replace(learner, name=each_of(ranks - 1, "other rank"), count=ranks - 1)] if ranks > 1 else []
            devices = [*warm, learner, replace(sampler, name="vLLM")] if alone else [*warm, both, *others]
        if not gpus:
            return [replace(device, host=0) for device in devices]
        return devices

    def learner(self, *, sft_stage: bool = False, processes: int = 0) -> DeviceMemory:
        """Returns what `Learner` holds on each of so many ranks (0: see `Shares.of`). An SFT stage trains all, without
        reference."""
        config, dtype = self.config, self.dtype
        assert isinstance(config, LearningConfig)
        options, grpo = config.learner, config if isinstance(config, TrainConfig) and not sft_stage else None
        shares = Shares.of(options.parallel, processes or options.workers)
        adapters = grpo.lora if grpo else None
        policy = meta_policy(self.shape, self.head, dtype)
        freeze_exact_parts(policy)
        plain = dict(policy.named_parameters())
        small = four_bit.chosen(policy.trunk) if adapters and adapters.base else {}
        if adapters:
            policy.add_lora(adapters.rank, adapters.alpha, adapters.targets)
        weights = dict(policy.named_parameters())
        trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
        below = {name: weight for name, weight in trained.items() if weight.dtype != torch.float32}
        # A draft head that is left as it is has masters, but never a gradient.
        depth = config.mtp.depth if policy.mtp is not None and config.mtp.loss_weight else 0
        taught = {name: weight for name, weight in trained.items() if depth or not name.startswith("mtp.")}
        value: dict[str, Tensor] = {}
        if grpo and grpo.loss.advantage in ("gae", "rank_softmax"):
            from grpo.learner.terms.value import HIDDEN, ValueHead

            with torch.device("meta"):
                value = dict(ValueHead(self.text.hidden_size, HIDDEN).named_parameters())
        row, tokens = (
            config.whole_rollout.group_size * config.whole_rollout.max_completion_tokens,
            options.tokens_per_micro_batch,
        )
        if grpo:  # a row is not cut inside of a completion
            tokens = max(min(tokens, grpo.prompts_per_step * row), grpo.whole_rollout.max_completion_tokens)

        def held(chosen: Mapping[str, Tensor], bytes_of: Callable[[Tensor], float] = lambda weight: 4) -> int:
            """Returns the bytes that a rank holds of these weights, where a number of one takes `bytes_of` it."""
            return round(sum(shares.held(name, weight) * bytes_of(weight) for name, weight in chosen.items()))

        def older(weight: Tensor) -> int:
            return weight.element_size() if options.rounds else 4

        saved = sum(weight.nbytes - four_bit.bytes_of(weight) for weight in small.values())
        published = {id(weight): weight.nbytes for weight in (*_adapted(policy), *small.values())}
        whole = 2 * largest_bytes(weights.values(), 4) if shares.ranks > 1 else 0  # the parts, then together
        buffers = sum(buffer.nbytes for buffer in policy.buffers())
        outside, layer = shares.gathered_bytes(
            {name: weight for name, weight in weights.items() if depth or not name.startswith("mtp.")}
        )
        loading = sum(w.nbytes for name, w in weights.items() if name.startswith("mtp.")) if shares.gathers else 0
        learns_lm_head = policy.lm_head.numel() * 4 if policy.lm_head.requires_grad else 0
        activations = activation_bytes(policy, tokens, row, dtype, depth, options.gradient_checkpointing)
        eight_bits = options.optimizer != "adamw"
        whole_policy = sum(weight.nbytes for weight in plain.values()) + buffers
        return DeviceMemory(
            "learner" if shares.ranks == 1 else f"each of {shares.ranks} ranks",
            shares.ranks,
            weights=held(weights, Tensor.element_size) + held(value) + buffers - saved,
            masters=0 if options.rounds else held(below),
            older=held(trained, older) if grpo and grpo.rollout.staleness > 1 else 0,
            gradients=held(taught | value),
            moments=held(taught | value, lambda weight: moment_bytes(weight) if eight_bits else 8),
            reference=held(plain, Tensor.element_size) + buffers if grpo and grpo.loss.beta > 0 and not adapters else 0,
            loading=loading,
            activations=activations + learns_lm_head + max((weight.nbytes for weight in small.values()), default=0),
            buffers=round(outside),
            gathered=round(outside + 4 * layer),
            publication=(sum(published.values()) if grpo else 0) + whole,
            saving=whole,
            host=whole_policy if shares.ranks == 1 else loading + largest_bytes(weights.values(), dtype.itemsize),
        )

    def _teacher_bytes(self) -> int:
        """Returns what the teacher of `loss.advantage: distill` holds on each rank: its forwards keep nothing."""
        config = self.config
        assert isinstance(config, TrainConfig)
        if config.distill.model is None or config.distill.url is not None:
            return 0
        options = ModelOptions(model=config.distill.model, dtype=config.dtype, device=config.device)
        return storage_bytes(tensors_of(meta_policy(*read_shape(options), self.dtype)))

    def head_learner(self) -> DeviceMemory:
        """Returns what `HeadLearner` holds: a frozen trunk, its hidden states, and a draft head that learns."""
        policy = meta_policy(self.shape, True, self.dtype)
        assert policy.mtp is not None
        assert isinstance(self.config.mtp, HeadOptions)
        head, parameters = self.config.mtp, list(policy.mtp.parameters())
        taught, all_tensors = sum(p.numel() for p in parameters), storage_bytes(tensors_of(policy))
        of_token = sum(_kept_bytes(policy.mtp, self.shape, self.dtype).values())
        activations = self.corpus_bytes() // self.config.steps + head.depth * head.tokens_per_update * of_token
        return DeviceMemory(
            "learner",
            weights=all_tensors,
            masters=4 * sum(p.numel() for p in parameters if p.dtype != torch.float32),
            gradients=4 * taught,
            moments=8 * taught,
            activations=activations + _logits_bytes(self.dtype),
            host=all_tensors,
        )

    def corpus_bytes(self) -> int:
        """Returns what `quartet mtp` keeps on disk of completions as long as they may be, of as many solutions, and of
        prompts of ASSUMED_PROMPT with each of them."""
        assert isinstance(self.config.mtp, HeadOptions)
        rollout = self.config.whole_rollout
        completions = self.config.prompts_per_step * rollout.group_size + self.config.mtp.solutions
        tokens = self.config.steps * completions * (ASSUMED_PROMPT + rollout.max_completion_tokens)
        return tokens * (self.shape.hidden_size * self.dtype.itemsize + 32)

    def sampler(self, *, on_gpu: bool = False) -> DeviceMemory:
        """Returns what an `Engine` holds that decodes from a copy of the policy, in process or in a Ray worker; or the
        server of vLLM that a run starts."""
        shape, head, dtype, rollout = self.shape, self.head, self.dtype, self.config.whole_rollout
        rows = min(rollout.prompts_per_shard * rollout.group_size, MAX_ROWS)
        entry = _entry(self.text) + (shape.kv_lora_rank + shape.qk_rope_head_dim if head else 0)
        cache = rows * rollout.max_completion_tokens * entry * dtype.itemsize
        logits = rows * self.text.vocab_size * (dtype.itemsize + 4)
        policy = meta_policy(shape, head and isinstance(shape, DeepseekV3Config), dtype)
        copy = storage_bytes(tensors_of(policy))
        sampler = DeviceMemory("sampler", sampler=copy, rollout=cache + logits, host=copy)
        if rollout.backend == "vllm":
            from rollout.vllm.settings import KV_CACHE_BYTES

            vllm_cache = 0 if on_gpu else rollout.vllm.engine.get("kv_cache_memory_bytes", KV_CACHE_BYTES)
            elsewhere = DeviceMemory("sampler")
            return elsewhere if rollout.vllm.url else replace(sampler, rollout=vllm_cache or sampler.rollout)
        if not isinstance(shape, DeepseekV3Config):  # its own forward decodes, and its parameters are cast in place
            return sampler
        unbiased = deepcopy(shape)  # what is derived from biases is small, and cannot be derived without storage
        unbiased.attention_bias = False
        derived = derived_bytes(meta_policy(unbiased, head, dtype), dtype, device_of(self.config.device))
        return replace(sampler, derived=derived, publication=derived)


def activation_bytes(
    policy: Policy, tokens: int, row: int, dtype: torch.dtype, head_depth: int, checkpointing: bool
) -> int:
    """Returns roughly the bytes of a micro-batch of `tokens` in rows of `row`, by the formula above."""
    shape = policy.config.get_text_config(decoder=True)
    layers, count = _kept_bytes(policy.trunk, shape, dtype), shape.num_hidden_layers
    experts = sum(weight.nbytes for weight in _adapted(policy) if weight.dim() == 3)
    size = tokens * sum(layers.values()) + experts
    if checkpointing:
        size = tokens * (count * shape.hidden_size * dtype.itemsize + max(layers.values(), default=0))
        size += experts // count
    if policy.mtp is not None:
        size += head_depth * tokens * sum(_kept_bytes(policy.mtp, shape, dtype).values())
    mask = tokens * row * dtype.itemsize if row <= PIECE else 0
    return size + mask + _logits_bytes(dtype)


def _entry(shape: PretrainedConfig) -> int:
    """Returns how many numbers the caches keep for a token; layers with a window keep as many as others."""
    numbers, heads = cache_numbers(shape), getattr(shape, "num_attention_heads", None)
    if numbers is not None or not heads:
        return numbers or 0
    kinds = getattr(shape, "layer_types", None) or []
    attending = sum("attention" in kind and "linear" not in kind for kind in kinds)
    return attending * layer_numbers(shape)


def derived_bytes(policy: Policy, dtype: torch.dtype, device: torch.device) -> int:
    """Returns what decoding holds besides the policy's own tensors; `policy` may be without storage."""
    storages, derived = {_storage(tensor) for tensor in tensors_of(policy)}, derive(policy, dtype)
    held = storage_bytes(tensor for tensor in tensors_of(derived) if _storage(tensor) not in storages)
    if policy.device.type == "meta" and will_block(dtype, device):
        shared = {id(it): it.weight.nbytes for it in parts_of(derived, FixedLinear) if _storage(it.weight) in storages}
        held += sum(shared.values())
    return held


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storage of `tensors`; what several share counts once."""
    sizes = {_storage(t): t.nbytes if t.is_mkldnn else t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def tensors_of(holder: object) -> Iterator[Tensor]:
    """Yields every tensor of a module, of one of our own plain objects, or of several."""
    return parts_of(holder, Tensor)


def parts_of(holder: object, kind: type[Part]) -> Iterator[Part]:
    if isinstance(holder, kind):
        yield holder
    elif isinstance(holder, nn.Module):
        yield from (tensor for tensor in (*holder.parameters(), *holder.buffers()) if isinstance(tensor, kind))
    elif isinstance(holder, list | tuple):
        for part in holder:
            yield from parts_of(part, kind)
    elif type(holder).__module__.startswith("policies."):
        yield from parts_of(list(vars(holder).values()), kind)


def _storage(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else cast(int, tensor.untyped_storage()._cdata)  # blocks have no storage


def _adapted(policy: Policy) -> Iterator[Tensor]:
    """Yields the weights that have adapters; `Policy.weights()` makes W + ΔW of each."""
    for module in (policy.trunk, *([] if policy.mtp is None else [policy.mtp])):
        for _, layer in lora.adapters(module):
            name = layer.parameter_name if isinstance(layer, lora.ParamWrapper) else "weight"
            yield getattr(layer.get_base_layer(), name)


def _logits_bytes(dtype: torch.dtype) -> int:
    return CHUNK_ELEMENTS * (2 * dtype.itemsize + 3 * 4)


def _kept_bytes(model: nn.Module, shape: PretrainedConfig, dtype: torch.dtype) -> dict[str, int]:
    """Returns the bytes that a token keeps, by layer number; "" for what is in no layer."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        if ".experts." in name and parameter.dim() == 3:
            size = shape.num_experts_per_tok * sum(parameter.shape[1:]) * dtype.itemsize
        elif "norm" in name and parameter.dim() == 1:
            size = parameter.numel() * (4 + 4 + dtype.itemsize)
        elif parameter.dim() == 2 and not any(part in name for part in ("embed", "lm_head")):
            size = sum(parameter.shape) * dtype.itemsize
        else:
            continue
        layer = name.split(".layers.", 1)[1].split(".", 1)[0] if ".layers." in name else ""
        sizes[layer] = sizes.get(layer, 0) + size
    return sizes
