"""The rows of a shard that are being decoded, and the prompts that they continue. Shard and drafter share them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policies.decoding.latent_cache import LatentCache


def prefill_size(lengths: Sequence[int], tokens: int) -> int:
    """Counts how many prompts the next prefill reads, of those with these descending lengths: at most `tokens` with
    padding, and at most a fourth of that where padding would be more than a tenth. It is one at least.

    >>> prefill_size([40, 40, 39, 10, 10], 200), prefill_size([40, 10, 10], 1000), prefill_size([99], 10)
    (3, 3, 1)
    """
    unpadded = 0
    for size, length in enumerate(lengths):
        unpadded += length
        if size and lengths[0] * (size + 1) > min(tokens, max(tokens / 4, 1.1 * unpadded)):
            return size
    return len(lengths)


@dataclass
class Prefilled:
    """Prompts of one prefill, by number, and their hidden states, which the draft head reads if it ever drafts. Where
    the first tokens of all were read before, these are the others, and `heads` are the draft head's caches: they have
    entries up to the first of the others."""

    numbers_P: Tensor
    token_ids_PT: Tensor
    hidden_PTD: Tensor
    lengths_P: Tensor
    heads: Sequence[LatentCache] = ()

    def select(self, needed_P: Tensor) -> Prefilled:
        """Some of the prompts."""
        heads = [self.heads[i] for i in needed_P.nonzero()[:, 0].tolist()] if self.heads else ()
        tensors = {name: value[needed_P] for name, value in vars(self).items() if name != "heads"}
        return Prefilled(**tensors, heads=heads)


@dataclass
class Rows:
    """State of the live rows, [R] first everywhere. A row that has ended stays until `select` leaves it out.

    The draft head reads a token only when it next drafts after it. Until then it is one of the `unread` that
    `Drafter` holds.
    """

    index: Tensor  # prompt · G + sample: the row's place in the results
    keys_R2: Tensor  # of its noise
    prompt_length: Tensor
    last: Tensor  # its newest token, which the trunk has not read yet
    count: Tensor  # tokens of its completion so far, `last` included
    alive: Tensor  # False once it has ended, and while it waits for its tools
    waits: Tensor  # True while it waits for its tools
    unread: Tensor  # how many tokens the draft head has not read
    since: Tensor  # the number of the first tokens of the row among all that `Drafter` was given

    @classmethod
    def start(cls, index: Tensor, keys_R2: Tensor, prompt_length: Tensor, since: int) -> Rows:
        """Makes rows without a token. Their first has the number `since`."""
        none, alive = torch.zeros_like(index), torch.ones_like(index, dtype=torch.bool)
        waits, first = torch.zeros_like(alive), torch.full_like(index, since)
        return cls(index, keys_R2, prompt_length, none, none, alive, waits, none, first)

    @property
    def every(self) -> Tensor:
        """The numbers 0 … R - 1, to name each row in an index."""
        return torch.arange(len(self.index), device=self.index.device)

    def select(self, rows: Tensor) -> Rows:
        """A copy of these rows."""
        return Rows(**{name: value[rows] for name, value in vars(self).items()})

    def put(self, rows: Tensor, part: Rows) -> None:
        """The inverse of `select`: these rows become those of `part`."""
        for name, value in vars(part).items():
            vars(self)[name] = vars(self)[name].index_copy(0, rows, value)

    @staticmethod
    def concat(parts: Sequence[Rows]) -> Rows:
        tensors = {}
        for name in vars(parts[0]):
            tensors[name] = torch.cat([vars(part)[name] for part in parts])
        return Rows(**tensors)


@dataclass
class Drafted:
    """Drafts [R, K]. `confident_RK` are taken unverified (`accept: margin`)."""

    tokens_RK: Tensor
    confident_RK: Tensor | None = None

    @property
    def depth(self) -> int:
        return self.tokens_RK.shape[1]


@dataclass
class Tokens:
    """What a round gives R rows: S tokens each, of which they keep the first `kept`."""

    targets: Tensor  # [R, S], the trunk's own choices
    logprobs: Tensor  # [R, S]
    hidden: Tensor  # [R, S, D], the states that precede them
    kept: Tensor  # [R]
    stopped: Tensor  # [R], whether the last token that is kept ends the completion
    drafted: Drafted | None = None
    accepted: Tensor | None = None  # [R], drafts that were right
    cut: Tensor | None = None  # [R], whether a stop string ends it; no graph finds one
