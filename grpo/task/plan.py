"""What a command was asked for, and what can be seen of its model without weights; each is looked up once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch
from transformers import DeepseekV3Config, GenerationConfig

from grpo.config.policy import ModelOptions
from grpo.run.checkpoint import CheckpointError
from grpo.source.policy_source import PolicySource, find_policy, meta_policy, read_shape
from policies import presets
from policies.policy import Policy
from rewards.protocol import RewardError
from rollout.faults import RolloutError

# Errors whose message is written for the user.
REFUSALS = (ValueError, OSError, RewardError, RolloutError, CheckpointError)


class Plan:
    """`options` of a command, the `source` of its policy, its `shape`, and whether it will have a draft `head`.

    Where the model cannot be found or read, `fault` says why, and the other three are not there.

    >>> plan = Plan(ModelOptions(model="tiny"))
    >>> plan.shape.model_type, plan.head, plan.native, plan.fault
    ('deepseek_v3', True, True, None)
    """

    def __init__(self, options: ModelOptions, source: PolicySource | None = None) -> None:
        self.options = options
        self.fault: Exception | None = None
        try:
            self.source = source or find_policy(options.model, read=False)
            self.shape, self.head = read_shape(options, self.source)
        except REFUSALS as error:
            self.fault = error

    @property
    def native(self) -> bool:
        """Our own engine decodes the policy."""
        return isinstance(self.shape, DeepseekV3Config)

    @property
    def has_files(self) -> bool:
        """The model is a policy's folder with weights, and not a preset, a hub id, a checkpoint of a run, or the
        configuration of a model alone."""
        return self.source.checkpoint is None and any(Path(self.source.folder).glob("*.safetensors"))

    def bare_policy(self, tokenizer: object = None) -> Policy:
        """The policy without storage."""
        policy = meta_policy(self.shape, self.head, getattr(torch, self.options.dtype), tokenizer)
        base = self.source.base
        with suppress(OSError):  # there is none
            if base not in presets.PRESETS and Path(base).is_dir():
                policy.trunk.generation_config = GenerationConfig.from_pretrained(base)
        return policy
