"""The vLLM that is installed here, and the token of a server that runs already."""

from __future__ import annotations

import os
import sys
from typing import Any

from grpo.config.sampling import VLLMOptions
from rollout.vllm.process import INTERPRETER, TOKEN, interpreter, state_of


def vllm_token(options: VLLMOptions) -> str:
    """The token of the server at `rollout.vllm.url`. Raises ValueError where there is none."""
    token = os.environ.get(TOKEN, "")
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"rollout.vllm.url={options.url}: the environment variable {TOKEN} holds no token; put the server's there"
        )
    return token


def installed_vllm() -> dict[str, Any]:
    """What the vLLM that is installed here says of itself. Raises ValueError or RolloutError where it cannot start."""
    if sys.platform != "linux":
        raise ValueError("backend=vllm: quartet starts vLLM's server on Linux alone; drop it")
    if not interpreter().is_file():
        raise ValueError(
            f"backend=vllm: there is no interpreter {interpreter()} here; `make vllm` installs vLLM into .vllm, or "
            f"name that of another environment in {INTERPRETER}"
        )
    return state_of(interpreter())
