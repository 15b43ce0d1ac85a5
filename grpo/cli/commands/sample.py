"""`quartet sample`: completions of a user's own prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from grpo.cli.commands.policy_in_use import PolicyInUse
from grpo.cli.config.inference import SampleConfig
from grpo.data.prompts import PromptTemplate, encode_prompt
from grpo.run.console import progress_bars
from rewards.config.json_file import parse_json, unfit
from rewards.data.examples import Example, beyond_context, load_examples
from rollout.faults import RolloutError
from rollout.group import RolloutGroup
from rollout.workers.kinds import PoolOptions, open_pool


def prompts_of(texts: Sequence[str], file: Path | None) -> list[Example]:
    """Returns the prompts of the command line, then those of a file."""
    if "" in texts:
        raise ValueError('--prompt "": is empty; write the text that the policy continues')
    examples = [_example(f"prompt {number}", text, {}) for number, text in enumerate(texts, start=1)]
    return examples + (read_prompts(file) if file else [])


def read_prompts(path: Path) -> list[Example]:
    """Reads lines such as `{"prompt": "2 + 3 = ?"}`. `-` is standard input, where a line may also be plain text. Raises
    ValueError naming file and line."""
    stdin = str(path) == "-"
    if not stdin and not path.is_file():
        raise ValueError(f"--prompts {path}: there is no such file")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if stdin else path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = "standard input is" if stdin else "is"
        raise ValueError(f"--prompts {path}: {what} not UTF-8 text (byte {error.start})") from None
    return _read_lines(text, "standard input" if stdin else str(path), plain=stdin)


def _read_lines(text: str, source: str, plain: bool) -> list[Example]:
    examples = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if plain and not line.lstrip().startswith("{"):
            examples.append(_example(f"line {number}", line.rstrip("\r"), {}))
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: not JSON ({error})") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f'{source}, line {number}: expected {{"prompt": "some text"}}, got {line[:60]}')
        if fault := unfit(row):
            raise ValueError(f"{source}, line {number}: {fault}")
        examples.append(_example(f"line {number}", prompt, row))
    if not examples:
        raise ValueError(f'{source} holds no prompts; write one {{"prompt": ...}} a line')
    return examples


def _example(name: str, prompt: str, row: dict[str, Any]) -> Example:
    """Makes an example of a prompt. Its noise depends on `name`, not on the file's: a copy gives the same tokens."""
    return Example(name, prompt, "", {**row, "prompt": prompt})


@dataclass(frozen=True)
class Sampled:
    """Groups are in the order of the prompts; `faults` says which prompts have no group, and why."""

    groups: list[RolloutGroup]
    tokenizer: PreTrainedTokenizerBase
    faults: str = ""


def sample(config: SampleConfig, examples: list[Example], console: Console) -> Sampled:
    """Sample one group per prompt. If a prompt cannot be continued, the others still are."""
    data, shots = config.data, config.data.few_shot
    worked = load_examples(data.name, data.split, data, limit=shots, seed=config.seed) if shots else []
    template = PromptTemplate(data.template, worked)
    # A run's template may call the prompt by the name of its column.
    examples = [replace(e, columns={data.prompt_column: e.question} | e.columns) for e in examples]
    if not template.is_chat:
        template.render(examples[0])
    use = PolicyInUse(config)
    policy = use.load()
    params = use.sampling(policy, config.samples, config.seed, config.stop_strings)
    for example in examples:
        if fault := beyond_context(example.question, policy.max_length):
            raise ValueError(f"--prompts, {example.example_id}: the prompt {fault}")
    prompts = [encode_prompt(example, policy.tokenizer, template) for example in examples]
    with use.phase("loading"):
        pool = open_pool(policy, PoolOptions(dtype=getattr(torch, config.dtype)))
    with use.phase("sampling"), progress_bars(console, enabled=True) as progress:
        bar = progress.add_task("sampling", total=len(prompts) * params.group_size)
        try:
            return Sampled(pool.sample(prompts, params, lambda ended: progress.advance(bar, ended)), policy.tokenizer)
        except RolloutError as error:
            if not error.groups:
                raise
            return Sampled(error.groups, policy.tokenizer, str(error))
