"""By which code a model of transformers is sampled from and learned from: the fastest that agrees with its forward."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal, Self

Sampler = Literal["own", "joined", "apart", "whole"]
Rows = Literal["packed", "alone"]
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


@dataclass(frozen=True)
class Paths:
    """`sampler`: what keeps what was read; `rows`: how the learner reads a group. The load check chooses both.

    >>> str(Paths("joined", "alone"))
    "sampled by transformers' cache; every completion is read with its prompt"
    """

    sampler: Sampler = "own"
    rows: Rows = "packed"

    def __str__(self) -> str:
        return f"sampled by {SAMPLERS[self.sampler]}; {ROWS[self.rows]}"

    def to_bytes(self) -> bytes:
        """As it travels to a worker."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        return cls(**json.loads(content))


