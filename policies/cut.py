"""A small model of the same architecture as a large one, on which every path can be tried in float32.

All flags, multipliers and kinds of layers of the configuration stay, with one layer of each kind. Windows, chunks and
blocks have 8 tokens, so that short prompts are longer. The random weights are wide, so that a layer left out, a mask or
a state that is wrong shows in the log-probabilities.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from policies.sharding import EXPERTS

VOCABULARY, WIDTH = 512, 128  # at most; the width is that of feed-forwards
WINDOW, BUDGET = 8, 16  # tokens of a window, chunk or block, and those that an indexer chooses
ENOUGH, MOST = 20e6, 200e6  # parameters: above the first, widths are halved where they can be
MOST_WHOLE = 400e6  # with all tokens of a tokenizer, whose embedding is then most of the model
MOST_KINDS = 8
SPREAD = 2.0  # the standard deviation of the logits of random weights

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")  # so many are of another kind
LAST_LAYERS = ("num_kv_shared_layers",)
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
BUDGETS = {"index_topk_blocks": 2, "indexer_budget": BUDGET}
# Every architecture has its own names for the fields of its configuration; these are patterns of their names.
PERIODS = r"_period$|_interval$|every_n_layers$|(sparse|layer)_step$|window_pattern$"
FEED_FORWARDS = r"intermediate_size|(ffn|ffn_hidden|decoder_ffn)_(dim|size)$|^(n_inner|d_ff|dff)$"
WIDTHS = r"^(hidden_size|d_model|n_embd|lru_width|d_inner|mamba_d_ssm|word_embed_proj_dim)$|^emb.*_(dim|size)$"
HEADS, KV_HEADS = r"^(?!index).*heads$|^n_head$", r"(key_value|kv)_heads$"
WINDOWS = r"(^|_)(window|window_size|chunk_size|block_size)$|^(local_attention|rel_extent|compress_rates)$"


def _named(pattern: str, fields: dict[str, Any]) -> dict[str, int]:
    """The fields with numbers whose names have this pattern."""
    return {name: value for name, value in fields.items() if re.search(pattern, name) and type(value) is int}


def windows(fields: dict[str, Any]) -> dict[str, int]:
    """The sizes of windows, chunks and blocks that are shorter than the context, by their fields.

    >>> windows({"max_position_embeddings": 4096, "sliding_window": 4096, "chunk_size": 64})
    {'chunk_size': 64}
    """
    context = fields.get("max_position_embeddings") or math.inf
    return {name: size for name, size in _named(WINDOWS, fields).items() if 0 < size < context}


def has_windows(config: PretrainedConfig) -> bool:
    """Tells whether windows, chunks, blocks or an indexer make long prompts something else than short ones."""
    fields = config.get_text_config(decoder=True).to_dict()
    return bool(windows(fields)) or any(fields.get(name) for name in (*BUDGETS, "compress_rates"))


def cut(
    config: PretrainedConfig, layers: int = 1, *, narrow: bool = True, whole_vocabulary: bool = False
) -> PretrainedConfig:
    """A small configuration of the same architecture, with `layers` of each kind and two at least; without `narrow`
    feed-forwards and experts stay as they are, and with the `whole_vocabulary` all token ids do. Raises ValueError
    where the model stays too large, and whatever the model itself may raise.

    >>> cut(LlamaConfig(hidden_size=64, num_attention_heads=4)).num_hidden_layers
    2
    """
    fields, text = config.to_dict(), config.get_text_config(decoder=True)
    name = next((name for name in config.sub_configs if getattr(config, name) is text), None)
    small = _cut(fields if name is None else fields[name], layers, narrow)
    tokens: Callable[[dict[str, Any]], dict[str, Any]] = (lambda _: {}) if whole_vocabulary else _tokens
    small |= tokens(small)
    for tower in config.sub_configs.keys() - {name}:  # for pictures and sound
        if fields.get(tower):
            fields[tower] |= {depth: 1 for depth in DEPTHS if depth in fields[tower]}
    while True:
        whole = small if name is None else fields | tokens(fields) | {name: small}
        kept = {key: value for key, value in whole.items() if key not in ("quantization_config", "dtype")}
        small_config = type(config).from_dict(kept)
        with torch.device("meta"):
            trunk = AutoModelForCausalLM.from_config(small_config)
        count = sum(parameter.numel() for parameter in trunk.parameters())
        halved = _halved(small) if narrow and count > ENOUGH else None
        if halved is None:
            break
        small = halved
    if count > (MOST_WHOLE if whole_vocabulary else MOST):
        raise ValueError(f"two of its layers have {count / 1e6:.0f} million weights already")
    return small_config


def cut_model(
    config: PretrainedConfig,
    layers: int = 1,
    attention: str | None = None,
    seed: int = 0,
    *,
    whole_vocabulary: bool = False,
) -> PreTrainedModel:
    """A model of `cut(config)` with wide random weights in float32, always the same ones, which its own forward can
    read. Raises ValueError with the reason where there is none."""
    error: Exception | None = None
    for narrow in (True, False):
        with quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            try:
                small = cut(config, layers, narrow=narrow, whole_vocabulary=whole_vocabulary)
                model = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
                if attention is not None:
                    model.config._attn_implementation = attention
                randomize(model.eval())
                vocabulary = model.get_input_embeddings().weight.shape[0]
                tokens = torch.randint(2, vocabulary, (1, 3 * WINDOW))
                if model(input_ids=tokens, use_cache=False).logits.isfinite().all():
                    return model
                error = ValueError("its logits are not finite")
            except Exception as failure:  # whatever a model that nobody here wrote may raise
                error = error or failure
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    raise ValueError(f"no small model of type {config.model_type!r} can be built: {reason[:300]}")


def _cut(fields: dict[str, Any], layers: int, narrow: bool) -> dict[str, Any]:
    small = fields | cut_layers(fields, layers)
    small |= {name: min(window, WINDOW) for name, window in windows(small).items()}
    if small.get("compress_rates"):  # DeepSeek-V4
        small["compress_rates"] = {kind: min(rate, WINDOW) for kind, rate in small["compress_rates"].items()}
    small |= {name: min(small[name], budget) for name, budget in BUDGETS.items() if small.get(name)}
    return small | (_narrow(small) if narrow else {})


def cut_layers(fields: dict[str, Any], layers: int = 1, least: int = 2) -> dict[str, Any]:
    """The fields of a configuration that have an entry for each layer or count layers, cut to `layers` of each kind."""
    depths = [name for name in DEPTHS if isinstance(fields.get(name), int)]
    depth = fields[depths[0]] if depths else 0
    per_layer, numbers, exceptions = {}, {}, {}
    for name, value in fields.items():
        if isinstance(value, dict) and "layer" in name and all(str(key).isdecimal() for key in value):
            exceptions[name] = {int(key): entry for key, entry in value.items()}
        if not isinstance(value, list) or not value or value == list(range(depth)) or "token" in name:
            continue
        if len(value) == depth:
            per_layer[name] = value
        elif "layer" in name and all(isinstance(number, int) and 0 <= number < depth for number in value):
            numbers[name] = value
    first = {name: fields[name] for name in FIRST_LAYERS if isinstance(fields.get(name), int)}
    last = {name: depth - fields[name] for name in LAST_LAYERS if isinstance(fields.get(name), int)}
    kinds = [
        str(
            [value[place] for value in per_layer.values()]
            + [place in value for value in numbers.values()]
            + [value.get(place) for value in exceptions.values()]
            + [place < start for start in (first | last).values()]
        )
        for place in range(depth)
    ]
    chosen: list[int] = []
    for kind in list(dict.fromkeys(kinds))[:MOST_KINDS]:
        chosen += [place for place in range(depth) if kinds[place] == kind][:layers]
    if len(set(kinds)) == 1:  # then the kinds may recur with a period
        chosen = list(range(min(depth, max([1, *_named(PERIODS, fields).values()]) * layers)))
    others = [place for place in range(depth) if place not in chosen]
    chosen = sorted(chosen + others[: max(0, least - len(chosen))])
    small: dict[str, Any] = dict.fromkeys(depths, len(chosen))
    small |= {name: [value[place] for place in chosen] for name, value in per_layer.items()}
    small |= {name: [new for new, place in enumerate(chosen) if place in value] for name, value in numbers.items()}
    for name, value in exceptions.items():
        small[name] = {new: value[place] for new, place in enumerate(chosen) if place in value}
    small |= {name: sum(place < start for place in chosen) for name, start in first.items()}
    return small | {name: sum(place >= start for place in chosen) for name, start in last.items()}


def _tokens(fields: dict[str, Any]) -> dict[str, Any]:
    """Sizes of vocabularies, and the special ids inside of them, from the last down."""
    small = {
        name: min(value, VOCABULARY)
        for name, value in fields.items()
        if "vocab_size" in name and isinstance(value, int) and "base" not in name
    }
    inside: dict[int, int] = {}

    def put(value: object) -> object:
        if isinstance(value, list):
            return [put(item) for item in value]
        if not isinstance(value, int) or value < VOCABULARY:
            return value
        return inside.setdefault(value, VOCABULARY - 1 - len(inside))

    named = {name: value for name, value in fields.items() if name.endswith(("token_id", "token_ids", "token_index"))}
    return small | {name: put(value) for name, value in named.items()}


def _narrow(fields: dict[str, Any]) -> dict[str, Any]:
    """Narrow feed-forwards and few experts, from which as many are chosen as before."""
    small: dict[str, Any] = {name: min(size, WIDTH) for name, size in _named(FEED_FORWARDS, fields).items()}
    if isinstance(sizes := fields.get("intermediate_size"), list):  # of each layer
        small["intermediate_size"] = [min(size, WIDTH) for size in sizes]
    chosen = max((fields[name] for name in CHOSEN if isinstance(fields.get(name), int)), default=1)
    groups = next((fields[name] for name in ("n_group", "num_expert_group") if fields.get(name)), 1)
    of_group = max(2, -(-2 * chosen // (fields.get("topk_group") or groups)), -(-8 // groups))
    for name in EXPERTS:
        if isinstance(fields.get(name), int):
            small[name] = min(fields[name], groups * of_group)
    return small


def _halved(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Half of the hidden size and of all attention heads; None where one of these is odd, or 2 (but for KV heads)."""
    halves = _named(f"{WIDTHS}|{HEADS}", fields)
    halves = {name: value for name, value in halves.items() if value and not (re.search(KV_HEADS, name) and value <= 2)}
    if any(value % 2 or value < 4 for value in halves.values()):
        return None
    return fields | {name: value // 2 for name, value in halves.items()}


def randomize(model: PreTrainedModel) -> None:
    """Gives a model wide random weights, by the generator of torch, and logits of the standard deviation SPREAD."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    constant = {name for name, _ in model.named_buffers() if "bias" not in name and "scalar" not in name}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in constant:
            tensor.copy_(_random(name, tensor))
        elif "tid2eid" in name:  # DeepSeek-V4: the experts of each token
            experts = model.config.to_dict().get("n_routed_experts") or model.config.num_experts
            tensor.copy_(torch.rand(len(tensor), experts).topk(tensor.shape[1]).indices)
    tokens = torch.randint(2, vocabulary, (2, 24))
    for _ in range(3):
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        lm_head = model.get_output_embeddings()
        if lm_head is None or not isinstance(lm_head, nn.Module):
            return
        lm_head.weight.mul_(SPREAD / logits.std(-1).mean())


def _random(name: str, tensor: Tensor) -> Tensor:
    """Other values for a weight. What is a vector moves about the value that its layer begins with: 1 or 0 for a norm,
    a decay that is sane for a recurrent state."""
    noise = torch.randn(tensor.shape)
    if "inv_freq" in name or "rotary" in name or "embed_positions" in name:
        return tensor
    if "conv" in name and tensor.dim() == 3:
        return noise / tensor.shape[-1] ** 0.5
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return noise - 2  # with the next, a recurrent state remembers some ten tokens, so that a leak shows
    if "A_log" in name:
        return tensor.clamp(max=0.0) + 0.3 * noise
    if "norm" in name and "post_" in name:
        return tensor + 1 + 0.3 * noise  # else the embedding outweighs what the layers add to it
    if tensor.dim() < 2 or tensor.shape[-1] == 1:
        alike = tensor.numel() > 1 and tensor.std() < 0.1 * tensor.mean().abs()  # then noise that fits its size
        return tensor + 0.3 * noise * (tensor.mean().abs() if alike else 1)
    if "emb" in name or "wte" in name or "wpe" in name:
        return noise * max(tensor.std().item(), 0.3)
    return 1.5 * noise / tensor.shape[-1] ** 0.5


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says of odd token ids and missing kernels."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
