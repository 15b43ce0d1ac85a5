"""TRL's GRPOTrainer with a clock: seconds of its phases, the prompts that it read, and its mismatch in the first step.

The trainer's own methods are called as they are. The mismatch is taken in the step that warms up and is not measured:
there `generate` also returns its logits, from which the sampler's log-probabilities follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

Ids = tuple[int, ...]
Phases = dict[str, list[float]]  # seconds: "sampling", "learning", "step" and, for ours, "publishing"; one entry a step


class ClockedTrainer(GRPOTrainer):
    """The log-probabilities of the first step are kept; `when_warm` is called at its end."""

    def __init__(self, *given: Any, when_warm: Callable[[], None], **named: Any) -> None:
        super().__init__(*given, **named)
        self.phases: Phases = {"sampling": [], "learning": [], "step": []}
        self.prompts_read: list[list[list[int]]] = []
        self.when_warm = when_warm
        self.sampled: dict[Ids, list[float]] = {}  # log-probabilities in the first step, by completion: TRL shuffles
        self.learned: dict[Ids, list[float]] = {}
        self.add_callback(Clock(self))

    @property
    def watches(self) -> bool:
        return self.state.global_step == 0

    def _generate(self, *given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        out = super()._generate(*given, **named)
        self.phases["sampling"].append(time.perf_counter() - began)
        return out

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.watches and self.rollout_func is None:
            self._keep_logits()
        began = time.perf_counter()
        out = super()._generate_and_score_completions(inputs)
        self.scored_s = time.perf_counter() - began
        mask = out["prompt_mask"].bool()
        self.prompts_read.append([ids[kept].tolist() for ids, kept in zip(out["prompt_ids"], mask, strict=True)])
        self.lengths = out["completion_mask"].sum(1).unique().tolist()
        return out

    def _keep_logits(self) -> None:
        """For one call, `generate` hands over the log-probabilities of what it sampled."""
        model = self.accelerator.unwrap_model(self.model)
        generate = model.generate

        def with_logits(**named: Any) -> torch.Tensor:
            del model.generate  # the class's own method is the model's again
            out = generate(**named, return_dict_in_generate=True, output_logits=True)
            logits = torch.stack(out.logits, 1).float() / self.temperature
            tokens = out.sequences[:, -logits.shape[1] :]
            logprobs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
            self.sampled = dict(zip(map(tuple, tokens.tolist()), logprobs.tolist(), strict=True))
            return out.sequences

        model.generate = with_logits

    def _get_per_token_logps_and_entropies(self, model: Any, input_ids: torch.Tensor, *given: Any, **named: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(model, input_ids, *given, **named)
        if self.watches and torch.is_grad_enabled():
            tokens = input_ids[:, -out[0].shape[1] :].tolist()
            self.learned |= dict(zip(map(tuple, tokens), out[0].tolist(), strict=True))
        return out

    def mismatch(self) -> dict[str, float]:
        """|learner's - sampler's log-probability| of the first step, for the completions that both have scored."""
        assert self.learned.keys() == self.sampled.keys()
        far = [abs(a - b) for ids, own in self.learned.items() for a, b in zip(own, self.sampled[ids], strict=True)]
        return {"mean": fmean(far), "max": max(far), "tokens": len(far)}


class Clock(TrainerCallback):
    def __init__(self, trainer: ClockedTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, *given: Any, **named: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *given: Any, **named: Any) -> None:
        seconds = time.perf_counter() - self.began
        self.trainer.phases["step"].append(seconds)
        self.trainer.phases["learning"].append(seconds - self.trainer.scored_s)
        if self.trainer.state.global_step == 1:
            self.trainer.when_warm()
