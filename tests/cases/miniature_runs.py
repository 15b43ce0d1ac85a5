"""Miniature runs with a cause each, written as a run writes them: for `quartet diagnose`."""

import json

import yaml
import zstandard

from rewards.records import rollout_path

OPTIONS = {
    "model": "tiny",
    "steps": 4,
    "rewards": [{"function": "gsm8k", "name": None}],
    "data": {"name": "word_problems", "levels": [1], "template": "{question}\n", "solution_column": "answer"},
    "rollout": {"temperature": 1.0, "group_size": 4, "max_completion_tokens": 64},
    "learner": {"learning_rate": 1e-4},
    "sft": {"steps": 0},
    "loss": {"scale_rewards": "none"},
}
METRICS = {"completion/tokens": 240, "completion/length_mean": 20.0, "policy/approx_kl": 0.01, "reward/part/gsm8k": 0.5}


def group(*marks, text="#### {}"):
    return [(text.format(sample), mark) for sample, mark in enumerate(marks)]


MIXED = group(1.0, 0.0, 0.0, 0.0)


def write(folder, steps=((MIXED,) * 4,) * 4, metrics=None, options=None, events=(), evaluations=()):
    """A run whose steps have these groups of (text, mark). `metrics` are of every step, or lists of one for each."""
    (folder / "rollouts").mkdir(parents=True, exist_ok=True)
    options = options or {}
    tree = {key: value | options.get(key, {}) if isinstance(value, dict) else value for key, value in OPTIONS.items()}
    tree |= {key: value for key, value in options.items() if not isinstance(tree[key], dict)}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = []
    for number, groups in enumerate(steps, start=1):
        values = {name: v[number - 1] if isinstance(v, list) else v for name, v in (METRICS | (metrics or {})).items()}
        rows.append({"step": number} | values)
        lines = []
        for place, completions in enumerate(groups):
            for sample, (text, mark) in enumerate(completions):
                parts = mark if isinstance(mark, dict) else {"gsm8k": mark}
                line = {"prompt_id": f"{number}/{place}", "prompt": "?", "sample": sample, "text": text}
                line |= {"reward": sum(parts.values()), "parts": parts, "extras": {}, "token_ids": [*text.encode(), 0]}
                lines.append(line | {"finish_reason": "length" if text.endswith("...") else "stop"})
        content = "".join(json.dumps(line) + "\n" for line in lines)
        rollout_path(folder, number).write_bytes(zstandard.compress(content.encode()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *evaluations]))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder
