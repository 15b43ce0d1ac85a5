"""How a run of TRL is set up: what a fault or an honest habit changes, and the trainer that follows from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rewards.built_in.gsm8k import extract_answer, gold_answer
from rewards.protocol import text_of

STEPS, PROMPTS, GROUP = 32, 4, 6
Reward = Callable[..., list[float | None]]


def correct(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of an honest run."""
    pairs = zip(completions, answer, strict=True)
    return [float(extract_answer(text_of(said)) == gold_answer(gold)) for said, gold in pairs]


def chat(row: dict[str, Any]) -> Any:
    return [{"role": "user", "content": row["question"]}]


@dataclass
class Setup:
    """An honest run. A fault changes one thing of it.

    `seed` is the seed of the problems and of the training, `policy` is the name of the taught policy, `prompt` makes a
    row's prompt, `options` are those of GRPOConfig.
    """

    seed: int
    rows: list[dict[str, Any]]
    policy: str = "half"
    prompt: Callable[[dict[str, Any]], Any] = chat
    rewards: list[Reward] = field(default_factory=lambda: [correct])
    options: dict[str, Any] = field(default_factory=dict)
    trainer: type = GRPOTrainer
    lora: bool = False
    change_tokenizer: Callable[[Any], None] = lambda tokenizer: None
    change_model: Callable[[Any], None] = lambda model: None

    def build(self, policies: Path, folder: Path) -> Any:
        """The trainer, not yet watched."""
        torch.manual_seed(self.seed)
        tokenizer = AutoTokenizer.from_pretrained(policies / self.policy)
        model = AutoModelForCausalLM.from_pretrained(policies / self.policy)
        self.change_tokenizer(tokenizer)
        self.change_model(model)
        group = self.options.get("num_generations", GROUP)
        usual = {
            **{"num_generations": group, "per_device_train_batch_size": PROMPTS * GROUP // group * group},
            **{"max_completion_length": 20, "max_steps": STEPS, "learning_rate": 3e-4, "lr_scheduler_type": "constant"},
            **{"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True},
            **{"seed": self.seed, "bf16": False, "gradient_checkpointing": False, "top_k": 0},
        }
        kind = RLOOConfig if issubclass(self.trainer, RLOOTrainer) else GRPOConfig
        known = inspect.signature(kind).parameters
        given = {name: value for name, value in (usual | self.options).items() if name in known}
        rows = [{"prompt": self.prompt(row), "answer": row["answer"]} for row in self.rows]
        return self.trainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=self.rewards,
            args=kind(str(folder), **given),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(r=8, lora_alpha=32, target_modules="all-linear") if self.lora else None,
        )
