"""The data of Tinker's API for our learner: what a loss reads of a datum, rows of tokens, and the term of the loss.

A datum has a target, or several, at each of its tokens, which need not be the token that comes next. So its targets are
not part of a row: a row is the tokens of one datum, and the term scores the targets by the hidden states of the tokens.
Axes: B data of a micro-batch, T tokens of a row (padded), N tokens of a datum, K targets of a token, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grpo.learner.batch import MicroBatch, TrainingBatch
from grpo.learner.likelihood import Forward, Likelihood
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.custom import PerToken
from grpo.learner.terms.term import Work
from grpo.learner.terms.token_losses import LOSSES, TokenLoss, fault_of
from grpo.tinker.wire import Datum, Refused
from policies.logprobs import logprobs_from_hidden
from policies.policy import Policy

OF_POLICY = ("logprobs", "advantages")
INPUTS = {  # what a loss reads of a datum in addition to target_tokens, where it is not OF_POLICY
    "cross_entropy": ("weights",),
    "gspo": (*OF_POLICY, "sequence_ratio_mask"),
}
UNPUBLISHED = {
    "stable_reinforce": "its formula is not published; use importance_sampling, ppo, cispo or gspo",
    "custom": "a loss that the server compiles; the SDK runs forward_backward_custom at the client here",
}


def loss_of(name: str, settings: Mapping[str, float | str]) -> TokenLoss:
    """The loss of this name with its settings. Raises Refused for another name, or a setting that it does not have."""
    if name not in LOSSES:
        why = UNPUBLISHED.get(name, f"there is none of this name; use {', '.join(LOSSES)}")
        raise Refused(f"loss_fn={name!r:.80}: {why}")
    numbers: dict[str, float] = {}
    for key, value in settings.items():
        if why := fault_of(name, key, value):
            raise Refused(f"loss_fn_config[{key!r:.80}]={value!r:.80}: {why}")
        numbers[key] = float(value)
    return TokenLoss(name, **numbers)


def check_datum(datum: Datum, place: int, name: str, vocabulary: int, context: int) -> None:
    """Raises Refused for a datum that this loss cannot read, and says where. Weights of cross_entropy are 1 where there
    are none."""
    tokens, targets = len(datum.tokens), datum.inputs.get("target_tokens")
    if not 0 < tokens <= context:
        raise Refused(f"data[{place}].model_input has {tokens} tokens; the context is 1 to {context}")
    if targets is None or targets.is_floating_point() or targets.dim() not in (1, 2) or len(targets) != tokens:
        raise Refused(f"data[{place}]: target_tokens must be int64 of shape [{tokens}] or [{tokens}, K]")
    for what, ids in (("model_input", torch.tensor(datum.tokens)), ("target_tokens", targets)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise Refused(f"data[{place}].{what} has a token outside the vocabulary of {vocabulary}")
    wanted = INPUTS.get(name, OF_POLICY)
    if name == "cross_entropy" and "weights" not in datum.inputs:
        datum.inputs["weights"] = torch.ones(targets.shape)
    for key, value in datum.inputs.items():
        if key not in (*wanted, "target_tokens"):
            raise Refused(f"data[{place}].loss_fn_inputs[{key!r:.80}]: {name} reads target_tokens, {', '.join(wanted)}")
        if value.shape != targets.shape:
            raise Refused(f"data[{place}].{key} is {list(value.shape)!s:.80}, target_tokens is {list(targets.shape)}")
        if not torch.isfinite(value).all():
            raise Refused(f"data[{place}].{key} has a number that is not finite")
    for key in wanted:
        if key not in datum.inputs:
            raise Refused(f"data[{place}]: {name} reads {key}, which is missing")
    if "sequence_ratio_mask" in wanted and not datum.inputs["sequence_ratio_mask"].any():
        raise Refused(f"data[{place}].sequence_ratio_mask marks no token")


def batch_of(data: Sequence[Datum], step: int) -> TrainingBatch:
    """Each datum in a row of its own, of which no token is scored."""
    rows = [PackedRow(datum.tokens, [Sample(place, [])], group=place) for place, datum in enumerate(data)]
    return TrainingBatch(rows, torch.zeros(len(rows), 1), len(rows), 0, step)


class States(Likelihood):
    """The forward passes of a policy that learns from data. They score nothing: the term does, at temperature 1."""

    def forward(self, mini: MicroBatch, policy: Policy | None = None, temperature: float | None = None) -> Forward:
        """`preceding` has the hidden state of each token [B, T, D], which predicts its targets."""
        policy = policy or self.policy
        states = policy.hidden(*mini.laid)
        nothing = states.new_zeros(mini.mask.shape)
        return Forward(nothing, nothing, states)


class DataTerm(PerToken):
    """The sum of a loss over the targets of these data. `found` has the log-probabilities of the targets of each datum,
    [N] or [N, K] in nats, once it was read."""

    reads_trees = False  # a tree has no row for each datum

    def __init__(self, data: Sequence[Datum], loss: TokenLoss) -> None:
        super().__init__(loss)
        self.data = data
        self.found: dict[int, Tensor] = {}

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        total = self.sum_of(mini, forward.preceding, work.likelihood.policy)
        work.note("loss:sum", total)
        return total

    def sum_of(self, mini: MicroBatch, states: Tensor, policy: Policy) -> Tensor:
        """The loss of a micro-batch with these hidden states [B, T, D]. Raises Refused if it is not finite."""
        places = [sample.index for sample in mini.samples]
        logprobs = self._logprobs(dict(zip(places, states, strict=True)), policy)
        losses = [self._loss_of(self.data[place], logprobs[place]) for place in places]
        total = torch.stack(losses).sum()
        if not math.isfinite(total.item()):
            raise Refused(f"the loss is {total.item()}")
        self.found |= {place: logprobs[place].detach() for place in places}
        return total

    def _loss_of(self, datum: Datum, logprobs: Tensor) -> Tensor:
        """All targets of a datum count as one sequence."""
        flat = {name: values.flatten() for name, values in datum.inputs.items()}
        none = torch.zeros(logprobs.numel())
        sampled, weights = flat.get("logprobs", none), flat.get("weights", none)
        advantages, mask = flat.get("advantages", weights), flat.get("sequence_ratio_mask", none + 1)
        return self.function(logprobs.flatten(), sampled, advantages, mask).sum()

    def _logprobs(self, states: Mapping[int, Tensor], policy: Policy) -> dict[int, Tensor]:
        """Log-probabilities of the targets, by the place of their datum, from states [T, D] by place. The LM head reads
        the data with the same number of targets at once."""
        targets = {place: self.data[place].inputs["target_tokens"] for place in states}
        head = policy.output
        found: dict[int, Tensor] = {}
        for shape in sorted({of.shape[1:] for of in targets.values()}):
            alike = {place: of for place, of in targets.items() if of.shape[1:] == shape}
            hidden = torch.cat([states[place][: len(of)] for place, of in alike.items()])
            logprobs, _ = logprobs_from_hidden(hidden, head, torch.cat(list(alike.values())).to(hidden.device))
            parts = logprobs.cpu().split([len(of) for of in alike.values()])
            found |= dict(zip(alike, parts, strict=True))
        return found
