"""The policy: a causal language model, optionally an MTP head beside it, and its tokenizer.

A checkpoint is a folder in the DeepSeek-V3 layout: safetensors with the MTP head as layer `num_hidden_layers`,
config.json and the tokenizer. Stock transformers loads the trunk from it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
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
from policies.attention import ATTENTION, Packing
from policies.contradictions import FIXED_FIELDS, contradictions, refuse_type
from policies.files import hub
from policies.files.atomic import write_folder
from policies.files.file_mode import heed_umask
from policies.layout import (
    PolicyError,
    Shape,
    WeightFiles,
    check_tensors,
    fill_head,
    find_file,
    head_state,
    may_idle,
    mtp_layers,
    own_copies,
    read_draft_vocabulary,
    refuse_differences,
    write_draft_vocabulary,
)
from policies.mtp import MTPHead

__all__ = ["Policy", "PolicyError", "digest", "read_config", "read_tokenizer"]
LOGGER = logging.getLogger(__name__)
NO_HEAD = (
    "model=%r: config.json promises num_nextn_predict_layers=%d, but no MTP layer is stored (transformers drops them "
    "when it saves): no draft head; add_mtp: true gives a fresh one"
)
OWN_COPIES = (
    "model=%r: %s differ from the trunk's. The draft head uses the trunk's in their place, so it may draft worse than "
    "it did (no token changes), and a policy that is saved does not hold them"
)
FURTHER_LAYERS = (
    "model=%r has %d MTP layers: the first is trained and drafts at every depth, the others are kept and saved "
    "as they are"
)


class Policy(nn.Module):
    """`trunk` is transformers' own model; `mtp` drafts. Token ids, hidden states and logits are [B, T, ·]."""

    def __init__(self, trunk: PreTrainedModel, mtp: MTPHead | None, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.trunk, self.mtp, self.tokenizer = trunk, mtp, tokenizer
        # The tokens that the head may draft [K], ascending; None: all. A buffer for its device only, see `weights`.
        self.draft_ids: Tensor | None
        self.register_buffer("draft_ids", None, persistent=False)
        # A checkpoint's MTP layers behind the first, by their names there: kept and saved as they are.
        self.further_mtp: dict[str, Tensor] = {}
        if trunk.config._attn_implementation == "sdpa":
            trunk.config._attn_implementation = ATTENTION
        if self.backend == "native":  # vLLM reads them, and routes otherwise without them; transformers does not
            trunk.config.update(FIXED_FIELDS)

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
    def backend(self) -> Literal["native", "transformers"]:
        """Who decodes it: absorbed MLA with drafts (DeepSeek-V3), or the model's own forward without them."""
        return "native" if isinstance(self.trunk, DeepseekV3ForCausalLM) else "transformers"

    @property
    def max_length(self) -> int:
        """The context in tokens: as long as no sliding window hides anything and no position changes its rotation."""
        config = self.config
        limits = [getattr(config, "max_position_embeddings", None)]
        layers = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
            if kind in layers:
                limits.append(getattr(config, name, None))
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limits.append(rope.get("original_max_position_embeddings"))
        if not any(limits):
            raise PolicyError(
                f"a model of type {config.model_type!r} names no max_position_embeddings, hence no context"
            )
        return min(limit for limit in limits if limit)

    @property
    def stop_token_ids(self) -> list[int]:
        """The tokens that end a completion, from the generation config, else the tokenizer; the latter's own first."""
        eos = self.trunk.generation_config.eos_token_id if self.trunk.generation_config else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        if eos is None:
            raise PolicyError("neither generation config nor tokenizer names a stop token; set eos_token_id in one")
        ids = list(eos) if isinstance(eos, list | tuple) else [eos]
        return sorted(ids, key=lambda token: token != self.tokenizer.eos_token_id)

    def hidden(
        self,
        token_ids_BT: Tensor,
        position_ids_BT: Tensor,
        visible_BTT: Tensor,
        packing: Packing | None = None,
    ) -> Tensor:
        """Final hidden states [B, T, D] under an explicit mask: token n attends to m where `visible_BTT[b, n, m]`.
        `packing` says the same of packed rows, for a kernel that makes use of it."""
        mask = torch.zeros(visible_BTT.shape, dtype=self.lm_head.dtype, device=token_ids_BT.device)
        mask = mask.masked_fill(~visible_BTT, torch.finfo(mask.dtype).min)[:, None]
        out = self.trunk.get_decoder()(
            input_ids=token_ids_BT,
            position_ids=position_ids_BT,
            attention_mask=mask,
            use_cache=False,
            **({"packing": packing} if packing else {}),
        )
        return out.last_hidden_state

    def unroll(
        self,
        hidden_BTD: Tensor,
        token_ids_BT: Tensor,
        position_ids_BT: Tensor,
        visible_BTT: Tensor,
        depth: int,
        first: int = 0,
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
            first,
        )

    def cast(self, dtype: torch.dtype) -> Policy:
        """In place, as transformers casts what it loads: routers and rotary frequencies stay in float32."""
        exact = {name: tensor.data for name, tensor in self._named_tensors() if ".gate." in name or "inv_freq" in name}
        self.to(dtype)
        for name, tensor in self._named_tensors():
            tensor.data = exact.get(name, tensor.data)
        return self

    def _named_tensors(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers, those included that no checkpoint holds."""
        return [*self.named_parameters(), *self.named_buffers()]

    def add_lora(self, rank: int, alpha: float, targets: list[str] | None = None) -> None:
        """Freeze the trunk and give it adapters; the MTP head stays fully trainable unless `targets` name "mtp"."""
        lora.inject(self.trunk, rank, alpha, targets, self.mtp)

    def weights(self) -> dict[str, Tensor]:
        """Every tensor that sampling depends on, adapters merged: parameters, buffers such as the expert bias, and the
        draft vocabulary."""
        state = {f"trunk.{name}": t for name, t in lora.merged_state(self.trunk).items()}
        if self.mtp is not None:
            state |= {f"mtp.{name}": t for name, t in lora.merged_state(self.mtp).items()}
        return state if self.draft_ids is None else state | {"draft_ids": self.draft_ids}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy published tensors into this (plain) policy: all of its tensors, in their shapes, or none at all."""
        own = self.state_dict(keep_vars=True)
        weights = dict(weights)
        draft_ids = weights.pop("draft_ids", None)  # of any length, or none: no tensor of ours to copy into
        if unknown := [name for name in weights if name not in own]:
            raise PolicyError(f"published tensors that this policy does not have: {unknown[:5]}")
        if missing := [name for name in own if name not in weights]:
            raise PolicyError(f"the publication lacks tensors of this policy: {missing[:5]}")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise PolicyError(f"published {name} is {list(tensor.shape)}, here it is {list(own[name].shape)}")
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        self.draft_ids = None if draft_ids is None else draft_ids.to(self.device, copy=True)

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint, adapters merged, complete or not at all. Raises PolicyError where the disk refuses."""
        folder = Path(folder)
        state = lora.merged_state(self.trunk)
        if self.mtp is not None:
            first = self.config.num_hidden_layers
            head = lora.merged_state(self.mtp)
            state |= head_state(self.config, first, head, may_idle(self.config)) | self.further_mtp
            further = len(mtp_layers(self.config, self.further_mtp))
        if self.backend == "native":
            self.config.num_nextn_predict_layers = 0 if self.mtp is None else 1 + further
        try:
            with write_folder(folder) as partial:
                with _quiet_loading():
                    self.trunk.save_pretrained(partial, state_dict=state)
                heed_umask(partial)
                self.tokenizer.save_pretrained(partial)
                if self.draft_ids is not None:
                    write_draft_vocabulary(partial, self.draft_ids)
        except (OSError, SafetensorError) as error:
            what = f"cannot write the policy to {folder}: {error}; needs {sum(t.nbytes for t in state.values())} bytes"
            raise PolicyError(f"{what}: make room or use another disk; what was saved before is intact") from error

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
                mtp = MTPHead(trunk.config).cast(dtype) if files["mtp"] else None
            if "generation_config.json" in files:
                trunk.generation_config = GenerationConfig.from_pretrained(folder)
        return cls(trunk.eval(), mtp, tokenizer)

    @classmethod
    def load(
        cls, source: str | Path, dtype: torch.dtype = torch.float32, *, add_mtp: bool = False, seed: int = 0
    ) -> Policy:
        """A policy from a folder or hub id. `add_mtp` gives a fresh head to a DeepSeek-V3 trunk that has none.

        Raises PolicyError naming the tensor, file or field that is wrong, before any weight is loaded where the files'
        headers tell.
        """
        config = read_config(source)
        files = WeightFiles(source)
        if isinstance(config, DeepseekV3Config) and files.shapes:
            check_tensors(files, config)
        tokenizer = read_tokenizer(source)
        try:
            with _quiet_loading() as logged:
                trunk, report = AutoModelForCausalLM.from_pretrained(
                    source,
                    dtype=dtype,
                    trust_remote_code=False,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,  # `_check_report` refuses them by name
                    output_loading_info=True,
                )
        except (OSError, ValueError) as error:
            raise _unreachable(source, error) from error
        except RuntimeError as error:  # experts that cannot be stacked; transformers names them in its log alone
            unfit = re.findall(r"^(\S+) +\| CONVERSION", "\n".join(record.getMessage() for record in logged), re.M)
            if not unfit:
                raise _unusable(source, "config.json or a weight", error) from error
            raise PolicyError(f"model={str(source)!r} has experts missing or of unequal shapes: {unfit[:5]}") from error
        except Exception as error:
            raise _unusable(source, "config.json or a weight", error) from error
        _refuse_untied(source, trunk)
        if not isinstance(trunk, DeepseekV3ForCausalLM):
            _check_report(source, config, report)
            return cls(trunk, None, tokenizer)
        policy, layers = cls(trunk, None, tokenizer), mtp_layers(config, files.shapes)
        if layers or add_mtp:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                policy.mtp = MTPHead(trunk.config).cast(dtype)
        elif config.num_nextn_predict_layers:
            LOGGER.warning(NO_HEAD, files.source, config.num_nextn_predict_layers)
        if policy.mtp is not None and layers:
            fill_head(policy.mtp, files.read(f"model.layers.{layers[0]}."), layers[0])
            for layer in layers[1:]:
                policy.further_mtp |= files.read(f"model.layers.{layer}.")
            if own := own_copies(files, layers[0], trunk):
                LOGGER.warning(OWN_COPIES, files.source, ", ".join(own))
        if policy.mtp is not None:
            policy.draft_ids = read_draft_vocabulary(files.source, trunk.config.vocab_size)
        if len(layers) > 1:
            LOGGER.warning(FURTHER_LAYERS, files.source, len(layers))
        return policy


def read_config(source: str | Path) -> PretrainedConfig:
    """The configuration of a folder or hub id. Raises PolicyError naming fields that contradict each other."""
    if why := hub.why_absent(source):
        raise _unreachable(source, why)
    refuse_type(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        faults = list(contradictions(config))
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from error
    except Exception as error:  # transformers reads a damaged file into whatever it meets first
        raise _unusable(source, "config.json", error) from error
    if faults:
        raise PolicyError(f"model={str(source)!r}: config.json contradicts itself: " + "; ".join(faults))
    return config


def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id. Raises PolicyError where it is missing or damaged, and where the generation
    config is: transformers passes over that in silence."""
    name = "generation_config.json"
    if why := hub.why_absent(source):
        raise _unreachable(source, why)
    try:
        if find_file(str(source), name):
            GenerationConfig.from_pretrained(source)
        name = "its tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer.encode("2 + 3 = ?")  # some damage shows when it is used
        return tokenizer
    except Exception as error:  # transformers and tokenizers read a damaged file into whatever they meet first
        raise PolicyError(
            f"model={str(source)!r}: {name} is missing or damaged ({error}); copy or download it again"
        ) from error


def _refuse_untied(source: str | Path, trunk: PreTrainedModel) -> None:
    """transformers keeps a stored LM head that differs from the embedding; what is built from the config would not."""
    head = trunk.get_output_embeddings()
    if trunk.config.tie_word_embeddings and head is not None and head.weight is not trunk.get_input_embeddings().weight:
        raise PolicyError(
            f"model={str(source)!r}: tie_word_embeddings=True in config.json contradicts the files, which hold an LM "
            "head that differs from the embedding; set it to false, or remove the head's tensor"
        )


def _unusable(source: str | Path, what: str, error: Exception) -> PolicyError:
    return PolicyError(f"model={str(source)!r}: {what} is not usable: {type(error).__name__}: {error}")


def _unreachable(source: str | Path, error: Exception | str) -> PolicyError:
    return PolicyError(
        f"model={str(source)!r} is neither a preset, a checkpoint folder nor a reachable hub id: {error}"
    )


@contextmanager
def _quiet_loading() -> Iterator[list[logging.LogRecord]]:
    """transformers logs the MTP layer's keys as unexpected; `_check_report` judges. Yields what was not shown."""
    library, bars = logging.getLogger("transformers"), transformers_logging.is_progress_bar_enabled()
    level, handlers, propagate = library.level, library.handlers, library.propagate
    kept = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)
    library.handlers, library.propagate = [kept], False  # transformers propagates where CI is set
    library.setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    try:
        yield kept.buffer
    finally:
        library.handlers, library.propagate = handlers, propagate
        library.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_report(source: str | Path, config: PretrainedConfig, report: dict) -> None:
    """Missing, misshapen and stray tensors are an error that names them; layers behind the last, MTP's, are none."""
    stray = set(report["unexpected_keys"])
    stray -= {n for layer in mtp_layers(config, stray) for n in stray if n.startswith(f"model.layers.{layer}.")}
    found: dict[str, Shape] = dict.fromkeys(stray, ())
    expected: dict[str, Shape] = dict.fromkeys(report["missing_keys"], ())
    for name, stored, own in report["mismatched_keys"]:
        found[name], expected[name] = tuple(stored), tuple(own)
    refuse_differences(source, expected, found)


def digest(weights: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes and bits, the same in every process (contract 5)."""
    whole = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
