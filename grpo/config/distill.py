"""Options of on-policy distillation."""

from __future__ import annotations

from pydantic import Field

from rewards.config.options import Options


class DistillOptions(Options):
    """`loss.advantage: distill`: a teacher's log-probabilities of what the policy itself has sampled are what it learns
    from (on-policy distillation; the gradient is that of the reverse KL of every token)."""

    teacher: str | None = None
    """The teacher: a checkpoint folder, a run folder or a hub id, of any architecture, with the policy's tokenizer."""
    url: str | None = None
    """A server that holds the teacher, such as http://127.0.0.1:8000/v1 of `vllm serve TEACHER`; null loads it here. It
    is asked for the model `teacher`, whose tokenizer is read here, and scores at temperature 1 alone. The environment
    variable QUARTET_TEACHER_TOKEN holds the server's key, where it wants one."""
    top_k: int | None = Field(default=None, ge=1)
    """Learn from the KL over the teacher's k likeliest tokens and all others as one, at every token. null learns from
    the token that was sampled, whose gradient is in expectation that of the exact KL."""
