"""What a training client moves: a policy with adapters over a base that others share, or one of its own, and AdamW."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.learner import LearnerOptions
from grpo.learner import state
from grpo.learner.master_weights import MasterWeights
from grpo.learner.optimizer import freeze_exact_parts, groups_of
from grpo.learner.parallel import ONE_PROCESS
from grpo.learner.update import NonFiniteStep, Update
from grpo.tinker.losses import Loss, check_datum, loss_of
from grpo.tinker.wire import Datum, ForwardBackward, Outputs, Refused
from policies.logprobs import logprobs_from_hidden
from policies.lora import matrices
from policies.policy import Policy

ALPHA = 32.0  # of every adapter, whose product is scaled by ALPHA / rank, as Tinker's are
OPTIONS = LearnerOptions(learning_rate=1.0)  # requests bring their rates
_DRAWS = threading.Lock()  # the first values of adapters are drawn from the generator of the process


@dataclass(frozen=True)
class Spec:
    """What is trained: adapters of this rank, with first values from `seed`, or with rank 0 all weights."""

    rank: int = 32
    seed: int = 0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def build(self, base: Policy) -> Policy:
        """A policy to be trained, whose frozen weights are those of `base`. Raises Refused where nothing would learn.

        The LM head gets an adapter unless it is the embedding, too.
        """
        if self.rank == 0:
            policy = copy.deepcopy(base)
            for part in (policy.trunk.get_decoder(), policy.trunk.get_output_embeddings()):
                part.requires_grad_(True)
        else:
            policy = base.sharing(head=True)
            with _DRAWS:
                torch.manual_seed(self.seed)
                policy.add_lora(self.rank, ALPHA, self._targets(policy.trunk))
        if policy.mtp is not None:
            policy.mtp.requires_grad_(False)
        freeze_exact_parts(policy)
        return policy

    def _targets(self, trunk: nn.Module) -> list[str]:
        targets = set()
        for each in matrices(trunk):
            of_attention = any("attn" in part or "attention" in part for part in each.module.split("."))
            if not each.why_not and (self.train_attn if of_attention else self.train_mlp):
                targets |= set(each.targets[:1])
        targets.discard("lm_head")
        if self.train_unembed and not getattr(trunk.config, "tie_word_embeddings", False):
            targets.add("lm_head")
        if not targets:
            raise Refused("lora_config: the LM head of this model is its embedding, too; train_attn or train_mlp")
        return sorted(targets)


class Trainer:
    """One training client's policy. Gradients add up from `forward_backward` to `optim_step`."""

    def __init__(self, base: Policy, spec: Spec) -> None:
        self.spec = spec
        self.policy = spec.build(base)
        self.masters = MasterWeights(self.policy)
        self.update = Update(self.masters, groups_of(self.policy.trunk, 1.0, 0.0), OPTIONS, lambda step: 1.0)

    def forward_backward(self, request: ForwardBackward) -> Outputs:
        """The log-probability of every target, and the gradient of the loss beside those that wait. Raises Refused.
        Where a gradient cannot be computed, those that wait are gone, and the error says so."""
        loss, settings = loss_of(request.loss, request.settings)
        vocabulary = self.policy.trunk.get_input_embeddings().num_embeddings
        if not request.data:
            raise Refused("data: there is no datum")
        for place, datum in enumerate(request.data):
            check_datum(datum, place, request.loss, vocabulary, self.policy.max_length)
        try:
            return self._add_up(request, loss, settings)
        except Exception as error:
            if not request.backward:
                raise
            self.update.zero()  # a part of its gradient may be among those of earlier requests
            kind = Refused if isinstance(error, Refused) else RuntimeError
            raise kind(f"{error}; the gradients that waited are dropped") from error

    def _add_up(self, request: ForwardBackward, loss: Loss, settings: Mapping[str, float]) -> Outputs:
        outputs = Outputs([{} for _ in request.data])
        total = 0.0
        with torch.set_grad_enabled(request.backward):
            for places in _cut([len(datum.tokens) for datum in request.data], OPTIONS.tokens_per_micro_batch):
                data = [request.data[place] for place in places]
                logprobs = self._logprobs(data)
                losses = [_loss(loss, each, datum, settings) for each, datum in zip(logprobs, data, strict=True)]
                whole = torch.stack(losses).sum()
                if not math.isfinite(whole.item()):
                    raise Refused(f"the loss is {whole.item()}")
                if request.backward and whole.requires_grad:
                    self.update.backward(whole, 0, ONE_PROCESS)
                total += whole.item()
                for place, each in zip(places, logprobs, strict=True):
                    outputs.by_datum[place] = {"logprobs": each.detach()}
        outputs.metrics["loss:sum"] = total
        return outputs

    def _logprobs(self, data: Sequence[Datum]) -> list[Tensor]:
        """Log-probabilities of the targets of each datum, [N] or [N, K], in float32."""
        device, longest = self.policy.device, max(len(datum.tokens) for datum in data)
        ids, segment = torch.zeros(len(data), longest, dtype=torch.long), torch.full((len(data), longest), -1)
        for row, datum in enumerate(data):
            ids[row, : len(datum.tokens)] = torch.tensor(datum.tokens)
            segment[row, : len(datum.tokens)] = 0
        positions = torch.arange(longest).expand_as(ids)
        hidden = self.policy.hidden(ids.to(device), positions.to(device), segment.to(device))
        targets = [datum.inputs["target_tokens"].reshape(len(datum.tokens), -1) for datum in data]
        states = [hidden[row, : len(of)].repeat_interleave(of.shape[1], dim=0) for row, of in enumerate(targets)]
        asked = torch.cat([of.flatten() for of in targets]).to(device)
        logprobs, _ = logprobs_from_hidden(torch.cat(states), self.policy.output, asked)
        parts = logprobs.cpu().split([of.numel() for of in targets])
        return [part.view(datum.inputs["target_tokens"].shape) for part, datum in zip(parts, data, strict=True)]

    def optim_step(self, params: Mapping[str, float]) -> dict[str, float]:
        """One step of AdamW with the numbers of Tinker's AdamParams; the gradients are used up. Raises Refused."""
        for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
            if not (math.isfinite(params[name]) and params[name] >= 0):
                raise Refused(f"adam_params.{name}={params[name]}: use a finite number, 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= params[name] < 1:
                raise Refused(f"adam_params.{name}={params[name]}: use a number from 0, and below 1")
        numbers = {"betas": (params["beta1"], params["beta2"]), "eps": params["eps"]}
        for group in self.update.optimizer.param_groups:
            group.update(numbers, weight_decay=params["weight_decay"])
        self.update.options = OPTIONS.model_copy(update={"max_grad_norm": params["grad_clip_norm"] or math.inf})
        try:
            norms = self.update.make(0, ONE_PROCESS, {"": self.policy.trunk}, params["learning_rate"])
        except NonFiniteStep as error:
            raise Refused(f"optim_step: {error}; nothing moved, and the gradients are dropped") from None
        self.update.zero()
        return {"grad_norm": norms[""], "learning_rate": params["learning_rate"]}

    def state(self, *, optimizer: bool = True) -> state.Tensors:
        """What is trained, and with `optimizer` AdamW's moments."""
        tensors = state.collect_tensors(self.policy, self.masters, self.update.optimizer, {})
        return tensors if optimizer else {"policy": tensors["policy"]}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], *, optimizer: bool = True) -> None:
        """The inverse of `state`. Raises Refused for tensors of another kind of model."""
        moments = tensors.get("optimizer", {}) if optimizer else {}
        self.update.zero()
        try:
            parts = {"policy": tensors["policy"], "optimizer": moments}
            state.put(parts, self.policy, self.masters, self.update.optimizer, {})
        except ValueError as error:
            raise Refused(str(error)) from None


def _loss(loss: Loss, logprobs: Tensor, datum: Datum, settings: Mapping[str, float]) -> Tensor:
    return loss.of(logprobs, datum.inputs, settings)


def _cut(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The places of data that are read together: of similar length, and at most `most` padded tokens.

    >>> list(_cut([5, 1, 4, 9], most=10))
    [[1, 2], [0], [3]]
    """
    part: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if part and lengths[place] * (len(part) + 1) > most:
            yield part
            part = []
        part.append(place)
    if part:
        yield part
