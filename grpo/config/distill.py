"""Options of on-policy distillation."""

from __future__ import annotations

import re

from pydantic import Field

from rewards.config.options import Options


class DistillOptions(Options):
    """`loss.advantage: distill`: a teacher's log-probabilities of what the policy itself has sampled are what it learns
    from (on-policy distillation; the gradient is that of the reverse KL of every token)."""

    teacher: str | None = None
    """The teacher: a checkpoint folder, a run folder or a hub id, of any architecture, with the policy's tokenizer. It
    is loaded here, or asked at a server, such as MODEL@http://127.0.0.1:8000/v1 of `vllm serve MODEL`. A server scores
    at temperature 1 only. The environment variable QUARTET_TEACHER_TOKEN holds its key, if it wants one. The tokenizer
    is read here either way."""
    top_k: int | None = Field(default=None, ge=1)
    """Learn from the KL over the teacher's k likeliest tokens and all others as one, at every token. null learns from
    the token that was sampled, whose gradient is in expectation that of the exact KL."""

    @property
    def model(self) -> str | None:
        """The teacher without its server."""
        return None if self.teacher is None else re.split("@(?=https?://)", self.teacher)[0]

    @property
    def url(self) -> str | None:
        """The server that holds the teacher; None: it is loaded here."""
        _, *urls = re.split("@(?=https?://)", self.teacher or "")
        return urls[0] if urls else None
