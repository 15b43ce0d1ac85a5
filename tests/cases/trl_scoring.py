"""TRL's own scoring of completions, by a trainer from which everything else is taken away."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch


def trl_scores(trainer_class: type, count: int, **given: Any) -> dict[str, torch.Tensor]:
    """What `_generate_and_score_completions` returns for `count` completions of one token each, or of those given."""
    zeros = torch.zeros(count, 1)
    settings = {
        "accelerator": SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda x: x),
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "args": SimpleNamespace(
            per_device_train_batch_size=count,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_calculate_rewards": lambda *_: zeros,
        "_get_per_token_logps_and_entropies": lambda *_, **__: (zeros, None, None),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_logs": defaultdict(list) | {"rewards": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "reward_weights": torch.ones(1),
        "reward_funcs": [None],
        "reward_func_names": [""],
        "multi_objective_aggregation": "sum_then_normalize",
        "scale_rewards": "group",
        "num_generations": count,
        "num_iterations": 1,
        "beta": 0.0,
        "tools": None,
        "environments": None,
        "environment_factories": None,
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "use_vllm": False,
        "log_multimodal": False,
    }
    trainer = SimpleNamespace(**settings | given)
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * count)
