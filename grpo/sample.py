"""`quartet sample`: completions of a user's own prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from grpo.console import progress_bars
from grpo.data import Example
from grpo.inference_config import SampleConfig
from grpo.loader import sampling_params
from grpo.prompts import PromptTemplate, encode_prompt
from grpo.run_policy import find_policy, load_found
from rollout.engine import RolloutError
from rollout.group import RolloutGroup
from rollout.pool import open_pool


def read_prompts(path: Path) -> list[Example]:
    """Lines such as `{"prompt": "2 + 3 = ?"}`. Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"--prompts {path}: there is no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {path}: is not UTF-8 text (byte {error.start})") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise ValueError(f'{path}, line {number}: expected {{"prompt": "some text"}}, got {line[:60]}')
        # The noise hangs on this name, so the file has none in it: a copy gives the same tokens.
        examples.append(Example(f"line {number}", prompt, "", {**row, "prompt": prompt}))
    if not examples:
        raise ValueError(f'{path} holds no prompts; write one {{"prompt": ...}} a line')
    return examples


@dataclass(frozen=True)
class Sampled:
    """Groups in the order of the prompts; `faults` tells which prompts have none, and why."""

    groups: list[RolloutGroup]
    tokenizer: PreTrainedTokenizerBase
    faults: str = ""


def sample(config: SampleConfig, examples: list[Example], console: Console) -> Sampled:
    """One group per prompt. A prompt that cannot be continued costs no other one."""
    template = PromptTemplate(config.template, config.system_prompt)
    if not template.is_chat:
        template.render(examples[0])
    policy = load_found(find_policy(config.model), config)
    params = replace(sampling_params(policy, config, config.group_size, config.seed), margin=config.margin)
    prompts = [encode_prompt(example, policy.tokenizer, template) for example in examples]
    pool = open_pool(policy, dtype=getattr(torch, config.dtype))
    with progress_bars(console, enabled=True) as progress:
        bar = progress.add_task("sampling", total=len(prompts) * params.group_size)
        try:
            return Sampled(pool.sample(prompts, params, lambda ended: progress.advance(bar, ended)), policy.tokenizer)
        except RolloutError as error:
            if not error.groups:
                raise
            return Sampled(error.groups, policy.tokenizer, str(error))
