"""Options of `quartet serve`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from grpo.config.policy import ModelOptions
from grpo.config.sampling import AnswerOptions
from rewards.config.data import TemplateOptions

WAIT_S = 0.05  # a request waits so long for others before it joins a running batch: each join moves the caches of all
MOST_WAITING = 128  # completions that wait for a free row; a request for more is answered with status 429
SHUTDOWN_S = 30  # that running requests have after SIGTERM; Kubernetes waits as long


class ServedRolloutOptions(AnswerOptions):
    """How the policy answers."""

    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of requests that name none; 0 is greedy."""
    max_completion_tokens: int = Field(default=256, ge=1)
    """Longest completion of requests that name no limit, in tokens."""


class ServeConfig(ModelOptions):
    """A policy for other programs, by OpenAI's API. A run folder brings its temperature, limit and drafts."""

    command: ClassVar[str] = "serve"
    data: TemplateOptions = TemplateOptions()
    rollout: ServedRolloutOptions = ServedRolloutOptions()
    host: str = "127.0.0.1"
    """The address to listen on, by default this machine alone. Another one needs `api_key_file`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """The port; 0 takes one that is free."""
    name: str | None = None
    """The name that requests call the policy by; null takes the last part of MODEL."""
    api_key_file: Path | None = None
    """A file with the key that clients must send, as `Authorization: Bearer KEY`."""
    max_batch_size: int = Field(default=32, ge=1)
    """Completions that are decoded together; the others wait."""

    state: Path = Path("runs/tinker")
    """The folder that keeps what `--train` trains; a server that begins again with it goes on from there."""

    @property
    def called(self) -> str:
        """The name of the policy."""
        return self.name or Path(self.model).name
