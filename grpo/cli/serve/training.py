"""`quartet serve --train`: Tinker's API for a policy on this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.config.serve import ServeConfig
from grpo.cli.serve.server import answer, read_keys
from policies.attention import sees_prompts_whole
from rewards.listening import listen

PACKAGES = "quartet serve --train needs the packages of the extra tinker: pip install 'quartet-rl[tinker]'"


def serve_training(config: ServeConfig, say: Callable[[str], None] = print) -> None:
    """Serve until a signal comes; what waits then is done by the next server with the same state folder. Raises
    ValueError without the packages of the extra, and for a policy whose prompts are seen whole."""
    try:
        from grpo.tinker.app import app
        from grpo.tinker.service import Service
    except ModuleNotFoundError as error:
        raise ValueError(PACKAGES) from error
    keys = read_keys(config.api_key_file, config.host)
    use = PolicyInUse(config)
    listening, address = listen(config.host, config.port)
    gc.freeze()
    with listening:
        say(f"loading {config.model} …")
        policy = use.load()
        if sees_prompts_whole(policy.config):
            raise ValueError("--train: this policy sees a prompt whole, and Tinker's data do not say where one ends")
        with use.phase("loading"):
            service = Service(policy, config.name or config.model, config.state, getattr(torch, config.dtype))
        say(f"{service.name} trains and samples at http://{address}   (Ctrl-C ends it; state in {config.state})")
        say(f"export TINKER_BASE_URL=http://{address} TINKER_API_KEY={'<the key>' if keys else 'tml-here'}")
        answer(app(service, keys), listening)
