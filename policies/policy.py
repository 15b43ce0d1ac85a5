"""The policy: a causal language model, optionally an MTP head beside it, and its tokenizer.

A checkpoint is a folder in the DeepSeek-V3 layout: safetensors with the MTP head as layer `num_hidden_layers`,
config.json and the tokenizer. Stock transformers loads the trunk from it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
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
        return lora.effective_weight(self.trunk.get_output_embeddings())

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
        """Copy published tensors into this (plain) policy: all of its tensors, in their shapes, or none at all."""
        own = self.state_dict(keep_vars=True)
        if unknown := [name for name in weights if name not in own]:
            raise PolicyError(f"published tensors that this policy does not have: {unknown[:5]}")
        if missing := [name for name in own if name not in weights]:
            raise PolicyError(f"the publication lacks tensors of this policy: {missing[:5]}")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise PolicyError(f"published {name} is {list(tensor.shape)}, here it is {list(own[name].shape)}")
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
            with _quiet_loading() as logged:
                trunk, report = AutoModelForCausalLM.from_pretrained(
                    source,
                    dtype=dtype,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # `_check_report` refuses them by name
                    output_loading_info=True,
                )
        except (OSError, ValueError) as error:
            raise PolicyError(
                f"model={str(source)!r} is neither a preset, a checkpoint folder nor a reachable hub id: {error}"
            ) from error
        except RuntimeError as error:  # experts that cannot be stacked; transformers names them in its log alone
            unfit = re.findall(r"^(\S+) +\| CONVERSION", "\n".join(record.getMessage() for record in logged), re.M)
            if not unfit:
                raise
            raise PolicyError(f"model={str(source)!r} has experts missing or of unequal shapes: {unfit[:5]}") from error
        _check_report(source, trunk.config, report)
        mtp = None
        if isinstance(trunk, DeepseekV3ForCausalLM):
            stored = _read_mtp(Path(source), trunk.config) if Path(source).is_dir() else {}
            if stored or add_mtp:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    mtp = MTPHead(trunk.config).to(dtype)
                if stored:
                    _fill_mtp(source, mtp, stored)
        return cls(trunk, mtp, tokenizer)


@contextmanager
def _quiet_loading() -> Iterator[list[logging.LogRecord]]:
    """transformers logs the MTP layer's keys as unexpected; `_check_report` judges. Yields what was not shown."""
    library, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level, handlers = library.level, library.handlers
    kept = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    library.handlers = [kept]
    library.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield kept.buffer
    finally:
        library.handlers = handlers
        library.setLevel(level)
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
    misshapen = [name for name, *_ in report["mismatched_keys"]]
    _refuse_differences(source, report["missing_keys"], misshapen, stray)


def _refuse_differences(
    source: str | Path, missing: Iterable[str], misshapen: Iterable[str], stray: Iterable[str]
) -> None:
    for kind, names in (
        ("lacks the tensors", sorted(missing)),
        ("has tensors of another shape:", sorted(misshapen)),
        ("has tensors that its config does not explain:", sorted(stray)),
    ):
        if names:
            raise PolicyError(f"model={str(source)!r} {kind} {', '.join(names[:5])} ({len(names)} in all)")


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
    """The tensors of the checkpoint's MTP layer, without copies of the trunk's own; empty where it has none."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        files = sorted({file for name, file in names.items() if name.startswith(prefix)})
    else:
        files = ["model.safetensors"] if (folder / "model.safetensors").exists() else []
    copies = (f"{prefix}embed_tokens.", f"{prefix}shared_head.head.")
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name.startswith(prefix) and not name.startswith(copies):
                    found[name] = tensors.get_tensor(name)
    return found


@torch.no_grad()
def _fill_mtp(source: str | Path, head: MTPHead, stored: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's MTP layer into `head`; its experts lie there one by one, gate and up apart."""
    own: dict[str, Tensor] = {}
    for name, tensor in head.state_dict().items():
        name = _layout_name(head.config, name)
        if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            own[name] = tensor
            continue
        experts, _, fused = name.rpartition(".")
        parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
        for e, expert in enumerate(tensor):
            for part, view in zip(parts, expert.chunk(len(parts)), strict=True):
                own[f"{experts}.{e}.{part}.weight"] = view
    both = own.keys() & stored.keys()
    misshapen = [name for name in both if own[name].shape != stored[name].shape]
    _refuse_differences(source, own.keys() - both, misshapen, stored.keys() - both)
    for name, view in own.items():
        view.copy_(stored[name])
