"""Runs that are broken on purpose, each in one way and named after what `quartet diagnose` should say; healthy ones.

`python tests/cases/broken_runs.py POLICY FOLDER [tuned|unseen] [NAME ...]` makes them of a tiny policy after an SFT
stage: 8 steps of 8 prompts with 8 completions each. The detectors were tuned on one set; the other one has other seeds
and other broken values, and was looked at once they were done.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.built_in.gsm8k import gsm8k
from rewards.data.word_problems import word_problems
from rewards.records import read_rollouts, recorded_steps, split_groups

HERE = Path(__file__).resolve()
BASE: dict[str, Any] = {
    "threads": 1,
    "steps": 8,
    "prompts_per_step": 8,
    "data.name": "word_problems",
    "data.task_options.levels": [1, 2],
    "sft.steps": 0,
    "rollout.group_size": 8,
    "rollout.max_completion_tokens": 64,
    "rollout.draft_tokens": 0,
    "rewards": [{"function": "gsm8k"}],
    "learner.learning_rate": 4e-4,
    "loss.loss_type": "dapo",
    "loss.scale_rewards": "none",
    "mtp.loss_weight": 0.0,
    "eval.limit": 0,
    "log.trackers": [],
    "checkpoint.every": 1000,
}


def same(completions, **_):
    return [0.5] * len(completions)


def nothing(completions, **_):
    return [0.0] * len(completions)


def flipped(prompts, completions, answer, **_):
    return [1.0 - mark for mark in gsm8k(prompts, completions, answer)]


def negative(prompts, completions, answer, **_):
    return [-mark for mark in gsm8k(prompts, completions, answer)]


def effort(completions, completion_ids, **_):
    return [len(ids) / 64 for ids in completion_ids]


def brief(completions, completion_ids, **_):
    return [-float(len(ids)) for ids in completion_ids]


def concise(completions, completion_ids, **_):
    """A part beside correctness that healthy runs may have: 0 to 1, less for long completions."""
    return [max(0.0, 1 - len(ids) / 64) for ids in completion_ids]


def _own(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"function": f"{HERE}:{name}", "weight": weight}


def broken(policy: Path, folder: Path, unseen: bool = False) -> dict[str, dict[str, Any]]:
    """The overrides of each broken run by its name; files that they need are written into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rate, levels = BASE["learner.learning_rate"], [2] if unseen else [1, 2]
    problems = word_problems("train", levels, 7 + unseen, count=2000)
    shifted = [row["answer"] for row in problems[1:] + problems[:1]]
    if unseen:  # the number of the question that is written first was taken for the answer
        shifted = [next(word for word in row["question"].split() if word.isdigit()) for row in problems]
    wrong_answers = _file(folder, "wrong", [p | {"answer": a} for p, a in zip(problems, shifted, strict=True)])
    return {
        "rate-high": {"learner.learning_rate": rate * (50 if unseen else 100)},
        "rate-low": {"learner.learning_rate": rate / (200 if unseen else 100)},
        "reward-constant": {"rewards": [_own("nothing" if unseen else "same")]},
        "sign-flipped": {"rewards": [_own("negative" if unseen else "flipped")]},
        "answer-column": {"data.name": str(wrong_answers)},
        "template": {"data.template": "Question: {question} Answer:" if unseen else "{question} = "},
        "stop-token": {"model": str(_without_stop(policy, folder))},
        "temperature": {"rollout.temperature": 1e-3 if unseen else 1e-6},
        "small-groups": {"rollout.group_size": 2, "prompts_per_step": 16 if unseen else 32},
        "length-rewarded": {"rewards": [_own("brief" if unseen else "effort")]},
        "all-solved": {"data.name": str(folder / "solved.jsonl")},
        "none-solved": {"data.task_options.levels": [3, 4] if unseen else [4]},
    }


def healthy(unseen: bool = False) -> dict[str, dict[str, Any]]:
    seeds = (31, 32, 33) if unseen else (21, 22, 23)
    lora = {"lora.rank": 16 if unseen else 8, "learner.learning_rate": 2e-3}
    parts = [{"function": "gsm8k"}, _own("concise", 0.1 if unseen else 0.2)]
    return {
        "healthy_full": {"seed": seeds[0], "eval.limit": 64},
        "healthy_lora": {"seed": seeds[1], **lora},
        "healthy_parts": {"seed": seeds[2], "rewards": parts, "prompts_per_step": 12 if unseen else 8},
    }


def make(name: str, policy: Path, folder: Path, overrides: Mapping[str, Any], seed: int) -> Path:
    """Trains one of them, into FOLDER/NAME. What trains is imported here: processes of rewards load this file."""
    from grpo.config.run import TrainConfig
    from grpo.train import train
    from rewards.config.options import load

    run = folder / name
    if name == "all-solved":
        _solved(folder)
    options = {"model": str(policy), "output_dir": str(run), "seed": seed} | BASE | dict(overrides)
    if "data.name" in overrides:
        del options["data.task_options.levels"]  # a file has none
    train(load(TrainConfig, None, options))
    return run


def _file(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({k: row[k] for k in ("question", "answer")}) + "\n" for row in rows))
    return path


def _without_stop(policy: Path, folder: Path) -> Path:
    """The policy, whose files name another stop token than the one that it has learned to write."""
    copy = folder / "without_stop"
    shutil.copytree(policy, copy, dirs_exist_ok=True)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(values | {"eos_token_id": values["pad_token_id"]}))
    (copy / "digests.json").unlink(missing_ok=True)
    return copy


def _solved(folder: Path) -> None:
    """The problems that the policy always solved in the run whose rate is too low to change it."""
    run = folder / "rate-low"
    groups = [group for step in recorded_steps(run) for group in split_groups(read_rollouts(run, step))]
    sure = [group[0] for group in groups if all(line["reward"] == 1 for line in group)]
    rows = [{"question": line["prompt"].strip(), "answer": line["text"].split("####")[-1].strip()} for line in sure]
    _file(folder, "solved", rows)


if __name__ == "__main__":
    policy, folder = Path(sys.argv[1]), Path(sys.argv[2])
    unseen, names = sys.argv[3:4] == ["unseen"], sys.argv[4:]
    runs = broken(policy, folder, unseen) | healthy(unseen)
    for number, (name, overrides) in enumerate(runs.items()):
        if (not names or name in names) and not (folder / name / "policy").exists():
            make(name, policy, folder, overrides, seed=(100 if unseen else 1) + number)
