"""The policy: a causal language model, its tokenizer, and optionally a draft head."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.distributed import DistributedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from policies import checkpoint, lora, mixers, sharding
from policies.alone import Alone, alone
from policies.attention import ATTENTION, PROMPT_ATTENTION, Packing, sees_prompts_whole
from policies.checkpoint import Checkpoint, read_config, read_tokenizer
from policies.devices import send
from policies.layout import FIXED_FIELDS, PolicyError, auto_class, rotations
from policies.lm_head import LMHead, last_states, scale_and_cap
from policies.mtp import MTPHead, cast_in_place
from policies.paths import Paths
from policies.routing.heads import with_dynamic_heads
from policies.scoring import has_indexer
from policies.synced_weights import SyncedWeights

__all__ = ["Policy", "PolicyError", "checkpoint_layers", "checksum", "context_of", "read_config", "read_tokenizer"]


BOUNDLESS = 1 << 20  # tokens
Placement = Alone | mixers.Parts | None
LIMITS = ("max_position_embeddings", "max_seq_len", "context_length", "index_topk")


class Policy(nn.Module):
    """What learns, samples and is saved. `trunk` is transformers' own model, and `mtp` drafts. Token ids, hidden states
    and logits are [B, T, ·]."""

    def __init__(self, trunk: PreTrainedModel, mtp: MTPHead | None, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.trunk, self.mtp, self.tokenizer = trunk, mtp, tokenizer
        # The tokens that the draft head may draft [K], ascending; None: all. It is a buffer only to follow the device.
        self.draft_ids: Tensor | None
        self.register_buffer("draft_ids", None, persistent=False)
        self.paths = Paths()  # what the load check found for a model of transformers
        # A checkpoint's MTP layers after the first, by their names there. They are kept and saved as they are.
        self.further_mtp: dict[str, Tensor] = {}
        self.processor: dict[str, bytes] = {}  # files that go with a model which reads pictures
        # Of the language model, as its makers have it; what reads pictures may have another one (GOT-OCR2).
        self.own_attention = trunk.config.get_text_config(decoder=True)._attn_implementation
        # Torch's `sdpa` has neither sinks nor caps. Ours has them, as flex attention has them of models that name it.
        if self.own_attention == "sdpa" or (trunk._supports_flex_attn and not trunk._supports_sdpa):
            trunk.config._attn_implementation = ATTENTION
        if self.backend == "native":  # vLLM reads them and routes differently without them; transformers ignores them
            trunk.config.update(FIXED_FIELDS)
        self.attend_to_prompts()
        self.recurrent = mixers.read_packed(trunk)
        if "text_config" in trunk.config.sub_configs:  # what reads pictures stays as it is
            kept = set(map(id, (*trunk.get_decoder().parameters(), *trunk.get_output_embeddings().parameters())))
            for parameter in trunk.parameters():
                if id(parameter) not in kept:
                    parameter.requires_grad_(False)

    def attend_to_prompts(self, how: str | None = None) -> None:
        """Set what the tokens of a prompt see of it, `causal` or `bidirectional`, in the configuration; None leaves it.
        Raises PolicyError for anything else, and for a model of another kind that would be bidirectional."""
        before = getattr(self.config, PROMPT_ATTENTION, "causal")
        how = how or before
        if how not in ("causal", "bidirectional"):
            raise PolicyError(f"config.json: {PROMPT_ATTENTION}={how!r}: use causal or bidirectional")
        if how == "bidirectional" and self.backend != "native":
            raise PolicyError(
                f"policy.{PROMPT_ATTENTION}=bidirectional: a model of type {self.config.model_type!r} masks its "
                "prompts by itself; use a DeepSeek-V3 policy (quartet convert), or causal"
            )
        if how != before:
            self.config.update({PROMPT_ATTENTION: how})

    def choose_heads(self, active: float, shared: int, seed: int = 0) -> None:
        """Give every layer a router that chooses the share `active` of its attention heads for each token, where it has
        none yet. See `with_dynamic_heads`, also for what is refused."""
        self.trunk = with_dynamic_heads(self.trunk, active, shared, seed)

    @property
    def config(self) -> DeepseekV3Config:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.get_input_embeddings().weight.device

    @property
    def lm_head(self) -> Tensor:
        """The weight of the LM head [V, D], whole where it is sharded."""
        tied = getattr(self.config, "tie_word_embeddings", False)  # inkling has no such field
        return lora.effective_weight(self.trunk.get_input_embeddings() if tied else self.trunk.get_output_embeddings())

    @property
    def output(self) -> LMHead:
        """Says how logits follow from hidden states."""
        bias = getattr(self.trunk.get_output_embeddings(), "bias", None)
        return LMHead(self.lm_head, bias, *scale_and_cap(self.config.get_text_config(decoder=True)))

    @property
    def backend(self) -> Literal["native", "transformers"]:
        """Says what decodes it: absorbed MLA with drafts (DeepSeek-V3), or the model's own forward without drafts."""
        return "native" if isinstance(self.trunk, DeepseekV3ForCausalLM) else "transformers"

    @property
    def max_length(self) -> int:
        """The context in tokens, see `context_of`."""
        return context_of(self.config)

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end a completion, from the generation config or else the tokenizer, whose own comes first."""
        eos = self.trunk.generation_config.eos_token_id if self.trunk.generation_config else None
        eos = self.tokenizer.eos_token_id if eos in (None, []) else eos
        if eos is None:
            raise PolicyError("neither generation config nor tokenizer names a stop token; set eos_token_id in one")
        ids = list(eos) if isinstance(eos, list | tuple) else [eos]
        return sorted(ids, key=lambda token: token != self.tokenizer.eos_token_id)

    @property
    def reads_trees(self) -> bool:
        """Tells whether prompts that begin alike are to be read as one tree: not in a prefix-LM, where a beginning sees
        what comes after it, and not under a mask of all pairs, which is large for a tree."""
        packed = self.paths.rows == "packed" and self.config._attn_implementation == ATTENTION
        return packed and not sees_prompts_whole(self.config) and not has_indexer(self.config)

    def hidden(
        self,
        token_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_BT: Tensor,
        until_BT: Tensor | None = None,
        on_host: tuple[Tensor, Tensor] | None = None,
        placement: Placement = None,
    ) -> Tensor:
        """Final hidden states [B, T, D] of packed rows. `segment_BT` is 0 in a prompt, 1 … G in its completions and
        below 0 in padding; ones alone are ordinary causal rows. See `Packing` for trees, and what attends to what.

        A device is waited for where a caller does not have what some models need: `on_host`, `segment_BT` and
        `until_BT` in the host's memory, and the `placement` that follows from these, on the device.
        """
        given = None if on_host is None else Packing(on_host[0], until=on_host[1])
        both_ways = sees_prompts_whole(self.config)
        packing = Packing(segment_BT, both_ways=both_ways, until=until_BT, given=given, placement=placement)
        if self._reads_alone(packing):
            return self._hidden_alone(token_ids_BT, packing)
        return sharding.decoder(self.trunk)(
            input_ids=token_ids_BT,
            position_ids=position_ids_BT,
            attention_mask=self._mask(packing),
            use_cache=False,
            packing=packing,
        ).last_hidden_state

    def placement(self, on_host: tuple[Tensor, Tensor]) -> Placement:
        """Where tokens stand in the rows that this policy reads in place of packed ones, in the host's memory; None
        where it reads these. It is sent with a micro-batch, so that no forward waits for it."""
        packing = Packing(on_host[0], until=on_host[1])
        if self._reads_alone(packing):
            return alone(packing.segment)
        return mixers.parts_of(packing) if self.recurrent else None

    def _reads_alone(self, packing: Packing) -> bool:
        """Whether every completion is read with its prompt: also where an indexer would leave out a token."""
        leaves_out = has_indexer(self.config) and packing.on_host.longest > self.max_length
        return self.paths.rows == "alone" or leaves_out

    def _mask(self, packing: Packing) -> Tensor | dict[str, Tensor | None] | None:
        """The mask of packed rows: one for each kind of layer where some have none, or where a model attends by itself
        and a window slides."""
        how, dtype, text = self.config._attn_implementation, self.trunk.dtype, self.config.get_text_config(decoder=True)
        mask = packing.mask(dtype) if has_indexer(self.config) else packing.mask_for(how, dtype)
        if isinstance(mask, BlockMask) and getattr(text, "layer_types", None):
            mask.ndim = len(mask.shape)  # models that may have recurrent layers ask for it where they have none
        windowed = packing if how == ATTENTION else packing.within(getattr(text, "sliding_window", None))
        of_window = mask if windowed is packing else windowed.mask(dtype)
        if self.recurrent or (of_window is not mask and getattr(text, "layer_types", None)):
            return {"full_attention": mask, "sliding_attention": of_window, "linear_attention": None, "conv": None}
        return of_window

    def _hidden_alone(self, token_ids_BT: Tensor, packing: Packing) -> Tensor:
        """Reads each completion with its prompt in a row of its own, by the model's own masks and positions, and gives
        the same as `hidden`. What comes after a row is padding, which a causal model does not see."""
        placement = packing.placement
        if not isinstance(placement, Alone):
            placement = alone(packing.on_host.segment)
            placement = placement.with_tensors(send(placement.tensors, token_ids_BT.device))
        self.config._attn_implementation = self.own_attention  # for good: checkpoints are read again in backward passes
        token_ids = placement.rows(token_ids_BT)
        hidden, _ = last_states(self.trunk, self.paths.states, input_ids=token_ids, use_cache=False)
        return placement.packed(hidden, token_ids_BT.shape)

    def unroll(
        self,
        hidden_BTD: Tensor,
        token_ids_BT: Tensor,
        position_ids_BT: Tensor,
        segment_BT: Tensor,
        depth: int,
        first: int = 0,
        until_BT: Tensor | None = None,
        given: Packing | None = None,
    ) -> list[Tensor]:
        """The draft head's outputs, see `MTPHead.unroll`. The trunk gets no gradient (contract 7)."""
        assert self.mtp is not None
        model = self.trunk.get_decoder()
        with torch.no_grad():
            embeddings = model.embed_tokens(token_ids_BT)
        return self.mtp.unroll(
            hidden_BTD.detach(),
            embeddings,
            lambda shift: model.rotary_emb(embeddings, position_ids_BT + shift),
            segment_BT,
            depth,
            first,
            until_BT,
            given,
        )

    def cast(self, dtype: torch.dtype) -> Policy:
        """Cast in place, see `cast_in_place`."""
        cast_in_place(self, dtype)
        return self

    def sharing(self, *, head: bool) -> Policy:
        """A copy of a policy without adapters that shares the trunk's weights in memory, so nothing may move them, and
        with `head` the draft head's too. Biases of routers are its own. A sharded policy cannot be copied."""
        shared: dict[int, Any] = {id(weight): weight for weight in (self if head else self.trunk).parameters()}
        return copy.deepcopy(self, shared | {id(self.tokenizer): self.tokenizer})

    def add_lora(self, rank: int, alpha: float, targets: list[str] | None = None) -> None:
        """Freeze the trunk and add adapters to it. The draft head stays fully trainable unless `targets` hold "mtp"."""
        lora.inject(self.trunk, rank, alpha, targets, self.mtp)

    def weights(self) -> dict[str, Tensor]:
        """Every tensor on which sampling depends, with adapters merged: parameters, buffers such as the expert bias,
        and the draft vocabulary."""
        return dict(self.synced_weights())

    def synced_weights(self) -> SyncedWeights:
        """The tensors of `weights`, with each adapter apart from its weight until that is read."""
        tensors: dict[str, Tensor] = {}
        adapters: dict[str, lora.Adapter] = {}
        for part, model in (("trunk", self.trunk), ("mtp", self.mtp)):
            if model is not None:
                state, of_part = lora.unmerged_state(model)
                tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
                adapters |= {f"{part}.{name}": adapter for name, adapter in of_part.items()}
        if self.draft_ids is not None:
            tensors["draft_ids"] = self.draft_ids
        named = self.named_parameters(remove_duplicate=False) if adapters else ()
        frozen = (name.replace(".base_layer", "") for name, parameter in named if not parameter.requires_grad)
        return SyncedWeights(tensors, adapters, frozenset(frozen))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy published tensors into this policy without adapters: all of its tensors in their shapes, or none."""
        state = self.state_dict(keep_vars=True)
        weights = dict(weights)
        draft_ids = weights.pop("draft_ids", None)  # it may be absent, or of another length than our own
        if unknown := [name for name in weights if name not in state]:
            raise PolicyError(f"the synced weights have tensors that this policy lacks: {unknown[:5]}")
        if missing := [name for name in state if name not in weights]:
            raise PolicyError(f"the synced weights lack tensors of this policy: {missing[:5]}")
        for name, tensor in weights.items():
            if tensor.shape != state[name].shape:
                raise PolicyError(f"published {name} is {list(tensor.shape)}, here it is {list(state[name].shape)}")
        for name, tensor in weights.items():
            if tensor.data_ptr() != state[name].data_ptr():  # it may be this policy's own
                state[name].copy_(sharding.whole(tensor))
        self.draft_ids = None if draft_ids is None else draft_ids.to(self.device, copy=True)

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint with adapters merged, all of it or nothing. Raises PolicyError if the disk refuses."""
        stored = Checkpoint(self.trunk, self.mtp, self.tokenizer, self.draft_ids, self.further_mtp, self.processor)
        checkpoint.save(Path(folder), stored)

    def merged(self) -> Policy:
        """A copy on the same device, in the same precision, with its adapters merged."""
        copy = Policy.from_skeleton(self.skeleton(), self.trunk.dtype).to(self.device)
        copy.load_weights(self.weights())
        return copy

    def skeleton(self) -> dict[str, bytes]:
        """Config and tokenizer as files, which are all that a worker needs besides published weights."""
        with tempfile.TemporaryDirectory() as folder:
            self.trunk.config.save_pretrained(folder)
            if self.trunk.generation_config is not None:
                self.trunk.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]  # chat templates may have a folder
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        # An attribute that no tokenizer saves: what a run hands to the chat template, of an episode's prompts too.
        options = json.dumps(getattr(self.tokenizer, "chat_template_kwargs", {})).encode()
        more = {"mtp": b"" if self.mtp is None else b"1", "paths": self.paths.to_bytes()}
        return files | more | {"chat_template_kwargs": options}

    @classmethod
    def from_skeleton(cls, files: Mapping[str, bytes], dtype: torch.dtype = torch.float32) -> Policy:
        """A policy of the same shape, whose weights are yet to be published."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).parent.mkdir(exist_ok=True)
                Path(folder, name).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.chat_template_kwargs = json.loads(files["chat_template_kwargs"])
            config = AutoConfig.from_pretrained(folder)
            with torch.random.fork_rng(devices=[]):
                trunk = auto_class(config).from_config(config, dtype=dtype)
                mtp = MTPHead(trunk.config).cast(dtype) if files["mtp"] else None
            if "generation_config.json" in files:
                trunk.generation_config = GenerationConfig.from_pretrained(folder)
        policy = cls(trunk.eval(), mtp, tokenizer)
        policy.paths = Paths.from_bytes(files["paths"])
        return policy

    @classmethod
    def load(
        cls,
        source: str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        add_mtp: bool = False,
        seed: int = 0,
        layout: DistributedConfig | None = None,
        in_4_bits: bool = False,
    ) -> Policy:
        """A policy from a folder or hub id. `add_mtp` gives a fresh draft head to a DeepSeek-V3 trunk that has none.

        With `layout` its weights are spread over the processes of this run, see sharding.py. With `in_4_bits` it can
        learn by adapters alone, see four_bit.py.
        Raises PolicyError, which names the tensor, file or field that is wrong. If the headers of the files show it, no
        weight is loaded before.
        """
        stored = checkpoint.load(source, dtype, add_mtp=add_mtp, seed=seed, layout=layout, in_4_bits=in_4_bits)
        policy = cls(stored.trunk, stored.mtp, stored.tokenizer)
        policy.draft_ids, policy.further_mtp = stored.draft_ids, stored.further_mtp
        policy.processor = stored.processor
        sharding.wrap(policy.trunk, policy.mtp)
        return policy


def context_of(config: PretrainedConfig) -> int:
    """The context in tokens, within which no position changes its rotation and an indexer leaves out no token;
    BOUNDLESS if the configuration names no limit, as of recurrent models, or a limit of -1, as of XLNet."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in LIMITS]
    for rotation in rotations(text):
        if rotation.get("rope_type") in ("dynamic", "longrope"):
            limits.append(rotation.get("original_max_position_embeddings"))
    return min((limit for limit in limits if limit and limit > 0), default=BOUNDLESS)


def checkpoint_layers(trunk: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Lets backward passes compute these layers of a model again in place of keeping what they computed."""
    trunk.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in trunk.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True  # else transformers ignores it; what is inside (dropout) stays in eval mode
        for name in [name for name, value in vars(layer).items() if "dropout" in name and isinstance(value, float)]:
            setattr(layer, name, 0.0)  # OPT drops in the layer itself
    return layers


def checksum(weights: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes and bits, the same in every process (contract 5)."""
    fingerprint = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = sharding.whole(weights[name].detach()).cpu().contiguous()
        fingerprint.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        fingerprint.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return fingerprint.hexdigest()
