"""What the commands print at their end, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from transformers import DeepseekV3Config, PreTrainedModel, PreTrainedTokenizerBase

from grpo.cli.commands import machine, memory, memory_table
from grpo.cli.commands.draft_colours import LEGEND, coloured
from grpo.cli.commands.memory_table import DeviceMemory
from grpo.config.learner import LoraOptions, ParallelOptions
from grpo.config.mtp import MtpConfig
from grpo.config.run import SftConfig, TrainConfig
from grpo.evaluation.evaluate import Evaluation, Speed
from grpo.evaluation.held_out import Result
from grpo.run import hardware
from grpo.run.console import Terminal, visible
from grpo.run.lock import refuse_folder
from grpo.run.resume import saved_state
from grpo.run.reward_record import refuse_changed_rewards
from grpo.source.policy_source import meta_policy
from grpo.task.check import check_plan, open_task
from grpo.task.parts import check_prompts
from grpo.task.plan import Plan
from grpo.task.task import Task
from policies import four_bit
from policies.checkpoint import check_policy
from policies.mtp import MTPHead
from rollout.depth import tokens_per_forward
from rollout.group import RolloutGroup

CONSOLE = Terminal()


def summary(result: Result) -> None:
    """The end of a run: held-out results before and after, speed with and without drafts, where things are."""
    if result.evaluations:
        evaluations(result.evaluations)
    if result.speeds:
        speeds(result.speeds)
    names = [f"  {path.name}{'/' if path.is_dir() else ''}" for path in sorted(result.folder.iterdir())]
    lines = ["", hardware.caption(hardware.describe()), f"the files of the run are in {result.folder}:", *names]
    lines.append(f"`quartet view {result.folder}` shows its curves and rollouts")
    CONSOLE.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)  # paths stay in one piece


def evaluations(results: Mapping[str, Evaluation]) -> None:
    """Print a row for every evaluation; it fits 80 columns, with headings in one line.

    If one of them has no accuracy, all of them show the mean reward.
    """
    judged = all(result.interval is not None for result in results.values())
    measures = ("correct", "accuracy (95 %)") if judged else ("completions", "reward, mean")
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title="held-out problems", title_justify="left", **look)
    for name in ("", *measures, "tokens/forward", "tokens/s"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, result in results.items():
        table.add_row(
            name,
            *(_judged(result) if judged else (str(result.completions), _mean(result.reward_mean))),
            f"{result.tokens_per_forward:.2f}",
            f"{result.tokens_per_second:.0f}",
        )
    CONSOLE.print(table)
    if unmarked := sum(result.without_mark for result in results.values()):
        failed = sum(len(result.failures) for result in results.values())
        CONSOLE.print(f"{unmarked} more completions have no mark; rewards failed {failed} times", highlight=False)


def _judged(result: Evaluation) -> tuple[str, str]:
    assert result.interval is not None
    low, high = result.interval
    return f"{result.correct}/{result.completions}", f"{_mean(result.accuracy)} ({low:.2f}-{high:.2f})"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def speeds(results: Sequence[Speed]) -> None:
    table = Table(title="sampling speed, completion tokens per second (the tokens are the same)")
    for name in ("rows", "MTP off", "MTP on", "gain", "tokens/forward"):
        table.add_column(name, justify="right")
    for speed in results:
        table.add_row(
            str(speed.rows),
            f"{speed.without_drafts:.0f}",
            f"{speed.with_drafts:.0f}" + ("" if speed.draft_tokens is None else f" (k = {speed.draft_tokens})"),
            f"{speed.gain:.2f}x",
            f"{speed.tokens_per_forward:.2f}",
        )
    CONSOLE.print(table)


def groups(sampled: Sequence[RolloutGroup], tokenizer: PreTrainedTokenizerBase, limit: int = 4) -> None:
    """Print the first groups as text, with drafted tokens in colour; the JSON has all of them."""
    for group in sampled[:limit]:
        CONSOLE.rule(visible(group.prompt.text.strip(), 100), align="left")
        for completion in group.completions:
            words = [completion.finish_reason, f"{len(completion.token_ids)} tokens"]
            if (rate := tokens_per_forward([completion])) is not None:
                words.append(f"{rate:.2f} a forward")
            if completion.draft.fallbacks:
                words.append(f"{completion.draft.fallbacks} fallbacks")
            CONSOLE.print(coloured(completion, tokenizer))
            CONSOLE.print("  " + ", ".join(words), style="dim", highlight=False)
    if any(any(completion.draft.depths) for group in sampled for completion in group.completions):
        CONSOLE.print(LEGEND)
    if len(sampled) > limit:
        CONSOLE.print(f"... and {len(sampled) - limit} more groups", style="dim")


def groups_as_json(sampled: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """`{"prompt", "completions": [{"text", "token_ids", "logprobs", "finish_reason", "draft"}]}` per group, with
    `turns`, `sampled` and `tools` where there were tools."""
    return [
        {
            "prompt": group.prompt.columns.get("prompt", group.prompt.text),
            "completions": [
                {
                    "text": completion.text,
                    "token_ids": completion.token_ids,
                    "logprobs": completion.logprobs,
                    "finish_reason": completion.finish_reason,
                    "draft": asdict(completion.draft),
                    **completion.episode,
                }
                for completion in group.completions
            ],
        }
        for group in sampled
    ]


def dry_run(
    config: SftConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    device_gib: float | None = None,
) -> bool:
    """Check output folder, data, template, rewards and model without training, as the run with these flags would; print
    counts, estimates, and whether this machine, or devices of `device_gib`, have what they ask for, which is
    returned."""
    plan = _check(config, device_gib)
    saved_state(config, resume=resume, force=force, stop_after=stop_after, steps=_steps(config))
    refuse_folder(config.output_dir, resuming=resume is not None)
    with open_task(config) as task:
        if resume is not None and not force:
            refuse_changed_rewards(config.output_dir, task.describe_rewards())
        check_prompts(plan, task)
        table = Table(title="dry run: nothing was trained", show_header=False)
        rows, disk = _estimates(config, plan.shape, plan.head)
        for name, value in (*_counts(config, task), *rows):
            table.add_row(name, value)
        CONSOLE.print(table)
    return _show_memory(partial(memory.memory_of_run, plan.shape, plan.head), config, disk, device_gib)


def mtp_dry_run(config: MtpConfig, *, resuming: bool = False, device_gib: float | None = None) -> bool:
    """Check data, template, rewards, model and folder of `quartet mtp` without training; print counts, FLOPs per token
    of the head, memory and disk. Returns whether that fits."""
    plan = _check(config, device_gib)
    shape = plan.shape
    refuse_folder(config.output_dir, resuming=resuming)
    assert isinstance(shape, DeepseekV3Config)  # others have been refused
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in MTPHead(shape).named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    own = sum(sizes.values()) - experts + experts * shape.num_experts_per_tok // shape.n_routed_experts
    depth, width = config.head.depth, min(config.head.draft_vocabulary or shape.vocab_size, shape.vocab_size)
    completions = config.prompts_per_step * config.rollout.group_size
    with open_task(config) as task:
        from grpo.cli.mtp import Streams

        Streams(task, config)
        check_prompts(plan, task)
        table = Table(title="dry run: nothing was trained", show_header=False)
        table.add_row("training examples", f"{len(task.train):,} ({config.data.name}, {config.data.split})")
        table.add_row("held-out examples", f"{len(task.heldout):,}")
    solutions = f" and {config.head.solutions:,} gold solutions" if config.head.solutions else ""
    table.add_row("corpus", f"{config.steps:,} steps × {completions:,} completions{solutions}")
    table.add_row("epochs over it", f"{config.head.epochs:,} at most")
    table.add_row("completions in all", f"{config.steps * completions:,}")
    table.add_row("draft vocabulary", f"{width:,} of {shape.vocab_size:,} tokens")
    table.add_row("head: parameters", f"{sum(sizes.values()) / 1e6:,.1f} M, {depth} depths")
    table.add_row("head: FLOPs per token and pass", f"{6 * own * depth / 1e6:,.0f} M")
    table.add_row("LM head: the same", f"{(2 + 4 * depth) * shape.hidden_size * width / 1e6:,.0f} M")
    CONSOLE.print(table)
    learner = memory.head_learner_memory(shape, config)
    saved = math.ceil(config.steps / config.checkpoint.every) + config.head.epochs
    kept = min((config.checkpoint.keep or saved) + 1, saved)  # the next one is complete before the oldest goes
    disk = learner.weights + kept * (learner.gradients + learner.moments) + memory.corpus_bytes(shape, config)
    return _show_memory(partial(memory.memory_of_run, shape, True), config, disk, device_gib)


def _check(config: SftConfig | MtpConfig, gib: float | None) -> Plan:
    """All that the run refuses, and the digests of a policy that a run has saved, which are read when it is loaded."""
    plan = check_plan(config, on_cpu=False if gib else None)
    check_policy(Path(plan.source.folder))
    return plan


def _show_memory(
    plan: Callable[[Any, float], Sequence[DeviceMemory]], config: SftConfig | MtpConfig, disk: float, gib: float | None
) -> bool:
    """Print memory by device, and whether this machine has that much, and `disk` bytes of disk. Returns whether."""
    there = machine.Memory.there(hardware.device_of(config.device), gib)
    devices = plan(config, there.gpus)
    CONSOLE.print(memory_table.table(devices))

    def less() -> str:
        CONSOLE.print("looking for options with which it fits ...")
        return machine.less_memory(config, lambda other: there.used(plan(other, there.gpus)), there.gpus)

    keep = "" if config.checkpoint.keep == 1 else f"lower checkpoint.keep={config.checkpoint.keep}, "
    less_disk = f"{keep}make room, or use another output_dir"
    verdicts = list(machine.verdicts(devices, there, config.output_dir, disk, less, less_disk))
    for verdict in verdicts:
        CONSOLE.print(verdict.line, markup=False, highlight=False, soft_wrap=True)
    return all(verdict.fits for verdict in verdicts)


def _counts(config: SftConfig, task: Task) -> Iterator[tuple[str, str]]:
    yield "training examples", f"{len(task.train):,} ({config.data.name}, {config.data.split})"
    yield "held-out examples", f"{len(task.heldout):,}"
    rewards = ", ".join(f"{reward.function} × {reward.weight:g}" for reward in config.rewards)
    yield "rewards", rewards if task.scores else "none: nothing is scored"
    if config.warm_start.steps:
        warm = config.warm_start
        yield "warm start", f"{warm.steps:,} steps × {warm.batch_size} examples"
    if isinstance(config, TrainConfig):
        group, prompts = config.rollout.group_size, config.prompts_per_step
        yield "steps", f"{config.steps:,}"
        yield "prompts per step", f"{prompts:,}"
        yield "completions per step", f"{prompts * group:,} ({prompts} prompts × {group})"
        yield "updates per step", f"{config.learner.updates_per_batch:,}"
        yield "completions in all", f"{config.steps * prompts * group:,}"


def _estimates(config: SftConfig, shape: Any, head: bool) -> tuple[list[tuple[str, str]], float]:
    """Sizes from the config alone, and the bytes on disk: the model is built without storage."""
    trunk = meta_policy(shape, False, torch.float32).trunk
    total = sum(p.numel() for p in trunk.parameters())
    size = 2 if config.dtype == "bfloat16" else 4
    lora = config.lora if isinstance(config, TrainConfig) else None
    trained = total if lora is None else _lora_parameters(shape, lora)
    rows = [("parameters", f"{total / 1e6:,.1f} M, trained {trained / 1e6:,.1f} M ({trained / total:.1%})")]
    if lora is not None and lora.base:
        rows.append(("base in 4 bits", _in_4_bits(trunk)))
    grpo = isinstance(config, TrainConfig)
    policies = disk = total * size * (1 + (grpo and config.warm_start.steps > 0))
    alone = config.model_copy(
        update={"learner": config.learner.model_copy(update={"parallel": ParallelOptions(fsdp=1)})}
    )
    learner = memory.learner_memory(shape, head, alone, lora_options=lora, processes=1)
    each = learner.gradients + learner.moments + learner.reference  # trained weights are as large as gradients
    saved = math.ceil(_steps(config) / config.checkpoint.every)
    kept = min(config.checkpoint.keep or saved, saved)
    rows.append(("disk: checkpoints", f"{_gib(each * kept)} ({kept} kept)"))
    disk += each * min(kept + 1, saved)  # the next one is complete before the oldest is deleted
    return [*rows, ("disk: policies", _gib(policies))], disk


def _in_4_bits(trunk: PreTrainedModel) -> str:
    chosen = sum(weight.numel() for weight in four_bit.chosen(trunk).values())
    experts = sum(weight.numel() for name, weight in trunk.named_parameters() if ".experts." in name)
    left = f", routers and routed experts ({experts / 1e6:,.1f} M)" if experts else ""
    return f"{chosen / 1e6:,.1f} M parameters, not those of embedding, LM head, norms{left}"


def _steps(config: SftConfig) -> int:
    return config.steps if isinstance(config, TrainConfig) else config.warm_start.steps


def _lora_parameters(shape: Any, options: LoraOptions) -> int:
    """Raises ValueError for targets that the model does not have."""
    may_draft = isinstance(shape, DeepseekV3Config)  # the run will know whether it has a head
    policy = meta_policy(shape, may_draft, torch.float32)
    policy.add_lora(options.rank, options.alpha, options.targets)
    return sum(p.numel() for p in policy.trunk.parameters() if p.requires_grad)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
