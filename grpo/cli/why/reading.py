"""A step of the learner that is read while it is made: which group, and which token, its gradient came from.

The gradient is that of the trunk, before clipping, of every update of the step: with several updates on one batch all
of them together are one long vector. Every term of the loss is in it. The parts of the groups add up to the whole,
because each micro-batch gives a summand of the loss of the step (contract 10).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from grpo.algorithm import own
from grpo.config.loss import CorrectionMode, LossOptions
from grpo.learner.batch import MicroBatch, TrainingBatch, lay_out
from grpo.learner.learner import Learner
from grpo.learner.likelihood import Forward
from grpo.learner.row import PackedRow
from grpo.learner.terms.policy import PolicyTerm
from grpo.learner.terms.term import Term, Work

Gradient = list[Tensor | None]  # of each trained parameter of the trunk, None where it has none

NO_CLIP = 1e9  # a ratio never comes near it


@dataclass
class Part:
    """A group or a token has given this to the gradient: ⟨part, whole⟩ and |part|², over the updates of the step.
    `weights` are, by what may take some of it away, Σ|w without it - w| and Σ|w without it| over the tokens, where w is
    the derivative of the loss by the token's log-probability."""

    dot: float = 0.0
    square: float = 0.0
    weight: float = 0.0  # -Σ w of a token, for the loss as it is: above 0 its probability was raised
    weights: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def note(self, name: str, change: float, before: float) -> None:
        self.weights[name][0] += change
        self.weights[name][1] += before

    def removed(self) -> dict[str, float]:
        """Returns the share that each cause has changed: Σ|change| over Σ|w without it|, 0 where it has changed
        nothing.

        >>> Part(weights={"clip": [0.5, 2.0]}).removed()
        {'clip': 0.25}
        """
        return {name: changed / (before or 1.0) for name, (changed, before) in self.weights.items()}

    @property
    def norm(self) -> float:
        return math.sqrt(self.square)

    def cosine(self, whole: float) -> float:
        """Returns the cosine with the whole gradient, whose norm is `whole`; 0 without a part.

        >>> Part(dot=3.0, square=9.0).cosine(2.0)
        0.5
        """
        return self.dot / (self.norm * whole) if self.norm * whole else 0.0

    def cosine_with_rest(self, whole: float) -> float:
        """Returns the cosine with what the others gave, G - g: ⟨g, G - g⟩ / (|g| |G - g|); 0 without one of the two.

        >>> round(Part(dot=0.5, square=1.0).cosine_with_rest(1.0), 3)       # g = (1, 0), G = (.5, .866)
        -0.5
        """
        rest = math.sqrt(max(whole**2 - 2 * self.dot + self.square, 0.0))
        if rest <= 1e-6 * max(whole, self.norm) or not self.norm:
            return 0.0
        return (self.dot - self.square) / (self.norm * rest)


class Reader:
    """Reads a step of a `ReadLearner`. Without `wholes`, the gradients of its updates, it finds these; with them, the
    parts of each group, and of at most `most` tokens in each row of group `tokens_of`."""

    def __init__(self, wholes: Sequence[Gradient] | None = None, tokens_of: int | None = None, most: int = 0) -> None:
        self.known, self.tokens_of, self.most = wholes, tokens_of, most
        self.wholes: list[Gradient] = []
        self.groups: defaultdict[int, Part] = defaultdict(Part)
        self.tokens: defaultdict[tuple[int, int], Part] = defaultdict(Part)  # by Sample.index and place in it
        self._sum: Gradient = []
        self._open: tuple[int, Gradient] | None = None  # a group and what its rows so far have given
        self._update, self._group = 0, 0

    @property
    def norm(self) -> float:
        """The whole gradient has this norm."""
        return math.sqrt(sum(dot(whole, whole) for whole in self.wholes))

    def weigh(
        self, learner: ReadLearner, mini: MicroBatch, out: Forward, loss: Tensor, others: dict[str, Tensor]
    ) -> None:
        """Reads the weights of the tokens of one row, with what changed them; then the tokens' own gradients. `loss` is
        the policy loss as it is; `others` are the losses without a clip, a mask or a correction, and "as it is" what
        they are compared with."""
        self._group = mini.rows[0].group
        if self.known is None:
            return
        weights_CL, on_CL = _by_logprob(loss, out), _by_logprob(others.pop("as it is"), out)
        off = {name: _by_logprob(other, out) for name, other in others.items()}
        for name, off_CL in off.items():
            self.groups[self._group].note(name, (off_CL - on_CL).abs().sum().item(), off_CL.abs().sum().item())
        if self._group != self.tokens_of:
            return
        for c, t in self._chosen(mini, torch.stack([weights_CL, *off.values()]).abs().amax(0)):
            part = self.tokens[mini.samples[c].index, mini.samples[c].start + t]
            self._read_token(learner, part, out.logprobs[c, t], weights_CL[c, t].item())
            for name, off_CL in off.items():
                part.note(name, (off_CL - on_CL)[c, t].abs().item(), off_CL[c, t].abs().item())

    def _chosen(self, mini: MicroBatch, strength_CL: Tensor) -> list[tuple[int, int]]:
        """Returns completion and position of the strongest tokens of a row; they are the same at every update."""
        if self._update:
            place = {
                (sample.index, sample.start + t): (c, t)
                for c, sample in enumerate(mini.samples)
                for t in range(len(sample.token_ids))
            }
            return [place[token] for token in self.tokens if token in place]
        order = strength_CL.flatten().argsort(descending=True, stable=True)[: self.most].tolist()
        pairs = [divmod(number, strength_CL.shape[1]) for number in order]
        return [(c, t) for c, t in pairs if strength_CL[c, t] > 0]

    def _read_token(self, learner: ReadLearner, part: Part, logprob: Tensor, weight: float) -> None:
        if weight == 0.0 or self.known is None:
            return
        parts = torch.autograd.grad(logprob, learner.moved, retain_graph=True, allow_unused=True)
        gradient: Gradient = [None if one is None else one.float() * weight for one in parts]
        part.dot += dot(gradient, self.known[self._update])
        part.square += dot(gradient, gradient)
        part.weight -= weight

    def read(self, learner: ReadLearner, done: int, total: int) -> None:
        """Reads what a row gave: after its backward pass, and before the update that follows the last one."""
        part = learner.take_gradient()
        if self.known is not None:
            if self._open is not None and self._open[0] != self._group:
                self._close()
            self._open = self._group, add(self._open[1] if self._open else [], part)
        self._sum = add(self._sum, part)
        if done % (total // learner.options.updates_per_batch) == 0:
            if self.known is not None:
                self._close()
            self.wholes.append([None if one is None else one.clone() for one in self._sum])  # clipping changes them
            learner.put_gradient(self._sum)
            self._sum, self._update = [], self._update + 1

    def _close(self) -> None:
        assert self._open is not None
        assert self.known is not None
        (number, gradient), self._open = self._open, None
        self.groups[number].dot += dot(gradient, self.known[self._update])
        self.groups[number].square += dot(gradient, gradient)


class ReadLearner(Learner):
    """A `reader` may read a step of this learner. Each row is then a micro-batch, group after group."""

    reader: Reader | None = None

    def read(self, reader: Reader, batch: TrainingBatch) -> Reader:
        """Take the step, and read it."""
        terms, self.reader = self.terms, reader
        self.terms = [ReadTerm(terms[0], self, reader), *terms[1:]]
        try:
            self.step(batch, on_micro_batch=lambda done, total: reader.read(self, done, total))
        finally:
            self.terms, self.reader = terms, None
        return reader

    @property
    def moved(self) -> list[nn.Parameter]:
        """The trained parameters of the trunk are in this order."""
        return [parameter for parameter in self.policy.trunk.parameters() if parameter.requires_grad]

    def take_gradient(self) -> Gradient:
        """Returns what the backward passes since the last call gave; it leaves the parameters."""
        masters = [self.masters.of(parameter) for parameter in self.moved]
        gradient = [tensor.grad for tensor in masters]
        for tensor in masters:
            tensor.grad = None
        return gradient

    def put_gradient(self, gradient: Gradient) -> None:
        for parameter, part in zip(self.moved, gradient, strict=True):
            self.masters.of(parameter).grad = part

    def _shared(self, rows: Sequence[PackedRow]) -> Iterator[MicroBatch]:
        if self.reader is None:
            yield from super()._shared(rows)
            return
        for row in sorted(rows, key=lambda row: row.group):
            yield lay_out([row])


class ReadTerm(PolicyTerm):
    """This policy loss of a learner gives the weights of the tokens to a reader."""

    def __init__(self, term: Term, learner: ReadLearner, reader: Reader) -> None:
        assert isinstance(term, PolicyTerm)
        super().__init__(term.options, sampler_differs=term.sampler_differs, longest=term.longest)
        self.learner, self.reader = learner, reader

    def scalar(self, mini: MicroBatch, forward: Forward, work: Work) -> Tensor:
        loss, others = super().scalar(mini, forward, work), {}
        notes, settled, options = work.notes, work.fixed[self.name], self.options
        if self.reader.known is not None:
            for name, (changed, correction) in without(options, settled.correction).items():
                work.notes, work.fixed[self.name] = defaultdict(list), replace(settled, correction=correction)
                self.options = changed
                others[name] = super().scalar(mini, forward, work)
        work.notes, work.fixed[self.name], self.options = notes, settled, options
        self.reader.weigh(self.learner, mini, forward, loss, others)
        return loss


def without(
    options: LossOptions, correction: CorrectionMode | None
) -> dict[str, tuple[LossOptions, CorrectionMode | None]]:
    """Returns the loss without each thing that takes from a token, and "as it is"; KL and entropy are left out.

    >>> list(without(LossOptions(mask_truncated_completions=True), "token_truncate"))
    ['as it is', 'clip', 'truncation', 'importance weights']
    """
    plain = options.model_copy(update={"beta": 0.0, "entropy_coef": 0.0})
    losses = {"as it is": (plain, correction)}
    if options.loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo") and not own.is_own(options.loss_type):
        open_ = {"epsilon": NO_CLIP, "epsilon_high": NO_CLIP, "delta": None}
        losses["clip"] = plain.model_copy(update=open_), correction
    if options.mask_truncated_completions:
        losses["truncation"] = plain.model_copy(update={"mask_truncated_completions": False}), correction
    if options.top_entropy_quantile < 1:
        losses["low entropy"] = plain.model_copy(update={"top_entropy_quantile": 1.0}), correction
    if correction is not None:
        losses["importance weights"] = plain, None
    return losses


def dot(a: Gradient, b: Gradient) -> float:
    """Returns ⟨a, b⟩ over all parameters."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return math.fsum(torch.dot(x.flatten(), y.flatten()).item() for x, y in pairs)


def add(a: Gradient, b: Gradient) -> Gradient:
    """Returns a + b; an empty `a` is nothing. The tensors of `a` may change."""
    if not a:
        return [None if part is None else part.clone() for part in b]
    return [y if x is None else x if y is None else x.add_(y) for x, y in zip(a, b, strict=True)]


def _by_logprob(loss: Tensor, out: Forward) -> Tensor:
    """Returns [C, L]: the derivative of a loss by the log-probability of each token."""
    if not loss.requires_grad:
        return torch.zeros_like(out.logprobs)
    [weights] = torch.autograd.grad(loss, out.logprobs, retain_graph=True, allow_unused=True)
    return torch.zeros_like(out.logprobs) if weights is None else weights
