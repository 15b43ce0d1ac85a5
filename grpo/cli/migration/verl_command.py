"""Reads a command of verl's, `python3 -m verl.trainer.main_ppo key=value ...`, as options of ours.

Names and defaults are those of verl/trainer/config/_generated_ppo_trainer.yaml; what clips and batches mean is in its
verl/trainer/ppo/core_algos.py and verl/workers.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from pathlib import Path
from typing import Any

from grpo.cli.migration.migration import Migration, shown, tables
from grpo.data.source import file_rows
from rewards.config.yaml_file import parse_yaml

PROGRAM = "verl.trainer.main_ppo"
ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
ADAPTER = '''"""`{name}` of {file}, which verl calls for each completion, as a reward of many completions."""

import sys

sys.path.insert(0, {folder!r})

from {module} import {name} as score_one


def {name}_of_verl(completions, data_source, ground_truth, extra_info, **_):
    rows = zip(data_source, completions, ground_truth, extra_info, strict=True)
    names = ("data_source", "solution_str", "ground_truth", "extra_info")
    scores = [score_one(**dict(zip(names, row, strict=True))) for row in rows]
    return [score["score"] if isinstance(score, dict) else score for score in scores]
'''


def read_verl_command(command: str | Path, folder: Path) -> Migration:
    """Reads a command, or a shell file that holds one. Data that has to be written anew is written into `folder`.

    Raises ValueError where there is no such command.
    """
    text = command.read_text(encoding="utf-8") if isinstance(command, Path) else command
    given = {tables()["verl_renamed"].get(name, name): value for name, value in overrides(text).items()}
    return _Reading(given, folder).migration


def overrides(text: str) -> dict[str, Any]:
    """The options of the command in a text, with the variables that the text gives a value to.

    >>> overrides("LR=1e-5\\npython3 -m verl.trainer.main_ppo a.lr=$LR +a.names='[x, y]'")
    {'a.lr': 1e-05, 'a.names': ['x', 'y']}
    """
    text = re.sub(r"\\\n", " ", text)
    variables = {**os.environ, **dict(re.findall(r"^\s*(\w+)=\(([^)]*)\)", text, re.MULTILINE))}
    for name, word in re.findall(r"^\s*(?:export\s+)?(\w+)=([^\s(][^\n]*)$", text, re.MULTILINE):
        variables[name] = " ".join(shlex.split(word, comments=True))
    pattern = re.compile(r'"?\$\{(\w+)\[@\]\}"?|\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)')
    line = next((line for line in text.splitlines() if PROGRAM in line and not line.lstrip().startswith("#")), None)
    if line is None:
        raise ValueError(f"there is no command of {PROGRAM} in it")
    for _ in range(4):  # a variable may have others in it
        line = pattern.sub(lambda m: variables.get(m[1] or m[2] or m[4], m[3] or m[0]), line)
    words = shlex.split(line.partition(PROGRAM)[2], comments=True)
    pairs = [word.lstrip("+~").partition("=") for word in words if "=" in word and not word.startswith("-")]
    return {name: parse_yaml(value) for name, _, value in pairs}


class _Reading:
    """The options of one command: a method for each part."""

    def __init__(self, given: dict[str, Any], folder: Path):
        defaults = tables()["verl_defaults"]
        self.given, self.folder = given, folder
        self.values: dict[str, Any] = defaults | given
        self.migration = Migration(PROGRAM)
        self.put, self.lacks = self.migration.put, self.migration.lacks
        self.migration.carry_over("verl_same", self.values, defaults)
        self.train = self._rows("data.train_files", "train")
        for part in (self._steps, self._policy, self._data, self._reward):
            part()
        known = {*tables()["verl_same"], *tables()["verl_converted"], f"{ACTOR}.clip_ratio"}
        self.migration.lacks_counterparts(given, defaults, known)

    def _steps(self) -> None:
        """Counts prompts and steps. An update there learns from ppo_mini_batch_size prompts, of which a step samples
        train_batch_size."""
        values = self.values
        sampled = values["data.train_batch_size"]
        learned = min(values[f"{ACTOR}.ppo_mini_batch_size"], sampled)
        self.parts = math.ceil(sampled / learned)
        if self.parts > 1:
            self.lacks(f"{ACTOR}.ppo_mini_batch_size", learned, parts=self.parts)
        self.put("prompts_per_step", learned, is_default=False)
        epochs, steps = values["trainer.total_epochs"], values["trainer.total_training_steps"]
        if steps is None and not self.train:
            self.lacks("trainer.total_epochs", epochs)
        steps = (steps or epochs * max(len(self.train) // sampled, 1)) * self.parts
        self.put("steps", steps, is_default=False)
        warmup, share = values[f"{ACTOR}.optim.lr_warmup_steps"], values[f"{ACTOR}.optim.lr_warmup_steps_ratio"]
        self.put("learner.warmup_steps", warmup * self.parts if warmup > 0 else math.ceil(share * steps))
        every = values["trainer.save_freq"]
        self.put("checkpoint.every", every * self.parts if every > 0 else steps)

    def _policy(self) -> None:
        values = self.values
        group, engine = values[f"{ROLLOUT}.n"], values[f"{ROLLOUT}.name"]
        if group < 2:
            self.lacks(f"{ROLLOUT}.n", group)
        self.put("rollout.group_size", max(group, 2), is_default=False)
        if values[f"{ACTOR}.use_kl_loss"]:
            self.put("loss.beta", values[f"{ACTOR}.kl_loss_coef"])
        if f"{ACTOR}.clip_ratio" in self.given and not any("clip_ratio_" in name for name in self.given):
            self.lacks(f"{ACTOR}.clip_ratio", values[f"{ACTOR}.clip_ratio"])
        if values["algorithm.adv_estimator"] == "gae":
            self.put("value.gamma", values["algorithm.gamma"])
            self.put("value.lam", values["algorithm.lam"])
            self.put("value.learning_rate", values["critic.optim.lr"])
        if values["algorithm.filter_groups.enable"]:
            self.put("rollout.refill_draws", values["algorithm.filter_groups.max_num_gen_batches"] or 10)
        if engine not in (None, "hf"):
            self.migration.sample_with_vllm(f"{ROLLOUT}.name", engine, {})
        if values[f"{MODEL}.lora_rank"]:
            targets = values[f"{MODEL}.target_modules"]
            self.put("lora.rank", values[f"{MODEL}.lora_rank"], is_default=False)
            self.put("lora.alpha", values[f"{MODEL}.lora_alpha"], is_default=False)
            self.put("lora.targets", None if targets == "all-linear" else targets)

    def _data(self) -> None:
        values = self.values
        self.put("data.prompt_column", values["data.prompt_key"])
        self.put("data.template", "chat")
        self.put("data.name", shown(self.folder) if self.train else values["data.train_files"])
        self.put("data.limit", values["data.train_max_samples"] if values["data.train_max_samples"] > 0 else None)
        self.put("seed", values["data.seed"] or 0)
        if values["trainer.test_freq"] > 0 and (test := self._rows("data.val_files", "test")):
            most = values["data.val_max_samples"]
            self.put("eval.limit", min(most, len(test)) if most > 0 else len(test))
            self.put("eval.every", values["trainer.test_freq"] * self.parts)
            self.put("eval.samples", values[f"{ROLLOUT}.val_kwargs.n"])
        loggers = values["trainer.logger"]
        loggers = loggers if isinstance(loggers, list) else [loggers]
        self.put("log.trackers", [name for name in loggers if name not in ("console", "file")])
        place = f"checkpoints/{values['trainer.project_name']}/{values['trainer.experiment_name']}"
        self.put("output_dir", values["trainer.default_local_dir"] or place)

    def _rows(self, option: str, split: str) -> list[dict[str, Any]]:
        """Writes rows of verl's files with the gold answer in a column of its own, and gives them; none if there is no
        such file here."""
        files = self.values[option] if isinstance(self.values[option], list) else [self.values[option]]
        paths = [Path(file).expanduser() for file in files]
        if not all(path.is_file() for path in paths):
            self.lacks(option, self.values[option])
            return []
        rows = [row for path in paths for _, row in file_rows(path)]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
            for row in rows:
                gold = (row.get("reward_model") or {}).get("ground_truth")
                answer = gold if isinstance(gold, str) and gold else json.dumps(gold, default=str)
                row = {"extra_info": None, "data_source": None, "answer": answer, "ground_truth": gold} | row
                lines.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
        return rows

    def _reward(self) -> None:
        path, name = (self.values[f"reward.custom_reward_function.{part}"] for part in ("path", "name"))
        sources = sorted({str(row.get("data_source")) for row in self.train})
        if path:
            file, adapter = Path(path).expanduser().resolve(), self.folder / "functions.py"
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {"name": name, "file": file.name, "folder": str(file.parent), "module": file.stem}
            adapter.write_text(ADAPTER.format(**names), encoding="utf-8")
            self.migration.rewards.append({"function": f"{shown(adapter)}:{name}_of_verl"})
            return
        ours = "gsm8k" if sources == ["openai/gsm8k"] else "math_equivalence"
        self.migration.rewards.append({"function": ours})
        if ours != "gsm8k":
            self.lacks("data.reward_fn_key", sources, ours=ours)
