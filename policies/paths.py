"""By which code a model of transformers is sampled from and learned from: the fastest that agrees with its forward."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal, Self

Sampler = Literal["own", "joined", "apart", "whole"]
Rows = Literal["packed", "alone"]
States = Literal["decoder", "head"]
SAMPLERS: dict[Sampler, str] = {
    "own": "our cache",
    "joined": "transformers' cache",
    "apart": "transformers' cache, one forward for each length of rows",
    "whole": "no cache, every row read anew for each token, which is slow",
}
ROWS: dict[Rows, str] = {
    "packed": "a prompt is read once for its completions",
    "alone": "every completion is read with its prompt",
}
STATES: dict[States, str] = {
    "decoder": "the LM head multiplies what the decoder gives",
    "head": "the LM head multiplies what its own forward gives it",
}


@dataclass(frozen=True)
class Paths:
    """`sampler`: what keeps what was read; `rows`: how the learner reads a group; `states`: what gives the states that
    the LM head multiplies, the decoder or, in models that change them again, a forward that ends at the LM head. The
    load check chooses them, and `slower` says of each faster path why it was not taken.

    >>> str(Paths("joined", "alone"))
    "sampled by transformers' cache; every completion is read with its prompt"
    """

    sampler: Sampler = "own"
    rows: Rows = "packed"
    states: States = "decoder"
    slower: tuple[str, ...] = field(default=(), compare=False)

    @property
    def with_reasons(self) -> str:
        """The paths, and why no faster ones were taken.

        >>> Paths("joined", slower=("not 'our cache': it differs by 6",)).with_reasons.partition("; ")[2]
        "a prompt is read once for its completions (not 'our cache': it differs by 6)"
        """
        return f"{self} ({'; '.join(self.slower)})" if self.slower else str(self)

    def __str__(self) -> str:
        return f"sampled by {SAMPLERS[self.sampler]}; {ROWS[self.rows]}"

    def to_bytes(self) -> bytes:
        """Writes it as JSON, which travels to a worker."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        fields = json.loads(content)
        return cls(**fields | {"slower": tuple(fields.get("slower", ()))})
