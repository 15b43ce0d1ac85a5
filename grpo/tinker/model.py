"""What a training client moves: a learner over adapters on a base that others share, or over a policy of its own."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo.config.learner import LearnerOptions
from grpo.learner.batch import TrainingBatch, micro_batches
from grpo.learner.learner import Learner
from grpo.learner.optimizer import LEAST_EPS
from grpo.learner.state import Tensors
from grpo.learner.terms.token_losses import TokenLoss
from grpo.learner.update import NonFiniteStep
from grpo.tinker.data import DataTerm, States, batch_of, check_datum, loss_of
from grpo.tinker.wire import ForwardBackward, Outputs, Refused
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


def learner_of(base: Policy, spec: Spec) -> Learner:
    """The learner of a new model. It shares the weights of `base` that it does not train. Raises Refused."""
    policy = spec.build(base)
    first = DataTerm((), TokenLoss("cross_entropy"))  # each request brings its own
    return Learner(policy, OPTIONS, [first], States(policy))


def forward_backward(learner: Learner, request: ForwardBackward) -> Outputs:
    """The log-probability of every target, and the sum of the loss. Its gradient is added to what waits for
    `optim_step`, unless only a forward is asked for.

    Raises Refused for data that the loss cannot read, and for a loss that is not finite. After an error in the
    computation of a gradient no gradient waits, and the error says so.
    """
    loss, policy = loss_of(request.loss, request.settings), learner.policy
    vocabulary = policy.trunk.get_input_embeddings().num_embeddings
    if not request.data:
        raise Refused("data: there is no datum")
    for place, datum in enumerate(request.data):
        check_datum(datum, place, request.loss, vocabulary, policy.max_length)
    term, batch = DataTerm(request.data, loss), batch_of(request.data, learner.updates + 1)
    total = _with_gradient(learner, batch, term) if request.backward else _without_gradient(learner, batch, term)
    logprobs = [{"logprobs": term.found[place]} for place in range(len(request.data))]
    return Outputs(logprobs, {"loss:sum": total})


def _with_gradient(learner: Learner, batch: TrainingBatch, term: DataTerm) -> float:
    try:
        return learner.forward_backward(batch, term)["loss:sum"]
    except Exception as error:  # the learner has dropped the gradients that waited
        kind = Refused if isinstance(error, Refused) else RuntimeError
        raise kind(f"{error}; the gradients that waited are dropped") from error


@torch.no_grad()
def _without_gradient(learner: Learner, batch: TrainingBatch, term: DataTerm) -> float:
    total, policy = 0.0, learner.policy
    for mini in micro_batches(batch.rows, learner.options.tokens_per_micro_batch, policy.device):
        states = learner.likelihood.forward(mini).preceding
        total += term.sum_of(mini, states, policy).item()
    return total


def optim_step(learner: Learner, params: Mapping[str, float]) -> dict[str, float]:
    """One step of AdamW with the numbers of Tinker's AdamParams; the gradients are used up. Nothing moves where none
    waits. Raises Refused."""
    for name, least in {"learning_rate": 0, "eps": LEAST_EPS, "weight_decay": 0, "grad_clip_norm": 0}.items():
        if not (math.isfinite(params[name]) and params[name] >= least):
            raise Refused(f"adam_params.{name}={params[name]}: use a finite number, {least} or more")
    for name in ("beta1", "beta2"):
        if not 0 <= params[name] < 1:
            raise Refused(f"adam_params.{name}={params[name]}: use a number from 0, and below 1")
    learner.set_numbers(betas=(params["beta1"], params["beta2"]), eps=params["eps"])
    for group in learner.optimizer.param_groups:  # vectors too: set_numbers has weight decay on matrices only
        group["weight_decay"] = params["weight_decay"]
    learner.update.options = OPTIONS.model_copy(update={"max_grad_norm": params["grad_clip_norm"] or math.inf})
    try:
        metrics = learner.optim_step(params["learning_rate"])
    except NonFiniteStep as error:
        raise Refused(f"optim_step: {error}; nothing moved, and the gradients are dropped") from None
    return {"grad_norm": metrics.get("learner/grad_norm", 0.0), "learning_rate": params["learning_rate"]}


def state_of(learner: Learner, *, optimizer: bool = True) -> Tensors:
    """What is trained, and with `optimizer` AdamW's moments."""
    tensors, _ = learner.state()
    return tensors if optimizer else {"policy": tensors["policy"]}


def load_state(learner: Learner, tensors: Mapping[str, Mapping[str, Tensor]], *, optimizer: bool = True) -> None:
    """The inverse of `state_of`; no gradient waits. Raises Refused for tensors of another kind of model."""
    moments = tensors.get("optimizer", {}) if optimizer else {}
    try:
        learner.load_state({"policy": tensors["policy"], "optimizer": moments}, {"policy_version": 0})
    except ValueError as error:
        raise Refused(str(error)) from None
