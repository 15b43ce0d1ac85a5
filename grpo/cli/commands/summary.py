"""What the commands print at their end, and the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Column, Table
from rich.text import Text
from transformers import DeepseekV3Config, PreTrainedModel, PreTrainedTokenizerBase

from grpo.cli.commands import machine, memory_table
from grpo.cli.commands.memory import MemoryOfRun
from grpo.config.learner import ParallelOptions
from grpo.config.mtp import HeadOptions, MtpConfig
from grpo.config.run import LearningConfig, TrainConfig
from grpo.evaluation.evaluate import Evaluation
from grpo.evaluation.held_out import Result
from grpo.run import hardware
from grpo.run.lock import refuse_folder
from grpo.run.resume import saved_state
from grpo.run.reward_record import refuse_changed_sources
from grpo.source.agreement import planned_paths
from grpo.source.policy_source import meta_policy
from grpo.task.check import check_plan, open_task
from grpo.task.parts import check_prompts, tokenizer_of
from grpo.task.task import Task
from policies import four_bit
from policies.checkpoint import check_policy
from policies.devices import device_of
from policies.lora import reach, reach_in_words
from policies.mtp import MTPHead
from review.findings.gains import decays_first, told
from review.readers.machine import caption
from rewards.config.data import names_of
from rewards.console import Terminal, visible
from rewards.finding import Report
from rewards.kinds import NOTE
from rollout.draft_stats import tokens_per_forward
from rollout.environments.thoughts import dropping
from rollout.group import Completion, RolloutGroup

STYLES = ("", "green", "bold green", "bold cyan", "bold blue")  # by depth; deeper ones look like the last
LEGEND = Text.assemble(
    "the trunk's own tokens, and drafts accepted at depth ",
    *((f"{depth} ", style) for depth, style in enumerate(STYLES) if depth),
    "and deeper",
    style="dim",
)


def coloured(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Returns the text with each token in the colour of the depth at which it was drafted and accepted."""
    text, depths = Text(), completion.draft.depths or [0] * len(completion.token_ids)
    for piece, depth in zip(pieces(completion.token_ids, tokenizer), depths, strict=True):
        text.append(visible(piece), style=STYLES[min(depth, len(STYLES) - 1)])
    return text


def pieces(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Returns the text that each token adds. The token that completes a character of several tokens has all of it."""
    texts, before = [], ""
    for end in range(1, len(token_ids) + 1):
        text = str(tokenizer.decode(token_ids[:end], skip_special_tokens=False))
        whole = text.removesuffix("\N{REPLACEMENT CHARACTER}") if end < len(token_ids) else text
        texts.append(whole[len(before) :])
        before = whole if len(whole) > len(before) else before
    return texts


CONSOLE = Terminal()


def summary(result: Result) -> None:
    """Prints the end of a run: held-out results before and after, and where things are."""
    if result.evaluations:
        evaluations(result.evaluations)
    gains = told(result.folder)
    if gains:
        CONSOLE.print("\n".join(["", *gains]), markup=False, highlight=False, soft_wrap=True)
    names = [f"  {path.name}{'/' if path.is_dir() else ''}" for path in sorted(result.folder.iterdir())]
    lines = ["", caption(hardware.describe()), f"the files of the run are in {result.folder}:", *names]
    lines.append(f"`quartet view {result.folder}` shows its curves and rollouts")
    CONSOLE.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)  # paths stay in one piece


def evaluations(results: Mapping[str, Evaluation]) -> None:
    """Print a row for every evaluation; it fits 80 columns, with headings in one line. If one of them has no accuracy,
    all of them show the mean reward."""
    judged = all(result.interval is not None for result in results.values())
    measures = ("correct", "accuracy (95 %)") if judged else ("completions", "reward, mean")
    look: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    names = ("", *measures, "tokens/forward", "tokens/s")
    columns = [Column(name, justify="right" if name else "left", no_wrap=True) for name in names]
    table = Table(*columns, title="held-out problems", title_justify="left", **look)
    for name, result in results.items():
        mean = "-" if result.reward_mean is None else f"{result.reward_mean:.3f}"
        cells = [str(result.completions), mean]
        if judged:
            assert result.interval is not None
            low, high = result.interval
            cells = [f"{result.correct}/{result.completions}", f"{result.accuracy:.3f} ({low:.2f}-{high:.2f})"]
        table.add_row(name, *cells, f"{result.tokens_per_forward:.2f}", f"{result.tokens_per_second:.0f}")
    CONSOLE.print(table)
    if unmarked := sum(result.without_mark for result in results.values()):
        failed = sum(len(result.failures) for result in results.values())
        CONSOLE.print(f"{unmarked} more completions have no mark; rewards failed {failed} times", highlight=False)


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
    """Each group is `{"prompt", "completions": [{"text", "token_ids", "logprobs", "finish_reason", "draft"}]}`, with
    `turns`, `sampled` and `tools` where there were tools."""

    def content(completion: Completion) -> dict[str, Any]:
        plain = {name: getattr(completion, name) for name in ("text", "token_ids", "logprobs", "finish_reason")}
        return {**plain, "draft": asdict(completion.draft), **completion.episode}

    prompts = [group.prompt.columns.get("prompt", group.prompt.text) for group in sampled]
    return [
        {"prompt": prompt, "completions": [content(completion) for completion in group.completions]}
        for prompt, group in zip(prompts, sampled, strict=True)
    ]


def dry_run(
    config: LearningConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    device_gib: float | None = None,
) -> Report:
    """Check output folder, data, template, rewards and model without training, as the run with these flags would.
    Returns counts, estimates, and as a finding what this machine, or devices of `device_gib`, are too small for."""
    run = DryRun(config, device_gib)
    saved_state(config, resume=resume, force=force, stop_after=stop_after, steps=run.steps)
    refuse_folder(config.output_dir, resuming=resume is not None)
    return run.report(same_rewards=resume is not None and not force)


def mtp_dry_run(
    config: MtpConfig,
    *,
    resume: str | None = None,
    stop_after: int | None = None,
    force: bool = False,
    device_gib: float | None = None,
) -> Report:
    """Check data, template, rewards, model and folder of `quartet mtp` without training, as the run with these flags
    would. Returns counts, FLOPs per token of the draft head, memory and disk."""
    run = MtpDryRun(config, device_gib)
    steps = config.steps + config.mtp.epochs
    saved_state(config, resume=resume, force=force, stop_after=stop_after, steps=steps)
    refuse_folder(config.output_dir, resuming=resume is not None)
    return run.report(same_rewards=resume is not None and not force)


class DryRun:
    """Looks at what a run of `config` will do and need. Raises what the run refuses, and a wrong digest of a saved
    policy, which the run reads when it loads it."""

    def __init__(self, config: LearningConfig | MtpConfig, device_gib: float | None) -> None:
        self.config, self.device_gib, self.disk = config, device_gib, 0.0
        self.plan = check_plan(config, on_cpu=False if device_gib else None)
        check_policy(Path(self.plan.source.folder))
        self.head = self.plan.head or isinstance(config, MtpConfig)
        self.memory = MemoryOfRun(self.plan.shape, self.head, config)

    @property
    def steps(self) -> int:
        config = self.config
        return config.steps

    def report(self, same_rewards: bool = False) -> Report:
        """What the run will do, its sizes, and whether they fit; refuse other rewards than the recorded ones where it
        goes on."""
        result, data = Report("dry run: nothing was trained"), self.config.data
        with open_task(self.config) as task:
            if same_rewards:
                refuse_changed_sources(self.config.output_dir, task.describe_rewards(), task.sources)
            self.check(task)
            result.facts["training examples"] = f"{len(task.train):,} ({names_of(data)}, {data[0].split})"
            result.facts["held-out examples"] = f"{len(task.held_out):,}"
            whole = sum(source.weight for source in data)
            for source in data[:0] if len(data) == 1 else data:
                part, share = task.parts[str(source.label)], source.weight / whole
                steps = len(part.train) / (self.config.prompts_per_step * share)
                sizes = f"{len(part.train):,} examples, an epoch of {steps:,.1f} steps; {len(part.held_out):,} held out"
                scored = f"; rewards: {', '.join(part.reward_weights)}" if part.reward_weights else ""
                result.facts[f"source {source.label}"] = f"{share:.1%} of the prompts: {sizes}{scored}"
            result.facts |= dict(self.rows(task))
        config = self.config
        if isinstance(config, TrainConfig):
            warm = config.supervision
            if decays_first(warm.steps, warm.schedule, config.learner.schedule):
                result.add("rate-decay", "the learning rate decays first in GRPO", "sft.schedule", severity=NOTE)
        there = machine.Memory.there(device_of(self.config.device), self.device_gib)
        result.tables["memory in GiB, by device"] = memory_table.rows(self.memory.devices(there.gpus))
        for verdict in self.verdicts(there):
            what, _, words = verdict.line.partition(": ")
            if verdict.fits:
                result.facts[what] = words
            else:
                result.add("memory", verdict.line)
        return result

    def check(self, task: Task) -> None:
        check_prompts(self.plan, task)

    def paths(self) -> str:
        """Return in words how the policy is sampled and read. Raises PolicyError for a type that the run refuses."""
        paths = planned_paths(self.plan.bare_policy(), device_of(self.config.device))
        backend = self.config.rollout.backend if isinstance(self.config, TrainConfig) else None
        return f"sampled by vLLM (here: {paths})" if backend == "vllm" else paths

    def verdicts(self, there: machine.Memory) -> list[machine.Verdict]:
        """Says whether the run fits the memory that is `there`, and the disk."""
        devices = self.memory.devices(there.gpus)

        def used(other: TrainConfig) -> float:
            return there.used(MemoryOfRun(self.plan.shape, self.head, other).devices(there.gpus))

        def less() -> str:
            CONSOLE.print("looking for options with which it fits ...")
            return machine.LessMemory(self.config, used, there.gpus).words()

        every = self.config.checkpoint.keep
        less_disk = f"{'' if every == 1 else f'lower checkpoint.keep={every}, '}make room, or use another output_dir"
        return list(machine.verdicts(devices, there, self.config.output_dir, self.disk, less, less_disk))

    def rows(self, task: Task) -> Iterator[tuple[str, str]]:
        """Yields what the run will do, and its sizes on disk: the model is built without storage."""
        config = self.config
        assert isinstance(config, LearningConfig)
        rewards = ", ".join(f"{reward.function} × {reward.weight:g}" for reward in config.rewards)
        yield "rewards", rewards if task.scores else "none: nothing is scored"
        warm, grpo = config.supervision, isinstance(config, TrainConfig)
        if warm.steps:
            yield "SFT stage", f"{warm.steps:,} steps × {warm.batch_size} examples"
        if isinstance(config, TrainConfig):
            group, prompts = config.rollout.group_size, config.prompts_per_step
            yield "steps", f"{config.steps:,}"
            yield "prompts per step", f"{prompts:,}"
            yield "completions per step", f"{prompts * group:,} ({prompts} prompts × {group})"
            yield "updates per step", f"{config.learner.updates_per_batch:,}"
            yield "completions in all", f"{config.steps * prompts * group:,}"
            if config.agent and (after := dropping(tokenizer_of(self.plan, task))):
                yield "rows of a completion", _forks(after, config.rollout.max_completion_tokens)
        shape = self.plan.shape
        trunk = meta_policy(shape, False, torch.float32).trunk
        total = trained = sum(p.numel() for p in trunk.parameters())
        lora = config.lora if isinstance(config, TrainConfig) else None
        if lora is not None:  # the run will know whether it has a draft head
            policy = meta_policy(shape, isinstance(shape, DeepseekV3Config), torch.float32)
            yield "adapters are on", reach_in_words(*reach(policy.trunk, lora.targets))
            policy.add_lora(lora.rank, lora.alpha, lora.targets)
            trained = sum(p.numel() for p in policy.trunk.parameters() if p.requires_grad)
        yield "sampling and learning", self.paths()
        yield "parameters", f"{total / 1e6:,.1f} M, trained {trained / 1e6:,.1f} M ({trained / total:.1%})"
        if lora is not None and lora.base:
            yield "base in 4 bits", _in_4_bits(trunk)
        one = config.learner.model_copy(update={"parallel": ParallelOptions(fsdp=1)})
        alone = MemoryOfRun(shape, self.head, config.model_copy(update={"learner": one}))
        learner = alone.learner(processes=1)
        each = learner.gradients + learner.moments + learner.reference  # trained weights are as large as gradients
        best, every = isinstance(config, TrainConfig) and config.checkpoint.keep_best, config.checkpoint.every
        evaluated = isinstance(config, TrainConfig) and best and config.eval.every
        saved = math.ceil(self.steps / min(every, evaluated or every))
        copies = min((config.checkpoint.keep or saved) + best, saved)
        yield "disk: checkpoints", f"{_gib(each * copies)} ({copies} kept)"
        policies = total * (2 if config.dtype == "bfloat16" else 4)
        policies *= 1 + best + (grpo and config.supervision.steps > 0)
        yield "disk: policies", _gib(policies)
        self.disk = policies + each * min(copies + 1, saved)  # the next one is complete before the oldest is deleted
        if isinstance(config, TrainConfig) and config.lora and config.sft.steps:  # whose checkpoints hold all
            whole = alone.learner(sft_stage=True, processes=1)
            count = (config.sft.steps - 1) // every
            count = min(config.checkpoint.keep + 1, count) if config.checkpoint.keep else count
            self.disk = max(self.disk, policies + count * (whole.gradients + whole.moments))


class MtpDryRun(DryRun):
    """Looks at what `quartet mtp` will do and need."""

    def check(self, task: Task) -> None:
        from grpo.cli.mtp import Streams

        assert isinstance(self.config, MtpConfig)
        Streams(task, self.config)  # may refuse
        super().check(task)

    def rows(self, task: Task) -> Iterator[tuple[str, str]]:
        config, shape = self.config, self.plan.shape
        assert isinstance(config.mtp, HeadOptions)
        assert isinstance(shape, DeepseekV3Config)  # others have been refused
        with torch.device("meta"):
            sizes = {name: p.numel() for name, p in MTPHead(shape).named_parameters()}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        active = sum(sizes.values()) - experts + experts * shape.num_experts_per_tok // shape.n_routed_experts
        depth, width = config.mtp.depth, min(config.mtp.draft_vocabulary or shape.vocab_size, shape.vocab_size)
        completions = config.prompts_per_step * config.whole_rollout.group_size
        solutions = f" and {config.mtp.solutions:,} gold solutions" if config.mtp.solutions else ""
        yield "corpus", f"{config.steps:,} steps × {completions:,} completions{solutions}"
        yield "epochs over it", f"{config.mtp.epochs:,} at most"
        yield "completions in all", f"{config.steps * completions:,}"
        yield "draft vocabulary", f"{width:,} of {shape.vocab_size:,} tokens"
        yield "draft head: parameters", f"{sum(sizes.values()) / 1e6:,.1f} M, {depth} depths"
        yield "draft head: FLOPs per token and pass", f"{6 * active * depth / 1e6:,.0f} M"
        yield "LM head: the same", f"{(2 + 4 * depth) * shape.hidden_size * width / 1e6:,.0f} M"
        learner = self.memory.head_learner()
        saved = math.ceil(config.steps / config.checkpoint.every) + config.mtp.epochs
        copies = min((config.checkpoint.keep or saved) + 1, saved)  # the next one is complete before the oldest goes
        self.disk = learner.weights + copies * (learner.gradients + learner.moments) + self.memory.corpus_bytes()


def _in_4_bits(trunk: PreTrainedModel) -> str:
    chosen = sum(weight.numel() for weight in four_bit.chosen(trunk).values())
    experts = sum(weight.numel() for name, weight in trunk.named_parameters() if ".experts." in name)
    left = f", routers and routed experts ({experts / 1e6:,.1f} M)" if experts else ""
    return f"{chosen / 1e6:,.1f} M parameters, not those of embedding, LM head, norms{left}"


def _forks(after: Sequence[str], longest: int) -> str:
    again = f"reads up to {longest:,} tokens of each earlier answer again"
    return f"1, and one more where {' or '.join(after)} follows a thought, which {again}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:,.1f} MiB"
