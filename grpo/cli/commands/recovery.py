"""KL distillation after compression: the compressed policy learns the distributions of the dense one on given text."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from grpo.cli.config.convert import RecoveryOptions
from grpo.learner.optimizer import norm_of, schedule
from grpo.run.stop import signals
from policies.layout import frozen_parameter_names

WARM_UP, WINDOWS_PER_STEP, MAX_GRAD_NORM = 2, 4, 1.0  # steps, windows of text in an update; as it was measured


class RecoveryDiverged(RuntimeError):
    """A step of the recovery was not finite."""


def recover(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    windows: Sequence[Tensor],
    steps: int,
    options: RecoveryOptions,
    *,
    seed: int = 0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Train `student` in place; returns the number of steps done, fewer than `steps` where Ctrl-C or SIGTERM ended it.
    A signal takes effect between two steps. The loss is KL(dense ‖ student) in nats per token over the vocabulary, on
    `windows` [T] in shuffled order. `on_step(step, loss)` is called after every step. Raises RecoveryDiverged."""
    frozen = tuple(frozen_parameter_names(student.config))
    for name, parameter in student.named_parameters():
        chosen = options.trained == "all" or ".self_attn." in name
        parameter.requires_grad_(chosen and not name.endswith(frozen))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    factor = schedule("cosine", steps, WARM_UP)
    order, done, stops = _shuffled(len(windows), seed), 0, list[int]()
    try:
        with signals.heard(stops.append, once=True):
            while done < steps and not stops:
                loss = 0.0
                for _ in range(WINDOWS_PER_STEP):
                    ids = windows[next(order)][None].to(dense.device)
                    with torch.no_grad():
                        log_p = dense(ids).logits[0].log_softmax(-1)
                    kl = F.kl_div(student(ids).logits[0].log_softmax(-1), log_p, reduction="sum", log_target=True)
                    share = kl / ids.numel() / WINDOWS_PER_STEP
                    share.backward()
                    loss += share.item()
                norm = norm_of([parameter.grad for parameter in trained if parameter.grad is not None])
                torch.nn.utils.clip_grads_with_norm_(trained, MAX_GRAD_NORM, norm)
                if not torch.isfinite(norm):
                    raise RecoveryDiverged(
                        f"step {done + 1} of the recovery: loss {loss}, gradient norm {norm.item()}; use a smaller "
                        f"recovery.learning_rate than {options.learning_rate}"
                    )
                done += 1
                for group in optimizer.param_groups:
                    group["lr"] = options.learning_rate * factor(done)
                optimizer.step()
                optimizer.zero_grad()
                on_step(done, loss)
    finally:
        student.requires_grad_(True)
        student.zero_grad()
    return done


def _shuffled(count: int, seed: int) -> Iterator[int]:
    """Yields 0 … count − 1, in another order in every pass."""
    generator = random.Random(f"recovery {seed}")
    while True:
        yield from generator.sample(range(count), count)
