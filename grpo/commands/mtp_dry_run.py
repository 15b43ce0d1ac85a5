"""`quartet mtp --dry_run`: what a training of the draft head would cost."""

from __future__ import annotations

import math

import torch
from rich.console import Console
from rich.table import Table
from transformers import DeepseekV3Config

from grpo.commands import memory
from grpo.commands.summary import show_memory
from grpo.config.mtp import MtpConfig
from grpo.policy_source import read_shape
from grpo.run.log import refuse_folder
from grpo.task import Task
from policies.mtp import MTPHead


def dry_run(config: MtpConfig, console: Console, resuming: bool = False) -> None:
    """Check data, template, rewards, model and folder without training; print counts, FLOPs per token of the head,
    memory and disk."""
    refuse_folder(config.output_dir, resuming=resuming)
    shape, _ = read_shape(config.model_copy(update={"add_mtp": True}))
    assert isinstance(shape, DeepseekV3Config)  # others have been refused
    with torch.device("meta"):
        head = MTPHead(shape)
    own = sum(p.numel() for name, p in head.named_parameters() if ".experts." not in name)
    own += sum(
        p.numel() * shape.num_experts_per_tok // shape.n_routed_experts
        for name, p in head.named_parameters()
        if ".experts." in name
    )
    depth, width = config.head.depth, min(config.head.draft_vocabulary or shape.vocab_size, shape.vocab_size)
    completions = config.prompts_per_step * config.rollout.group_size
    with Task.of(config) as task:
        task.check_chat_template(config.model)
        table = Table(title="dry run: nothing was trained", show_header=False)
        table.add_row("training examples", f"{len(task.train):,} ({config.data.name}, {config.data.split})")
        table.add_row("held-out examples", f"{len(task.heldout):,}")
    table.add_row("steps", f"{config.steps:,} × {completions:,} completions, {config.head.reuse} passes over each")
    table.add_row("completions in all", f"{config.steps * completions:,}")
    table.add_row("draft vocabulary", f"{width:,} of {shape.vocab_size:,} tokens")
    table.add_row("head: parameters", f"{sum(p.numel() for p in head.parameters()) / 1e6:,.1f} M, {depth} depths")
    table.add_row("head: FLOPs per token and pass", f"{6 * own * depth / 1e6:,.0f} M")
    table.add_row("LM head: the same", f"{(2 + 4 * depth) * shape.hidden_size * width / 1e6:,.0f} M")
    console.print(table)
    learner = memory.head_learner_memory(shape, config)
    saved = math.ceil(config.steps / config.checkpoint.every)
    kept = min((config.checkpoint.keep or saved) + 1, saved)  # the next one is complete before the oldest goes
    disk = learner.weights + kept * (learner.gradients + learner.moments)
    show_memory(memory.memory_of_run(shape, True, config), config, disk, console)
