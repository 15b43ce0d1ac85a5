"""`quartet sample`: completions of a user's own prompts."""

from __future__ import annotations

import json
from pathlib import Path

from grpo.data import Example
from grpo.inference_config import SampleConfig
from grpo.loader import load_policy, sampling_params
from grpo.prompts import PromptTemplate, encode_prompt
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


def sample(config: SampleConfig, examples: list[Example]) -> list[RolloutGroup]:
    """One group per prompt, in order."""
    template = PromptTemplate(config.template, config.system_prompt)
    if not template.is_chat:
        template.render(examples[0])
    policy = load_policy(config)
    params = sampling_params(policy, config, config.group_size, config.seed)
    prompts = [encode_prompt(example, policy.tokenizer, template) for example in examples]
    return open_pool(policy).sample(prompts, params)
