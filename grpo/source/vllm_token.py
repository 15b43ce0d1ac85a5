"""The vLLM that is installed here, and the token of a server that runs already."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from grpo.config.sampling import VLLMOptions
from rollout.backends.vllm.process import TOKEN, state_of


def vllm_token(options: VLLMOptions) -> str:
    """The token of the server at `rollout.vllm.url`. Raises ValueError where there is none."""
    token = os.environ.get(TOKEN, "")
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"rollout.vllm.url={options.url}: the environment variable {TOKEN} holds no token; put the server's there"
        )
    return token


def installed_vllm(python: Path, key: str) -> dict[str, Any]:
    """Gives what the vLLM of this interpreter, which the option `key` names, says of itself.

    Raises ValueError or RolloutError where it cannot be started.
    """
    if sys.platform != "linux":
        raise ValueError(f"{key}: quartet starts vLLM's server on Linux alone; drop the backend vllm")
    if not python.is_file():
        raise ValueError(
            f"{key}={python}: there is no such interpreter here; `make vllm` installs vLLM into .vllm, or name the one "
            "of another environment"
        )
    return state_of(python, key)
