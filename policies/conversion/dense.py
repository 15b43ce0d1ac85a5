"""Dense Llama-family checkpoint -> multi-head latent attention (MLA), exact at initialisation.

The result is a *stock* transformers `DeepseekV3ForCausalLM`, which loads and runs without our code.
The dense model has n query heads, G key/value heads (KV groups) and head dimension d; let R = G·d.

**Keys.** MLA has one rotary key, shared by all heads. It becomes the G dense keys side by side (rope
dimension R, `qk_nope_head_dim=0`). A query head fills its own group's block and is zero elsewhere, so q·k is
the dense product. DeepSeek scales scores by R^-½ and Llama by d^-½, so the query is multiplied by √(R/d) = √G.

**Rotation.** Llama rotates the pair (j, j + d/2) of an attention head at frequency ω_j; DeepSeek rotates the neighbours
(2p, 2p + 1) of its key at θ^(-2p/R). Pair p = g·d/2 + j takes its two rows from (j, j + d/2) of group g. To
repeat the same ω_j in every group, `rope_type="longrope"` divides each frequency by a factor of its own:
1/(factor_p · θ^(2p/R)). With θ = 1 the factor is simply 1/ω_j, which gives ω_j back with the same bits (at most
one bit off if the dense model scales its frequencies). Short and long factors are equal, so the length of the
context changes nothing.

**Values.** The latent is W_v x itself, R numbers; `kv_b_proj` gives each attention head its group's block.

**Cancelling the latent's RMSNorm.** The norm divides by the root of the latent's mean square, which differs
from token to token. Four constant latents (zero rows in the weight, B_i in the bias) make the difference
negligible. Choose ΣB_i² = (R + 4)·w²; then

    mean square = (‖v‖² + ΣB_i²) / (R + 4) = w² · (1 + ‖v‖² / ((R + 4)·w²))

and a norm weight of w on the data and 0 on the constants gives v back, with relative error
‖v‖² / (2(R + 4)w²). Every integer is a sum of four squares (Lagrange), so B_i = w·a_i with
a_1² + … + a_4² = R + 4 is exact even in bfloat16 (R = 192: 196 = 7² + 7² + 7² + 7²). Training must not change
the norm and the bias, not even by weight decay; see `frozen_parameter_names` of policies/layout.py.

Cost: the cache holds 2R + 4 numbers for each token (dense: 2R); `q_proj` grows G-fold, mostly zeros.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from policies.conversion.parity import ParityFailed, ParityReport, parity
from policies.conversion.supported import UnsupportedCheckpoint, check_convertible, dense_shape
from policies.devices import wide
from policies.layout import find_file
from policies.policy import Policy, read_config

# A power of two keeps w·a_i exact. At 2^11 the norm's error is below float32 rounding, at 2^9 not quite.
NORM_WEIGHT = 2.0**11
NUM_CONSTANTS = 4
SHARED_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("hidden_act", "rms_norm_eps", "initializer_range", "attention_dropout", "max_position_embeddings"),
    *("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE")
PARITY_TEXTS = (
    "A train leaves at 9:40 and arrives at 13:05. It stops twice for 15 minutes. How long does it move? "
    "Let us work it out: from 9:40 to 13:05 there are",
    "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n\nprint(gcd(48, 36))",
    "The river rises in the mountains, crosses two provinces and a desert, and reaches the sea in a wide "
    "delta. Its water is shared by farmers, cities and",
)


def convert_dense(model: PreTrainedModel) -> DeepseekV3ForCausalLM:
    """Makes a model that computes what `model` does, with MLA and a dense feed-forward in every layer.

    The result is in float32 like `model`, on the same device and in eval mode; `model` does not change. Raises
    `UnsupportedCheckpoint` if the result would not be exact.
    """
    check_dense(model)
    _, groups, head_dim = dense_shape(model.config)
    frequencies = dense_rotary(model)[0].repeat(groups)
    layers = (layer.self_attn for layer in model.model.layers)
    weights = (_mla_weights(model.config, a.q_proj.weight, a.k_proj.weight, a.v_proj.weight) for a in layers)
    with torch.no_grad():
        return assemble(model, mla_config(model, frequencies, groups * head_dim), weights)


def check_dense(model: PreTrainedModel) -> None:
    """Raises `UnsupportedCheckpoint` unless `model` is a plain float32 causal LM that can be converted exactly."""
    check_convertible(model.config)
    if not isinstance(model, LlamaForCausalLM | MistralForCausalLM):
        kind, why = type(model).__name__, "only a plain causal LM has the expected parameters"
        raise UnsupportedCheckpoint("type(model)", kind, why, "merge adapters and unwrap it first")
    for name, tensor in model.state_dict().items():
        if tensor.dtype != torch.float32:
            why, way_out = "rearranged weights would be rounded again", "load it with dtype=torch.float32"
            raise UnsupportedCheckpoint(f"{name}.dtype", tensor.dtype, why, way_out)


def convert_checkpoint(source: str, destination: str | Path, *, prompts: list[str] | None = None) -> ParityReport:
    """Converts the checkpoint `source` (a folder or hub id) into the folder `destination`, and checks the result.

    The saved files are loaded again and compared with the source on `prompts` (default: three short texts)
    before the folder gets its name; after any failure there is no such folder. It holds safetensors, config,
    generation config, tokenizer, chat template and licence, and a plain `AutoModelForCausalLM` loads it.

    Raises `FileExistsError` for a destination that is not empty, `PolicyError` for a source that is damaged,
    `UnsupportedCheckpoint` and `ParityFailed`.
    """
    with new_folder(destination) as folder:
        dense = load_dense(source)
        save_as(Policy(convert_dense(dense.trunk), None, dense.tokenizer), source, folder)
        report = parity(dense.trunk, Policy.load(folder).trunk, parity_prompts(dense.tokenizer, prompts))
        require_parity(report, source, destination)
    return report


def load_dense(source: str) -> Policy:
    """Raises `UnsupportedCheckpoint` before any weight is read, `PolicyError` for a damaged checkpoint."""
    check_convertible(read_config(source))
    return Policy.load(source)


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """A folder to write into, which becomes `destination` at the end of the block, unless the block raises."""
    destination = Path(destination)
    occupied = destination.exists() and (not destination.is_dir() or any(destination.iterdir()))
    if occupied or destination.is_symlink():
        raise FileExistsError(f"destination={str(destination)!r} is not empty; remove it or name another")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.")
    except OSError as error:
        raise OSError(f"destination={str(destination)!r} cannot be written ({error}); name another") from error
    with scratch as inside:
        folder = Path(inside) / destination.name
        yield folder
        folder.rename(destination)


def save_as(policy: Policy, source: str, folder: Path) -> None:
    """Writes `policy` into `folder`, with the licence of `source`."""
    policy.save(folder)
    for name in LICENCE_FILES:
        if path := find_file(source, name):
            shutil.copy(path, folder / name)


def parity_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str] | None = None) -> list[Tensor]:
    return [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts or PARITY_TEXTS]


def require_parity(report: ParityReport, source: str, destination: str | Path) -> None:
    """Raises `ParityFailed` with the report."""
    if not report.passed:
        raise ParityFailed(f"{source} and its converted form differ; {destination} not written\n{report}")


def dense_rotary(model: PreTrainedModel) -> tuple[Tensor, float]:
    """Frequencies [head_dim / 2] of a dense model, and its factor on cos and sin."""
    rotary = type(model.model.rotary_emb)(model.config)  # casting a model casts its frequencies too
    return rotary.inv_freq, float(rotary.attention_scaling)


def mla_config(model: PreTrainedModel, frequencies: Tensor, latents: int, unrotated: int = 0) -> DeepseekV3Config:
    """The configuration of the MLA form of the dense `model`: a rotary key with these `frequencies`, one for each pair,
    `latents` beside the constants, and `unrotated` dimensions of a query for the latent."""
    dense = model.config
    heads, _, head_dim = dense_shape(dense)
    factors = (1 / wide(frequencies)).tolist()
    fields = {field: getattr(dense, field) for field in SHARED_FIELDS} | {
        "num_key_value_heads": heads,  # MLA expands its latent for every attention head
        "q_lora_rank": None,
        "kv_lora_rank": latents + NUM_CONSTANTS,
        "qk_nope_head_dim": unrotated,
        "qk_rope_head_dim": 2 * len(frequencies),
        "v_head_dim": head_dim,
        "attention_bias": True,
        "rope_interleave": True,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": dense_rotary(model)[1],
            "original_max_position_embeddings": dense.max_position_embeddings,
        },
        # No layer has experts; the configuration still needs a valid router, and this is the smallest.
        "first_k_dense_replace": dense.num_hidden_layers,
        "moe_intermediate_size": dense.intermediate_size,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "dtype": torch.float32,
        "quartet_exact_mla": True,
    }
    return DeepseekV3Config(**fields)


def assemble(
    model: PreTrainedModel, config: DeepseekV3Config, attention: Iterable[Mapping[str, Tensor]]
) -> DeepseekV3ForCausalLM:
    """The MLA form of the dense `model`, with these weights in the attention of each layer and its own elsewhere."""
    state = model.state_dict()
    for layer, weights in enumerate(attention):
        prefix = f"model.layers.{layer}.self_attn."
        for name in "qkv":
            del state[f"{prefix}{name}_proj.weight"]
        state |= {prefix + name: tensor.float() for name, tensor in weights.items()}
    return rebuilt(model, config, state)


def rebuilt(model: PreTrainedModel, config: DeepseekV3Config, state: Mapping[str, Tensor]) -> DeepseekV3ForCausalLM:
    """A model of this `config` with the weights `state`; all else is that of `model`."""
    with no_init_weights():
        converted = DeepseekV3ForCausalLM(config)
    converted.load_state_dict(state)
    converted.tie_weights()
    converted.generation_config = copy.deepcopy(model.generation_config)
    torch.nn.Module.to(converted, model.device)
    return converted.eval()


def constants(latents: int) -> tuple[Tensor, float]:
    """(biases of the constants [4], weight of the norm) with which the norm leaves `latents` other numbers as they
    are."""
    return NORM_WEIGHT * torch.tensor(_four_squares(latents + NUM_CONSTANTS), dtype=torch.float64), NORM_WEIGHT


def _mla_weights(config: PreTrainedConfig, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Llama's projections q [n·d, D], k and v [G·d, D] as the weights of one `DeepseekV3Attention`."""
    heads, groups, head_dim = dense_shape(config)
    hidden, rank, each = q.shape[1], groups * head_dim, torch.arange(groups)

    def pairs(x: Tensor) -> Tensor:  # the partners (j, j + d/2) become neighbours
        return x.view(-1, 2, head_dim // 2, hidden).transpose(1, 2).reshape(groups, -1, head_dim, hidden)

    queries = q.new_zeros(groups, heads // groups, groups, head_dim, hidden)
    queries[each, :, each] = pairs(q) * math.sqrt(groups)
    blocks = q.new_zeros(groups, heads // groups, head_dim, groups, head_dim)
    blocks[each, :, :, each] = torch.eye(head_dim).to(q)
    block, norm = constants(rank)
    return {
        "q_proj.weight": queries.reshape(-1, hidden),
        "kv_a_proj_with_mqa.weight": torch.cat([v, q.new_zeros(NUM_CONSTANTS, hidden), pairs(k).reshape_as(k)]),
        "kv_a_proj_with_mqa.bias": torch.cat([q.new_zeros(rank), block.to(q), q.new_zeros(rank)]),
        "kv_a_layernorm.weight": torch.cat([q.new_full((rank,), norm), q.new_zeros(NUM_CONSTANTS)]),
        "kv_b_proj.weight": F.pad(blocks.reshape(-1, rank), (0, NUM_CONSTANTS)),
        "o_proj.bias": q.new_zeros(hidden),  # comes with `attention_bias`
    }


def _four_squares(number: int) -> tuple[int, int, int, int]:
    """Four integers whose squares sum to `number` (Lagrange, 1770), the largest as small as possible.

    >>> _four_squares(196)
    (7, 7, 7, 7)
    """
    return next(
        (a, b, c, math.isqrt(rest))
        for a in range(math.isqrt(number // 4), number + 1)
        for b in range(a, -1, -1)
        for c in range(b, -1, -1)
        if 0 <= (rest := number - a * a - b * b - c * c) <= c * c and math.isqrt(rest) ** 2 == rest
    )
