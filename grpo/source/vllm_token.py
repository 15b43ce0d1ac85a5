"""The token of a vLLM server that runs already."""

from __future__ import annotations

import os

from grpo.config.sampling import VLLMOptions
from rollout.backends.vllm.process import TOKEN


def vllm_token(options: VLLMOptions) -> str:
    """Of the server at `rollout.vllm.url`. Raises ValueError where there is none."""
    if options.token_file is None:
        token, where = os.environ.get(TOKEN, ""), f"the environment variable {TOKEN}"
    else:
        where = f"rollout.vllm.token_file={options.token_file}"
        try:
            token = options.token_file.read_text().strip()
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"rollout.vllm.url={options.url}: {where} holds no token; put the server's there")
    return token
