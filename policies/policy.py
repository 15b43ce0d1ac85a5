"""The policy: a causal language model, optionally an MTP head beside it, and its tokenizer.

A checkpoint is a folder in the DeepSeek-V3 layout: safetensors with the MTP head as layer `num_hidden_layers`,
config.json and the tokenizer. Stock transformers loads the trunk from it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from policies import lora
from policies.mtp import MTPHead


class PolicyError(ValueError):
    """A checkpoint that cannot be a policy; the message names what is wrong and the way out."""


class Policy(nn.Module):
    """`trunk` is transformers' own model; `mtp` drafts. Token ids, hidden states and logits are [B, T, ·]."""

    def __init__(self, trunk: PreTrainedModel, mtp: MTPHead | None, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.trunk, self.mtp, self.tokenizer = trunk, mtp, tokenizer

    @property
    def config(self) -> DeepseekV3Config:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.get_input_embeddings().weight.device

    @property
    def lm_head(self) -> Tensor:
        return self.trunk.get_output_embeddings().weight

    @property
    def max_length(self) -> int:
        return self.config.max_position_embeddings

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end a completion, from the generation config, else the tokenizer."""
        eos = self.trunk.generation_config.eos_token_id if self.trunk.generation_config else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return list(eos) if isinstance(eos, list | tuple) else [eos]

    def hidden(self, token_ids_BT: Tensor, position_ids_BT: Tensor, visible_BTT: Tensor) -> Tensor:
        """Final hidden states [B, T, D] under an explicit mask: token n attends to m where `visible_BTT[b, n, m]`."""
        mask = torch.zeros(visible_BTT.shape, dtype=self.lm_head.dtype, device=token_ids_BT.device)
        mask = mask.masked_fill(~visible_BTT, torch.finfo(mask.dtype).min)[:, None]
        out = self.trunk.get_decoder()(
            input_ids=token_ids_BT, position_ids=position_ids_BT, attention_mask=mask, use_cache=False
        )
        return out.last_hidden_state

    def unroll(
        self,
        hidden_BTD: Tensor,
        token_ids_BT: Tensor,
        position_ids_BT: Tensor,
        visible_BTT: Tensor,
        depth: int,
    ) -> list[Tensor]:
        """The head's outputs at depths 1 … depth; see `MTPHead.unroll`. The trunk gets no gradient (contract 7)."""
        assert self.mtp is not None
        model = self.trunk.get_decoder()
        with torch.no_grad():
            embeddings = model.embed_tokens(token_ids_BT)
        return self.mtp.unroll(
            hidden_BTD.detach(),
            embeddings,
            lambda shift: model.rotary_emb(embeddings, position_ids_BT + shift),
            visible_BTT,
            depth,
        )

    def add_lora(self, rank: int, alpha: float, targets: list[str] | None = None) -> None:
        """Freeze the trunk and give it adapters; the MTP head stays fully trainable."""
        lora.inject(self.trunk, rank, alpha, targets)

    def weights(self) -> dict[str, Tensor]:
        """Every tensor that sampling depends on, adapters merged: parameters and buffers such as the expert bias."""
        state = {f"trunk.{name}": t for name, t in lora.merged_state(self.trunk).items()}
        if self.mtp is not None:
            state |= {f"mtp.{name}": t.detach() for name, t in self.mtp.state_dict().items()}
        return state

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy published tensors into this (plain) policy; every name and shape must exist here."""
        own = self.state_dict(keep_vars=True)
        unknown = [name for name in weights if name not in own]
        if unknown:
            raise PolicyError(f"published tensors that this policy does not have: {unknown[:5]}")
        for name, tensor in weights.items():
            own[name].copy_(tensor)

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint, adapters merged, complete or not at all."""
        folder = Path(folder)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        state = lora.merged_state(self.trunk)
        if self.mtp is not None:
            state |= {_layout_name(self.config, name): t for name, t in self.mtp.state_dict().items()}
        self.config.num_nextn_predict_layers = 0 if self.mtp is None else 1
        with _quiet_loading():
            self.trunk.save_pretrained(partial, state_dict=state)
        self.tokenizer.save_pretrained(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)

    def skeleton(self) -> dict[str, bytes]:
        """Config and tokenizer as files: all that a worker needs besides published weights."""
        with tempfile.TemporaryDirectory() as folder:
            self.trunk.config.save_pretrained(folder)
            if self.trunk.generation_config is not None:
                self.trunk.generation_config.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        return files | {"mtp": b"" if self.mtp is None else b"1"}

    @classmethod
    def from_skeleton(cls, files: Mapping[str, bytes], dtype: torch.dtype = torch.float32) -> Policy:
        """A policy of the same shape with weights yet to be published."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                Path(folder, name).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            config = AutoConfig.from_pretrained(folder)
            with torch.random.fork_rng(devices=[]):
                trunk = AutoModelForCausalLM.from_config(config, dtype=dtype)
                mtp = MTPHead(config).to(dtype) if files["mtp"] else None
            if "generation_config.json" in files:
                trunk.generation_config = GenerationConfig.from_pretrained(folder)
        return cls(trunk.eval(), mtp, tokenizer)

    @classmethod
    def load(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, *, add_mtp: bool = False, seed: int = 0
    ) -> Policy:
        """A policy from a folder or hub id. `add_mtp` gives a fresh head to a DeepSeek-V3 trunk that has none."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            with _quiet_loading():
                trunk, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"model={str(source)!r} is neither a preset, a checkpoint folder nor a reachable hub id: {error}"
            ) from error
        _check_report(source, trunk.config, report)
        mtp = None
        if isinstance(trunk, DeepseekV3ForCausalLM):
            stored = _read_mtp(Path(source), trunk.config) if Path(source).is_dir() else {}
            if stored or add_mtp:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    mtp = MTPHead(trunk.config).to(dtype)
                if stored:
                    mtp.load_state_dict(stored)
        return cls(trunk, mtp, tokenizer)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """transformers prints a report of the MTP layer's keys as unexpected; `_check_report` reads it instead."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_report(source: str | Path, config: PretrainedConfig, report: dict) -> None:
    """Missing, misshapen and stray tensors are an error that names them; MTP layers behind the last are none."""
    layers = getattr(config, "num_hidden_layers", 0)
    stray = []
    for name in report["unexpected_keys"]:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if not (layer and int(layer[1]) >= layers):
            stray.append(name)
    for kind, names in (
        ("lacks the tensors", list(report["missing_keys"])),
        ("has tensors of another shape:", list(report["mismatched_keys"])),
        ("has tensors that its config does not explain:", stray),
    ):
        if names:
            shown = ", ".join(str(name) for name in sorted(names)[:5])
            raise PolicyError(f"model={str(source)!r} {kind} {shown} ({len(names)} in all)")


def digest(weights: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes and bits, the same in every process (contract 5)."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def _layout_name(config: DeepseekV3Config, name: str) -> str:
    """The head's parameter in the DeepSeek-V3 checkpoint: block and norms side by side in layer N."""
    name = name.removeprefix("block.")
    if name == "norm.weight":
        name = "shared_head.norm.weight"
    return f"model.layers.{config.num_hidden_layers}.{name}"


def _read_mtp(folder: Path, config: DeepseekV3Config) -> dict[str, Tensor]:
    """The head's tensors from a checkpoint, experts fused; empty where the checkpoint has no MTP layer."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        files = sorted({file for name, file in names.items() if name.startswith(prefix)})
    else:
        files = ["model.safetensors"] if (folder / "model.safetensors").exists() else []
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = tensors.get_tensor(name)
    if not found:
        return {}
    experts: dict[tuple[int, str], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if match := re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)\.weight", name):
            experts[int(match[1]), match[2]] = tensor
        elif name == "shared_head.norm.weight":
            state["norm.weight"] = tensor
        elif name in ("enorm.weight", "hnorm.weight", "eh_proj.weight"):
            state[name] = tensor
        elif not name.startswith(("embed_tokens", "shared_head")):  # copies of the trunk's own
            state[f"block.{name}"] = tensor
    if experts:
        count = 1 + max(index for index, _ in experts)
        state["block.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([experts[e, "gate_proj"], experts[e, "up_proj"]]) for e in range(count)]
        )
        state["block.mlp.experts.down_proj"] = torch.stack([experts[e, "down_proj"] for e in range(count)])
    return state
