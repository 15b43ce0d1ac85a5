"""Reads a command of verl's, `python3 -m verl.trainer.main_ppo key=value ...`, as options of ours.

Names and defaults are those of verl/trainer/config/_generated_ppo_trainer.yaml; what clips and batches mean is in its
verl/trainer/ppo/core_algos.py and verl/workers.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from grpo.cli.migration.migration import Migration, Unsupported, carried, changes_training, relative
from grpo.cli.migration.shell import Shell
from grpo.cli.migration.shell_state import how_to_give, is_known, names_in, shown
from grpo.config.loss import UNREAD
from rewards.config.names import take_option, trainers
from rewards.config.yaml_file import parse_yaml, to_yaml
from rewards.data.source import file_rows

PROGRAM = "verl.trainer.main_ppo"
OPTIONS = "reward.custom_reward_function.reward_kwargs."
UNKNOWN = "its value is not in the text and depends on {causes}; {way}. The default of verl is taken"
OF_HYDRA = {"-cn": "--config-name", "-cp": "--config-path", "-cd": "--config-dir"}  # another file of defaults
OF_HYDRA |= {name: name for name in OF_HYDRA.values()}
ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))
LOSS_MODE = f"{ACTOR}.policy_loss.loss_mode"
LEAST = {
    "data.train_batch_size": 1,
    f"{ACTOR}.ppo_mini_batch_size": 1,
    f"{ROLLOUT}.n": 1,
    f"{ROLLOUT}.val_kwargs.n": 1,
    "trainer.total_epochs": 1,
    "trainer.total_training_steps": 1,
    f"{MODEL}.lora_rank": 0,
}
TEXTS = ("data.train_files", "data.val_files", "trainer.logger", f"{MODEL}.target_modules")  # a text, or several


def read_verl_command(command: str | Path) -> Migration:
    """Reads a command, or the shell file `*.sh` that holds one. Nothing of it is run.

    A command may start a shell file, too, with variables and arguments: `DEVICE=gpu bash run.sh data.seed=1`.
    Raises ValueError if there is no command of verl's, if the script would end before it, and for values that cannot
    be read.
    """
    text, file = str(command), Path(command)
    is_one_word = isinstance(command, Path) or not re.search(r"\s", text)
    if text.endswith(".sh") and (is_one_word or file.is_file()):
        given = read_overrides(file.read_text(encoding="utf-8"), file)
    else:
        given = read_overrides(text)
    migration = _Reading({_renamed(name): value for name, value in given.values.items()}).migration
    for name, (value, causes) in given.unknown.items():
        reason = UNKNOWN.format(causes=", ".join(causes), way=how_to_give(causes[0]))
        option = _renamed(name)
        migration.unsupported.append(Unsupported(option, value, reason, changes_training(option)))
    migration.notes.extend(given.notes)
    return migration


def _renamed(name: str) -> str:
    """Today's name of an option; `reward` was no section once.

    >>> _renamed("custom_reward_function.path")
    'reward.custom_reward_function.path'
    """
    if name.startswith("custom_reward"):
        return f"reward.{name}"
    return trainers()["verl"].get(name, {}).get("now", name)


@dataclass
class Overrides:
    """The options that a command sets."""

    values: dict[str, Any]
    unknown: dict[str, tuple[str, list[str]]]
    """Those whose value the text does not decide, with the text and the variables that would decide it."""
    notes: list[str]


def read_overrides(text: str, file: Path | None = None) -> Overrides:
    """Reads a shell text up to its command. Raises ValueError if it has none, or ends before it.

    >>> read_overrides("LR=1e-5\\npython3 -m verl.trainer.main_ppo a.lr=$LR +a.names='[x, y]'").values
    {'a.lr': 1e-05, 'a.names': ['x', 'y']}
    """
    shell = Shell(PROGRAM, os.environ, file)
    words = shell.command(text)
    if words is None:
        ends = "".join(f"; {end}" for end in shell.ends[-1:])
        raise ValueError(f"there is no command of {PROGRAM} in it{ends}; {shell.way_out()}")
    result = Overrides({}, {}, list(shell.notes))
    for name, value in _assignments(words).items():
        shell.refuse_choice(name, value)
        if is_known(value):
            result.values[name] = _value(value)
        else:
            result.unknown[name] = shown(value), list(dict.fromkeys(names_in(value)))
    return result


def _assignments(words: list[str]) -> dict[str, str]:
    """The overrides among the words of a command by name, as they are written."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in OF_HYDRA:
            joined[-1] = f"{OF_HYDRA[joined[-1]]}={word}"
        else:
            joined.append(word)
    pairs = [word.lstrip("+~").partition("=") for word in joined if "=" in word]
    pairs = [(OF_HYDRA.get(name, name), equals, value) for name, equals, value in pairs]
    known = OF_HYDRA.values()
    return {name: value for name, _, value in pairs if not name.startswith("-") or name in known}


def _value(text: str) -> object:
    try:
        return parse_yaml(text)
    except YAMLError:  # hydra knows escapes that YAML does not
        return text


def _check(values: dict[str, Any]) -> None:
    """Raises ValueError for options that are computed with, if their value is of another type than verl's default."""
    problems = []
    converted = [name for name, row in trainers()["verl"].items() if "to" in row]
    for name in [*converted, f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high"]:
        needed = _needed(name, trainers()["verl"][name].get("default"), values.get(name))
        if needed:
            problems.append(f"{name}={to_yaml(values[name], inline=True).strip()}: it is to be {needed}")
    if problems:
        raise ValueError("; ".join([*problems, "correct the command"]))


def _needed(name: str, default: object, value: object) -> str:
    """What an option is to be; empty if its value is that."""
    if name in TEXTS:
        several = value if isinstance(value, list) else [value]
        fits = all(isinstance(each, str) for each in several) and (several or name == "trainer.logger")
        return "" if fits else "a text, or a list of texts"
    if value is None and default is None:
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "True or False"
    if name in LEAST or isinstance(default, int) or name == "data.seed":
        least = LEAST.get(name)
        fits = is_number and isinstance(value, int) and (least is None or value >= least)
        return "" if fits else "a whole number" + ("" if least is None else f" of at least {least}")
    if isinstance(default, float):
        return "" if is_number else "a number"
    return "" if isinstance(value, str) else "a text"


class _Reading:
    """The options of one command: a method for each part."""

    def __init__(self, options: dict[str, Any]):
        defaults = {name: row["default"] for name, row in trainers()["verl"].items() if "default" in row}
        if str(options.get("--config-name")).removesuffix(".yaml") == "ppo_trainer":  # the one that is read here
            options = {name: value for name, value in options.items() if name not in OF_HYDRA.values()}
        self.overrides = options
        self.values: dict[str, Any] = defaults | options
        _check(self.values)
        self.files, self.tests = (self._files(f"data.{name}_files") for name in ("train", "val"))
        self.rows = list(file_rows(self.files[0])) if self.files[0].is_file() else []
        self.migration = Migration(PROGRAM)
        self.put, self.lacks = self.migration.put, self.migration.lacks
        self.migration.carry_over("verl", self.values)
        for part in (self._steps, self._policy, self._data, self._reward):
            part()
        known = {*carried("verl"), f"{ACTOR}.clip_ratio"}
        known |= {name for name in options if name.startswith(OPTIONS)}
        self.migration.lacks_counterparts(options, defaults, known)

    def _steps(self) -> None:
        """Counts prompts and steps. An update there learns from ppo_mini_batch_size prompts, of which a step samples
        train_batch_size."""
        values = self.values
        sampled = values["data.train_batch_size"]
        learned = min(values[f"{ACTOR}.ppo_mini_batch_size"], sampled)
        self.parts = math.ceil(sampled / learned)
        if self.parts > 1:
            self.lacks(f"{ACTOR}.ppo_mini_batch_size", learned, parts=self.parts)
        self.put("prompts_per_step", learned)
        epochs, steps = values["trainer.total_epochs"], values["trainer.total_training_steps"]
        if steps is None and not self.rows:
            self.lacks("trainer.total_epochs", epochs)
        most = values["data.train_max_samples"]
        rows = min(len(self.rows), most) if most > 0 else len(self.rows)
        steps = (steps or epochs * max(rows // sampled, 1)) * self.parts
        self.put("steps", steps)
        warmup, share = values[f"{ACTOR}.optim.lr_warmup_steps"], values[f"{ACTOR}.optim.lr_warmup_steps_ratio"]
        self.put("learner.warmup_steps", warmup * self.parts if warmup > 0 else math.ceil(share * steps))
        every = values["trainer.save_freq"]
        self.put("checkpoint.every", every * self.parts if every > 0 else steps)

    def _policy(self) -> None:
        values = self.values
        group, engine = values[f"{ROLLOUT}.n"], values[f"{ROLLOUT}.name"]
        if group < 2:
            self.lacks(f"{ROLLOUT}.n", group)
        self.put("rollout.group_size", max(group, 2))
        if values[f"{ACTOR}.use_kl_loss"]:
            self.put("loss.beta", values[f"{ACTOR}.kl_loss_coef"])
        if f"{ACTOR}.clip_ratio" in self.overrides and not any("clip_ratio_" in name for name in self.overrides):
            self.lacks(f"{ACTOR}.clip_ratio", values[f"{ACTOR}.clip_ratio"])
        self._loss()
        threshold = "algorithm.rollout_correction.rollout_is_threshold"
        if values["algorithm.rollout_correction.rollout_is"] and threshold not in self.overrides:
            self.lacks(threshold, values[threshold])  # 2 there, 3 here
        if values["algorithm.adv_estimator"] != "grpo":  # verl does not read it either
            take_option(self.migration.options, "loss.scale_rewards")
        if values["algorithm.adv_estimator"] == "gae":
            self.put("value.lam", values["algorithm.lam"])
        if values["algorithm.filter_groups.enable"]:
            self.put("rollout.max_resamples", values["algorithm.filter_groups.max_num_gen_batches"] or 10)
        if engine not in (None, "hf"):
            self.migration.sample_with_vllm(f"{ROLLOUT}.name", engine, {})
        if values[f"{MODEL}.lora_rank"]:
            targets = values[f"{MODEL}.target_modules"]
            self.put("lora.rank", values[f"{MODEL}.lora_rank"])
            self.put("lora.alpha", values[f"{MODEL}.lora_alpha"])
            self.put("lora.targets", None if targets == "all-linear" else targets)

    def _loss(self) -> None:
        """Sets what verl's losses read: gspo and sapo have their own mean and no dual clip, cispo has a cap."""
        mode = self.values[LOSS_MODE]
        unread = UNREAD.get(mode, ())
        if mode == "gspo":
            self.put("loss.loss_type", "grpo")
            self.put("loss.importance_sampling_level", "sequence")
            unread = ("delta",)
        elif mode == "sapo":
            self.put("loss.loss_type", "sapo")
        elif mode == "cispo":
            self._cispo()
        elif mode != "vanilla":
            self.lacks(LOSS_MODE, mode)
        for name in unread:
            take_option(self.migration.options, f"loss.{name}")

    def _cispo(self) -> None:
        low, high, mean = (
            self.values[f"{ACTOR}.{name}"] for name in ("clip_ratio_low", "clip_ratio_high", "loss_agg_mode")
        )
        self.put("loss.loss_type", "cispo")
        self.put("loss.epsilon_high", 1 + high)  # the cap itself
        if low < 1:
            self.lacks(f"{ACTOR}.clip_ratio_low", low)
        if mean != "token-mean":
            self.lacks(f"{ACTOR}.loss_agg_mode", mean)

    def _data(self) -> None:
        values, train, test = self.values, self.files[0], self.tests[0]
        in_folder = train.parent == test.parent and (train.stem, test.stem) == ("train", "test")
        self.put("data.name", relative(train.parent if in_folder else train))
        self.put("data.prompt_column", values["data.prompt_key"])
        self.put("data.solution_column", "reward_model.ground_truth")
        self.put("data.template", "chat")
        self.put("data.limit", values["data.train_max_samples"] if values["data.train_max_samples"] > 0 else None)
        self.put("seed", values["data.seed"] or 0)
        if len(self.files) > 1:
            self.lacks("data.train_files", values["data.train_files"])
        if values["trainer.test_freq"] > 0:
            rows = len(list(file_rows(test))) if in_folder and test.is_file() else 0
            if not rows or len(self.tests) > 1:
                self.lacks("data.val_files", values["data.val_files"])
            most = values["data.val_max_samples"]
            self.put("eval.limit", min(rows, most) if most > 0 else rows)
            self.put("eval.every", values["trainer.test_freq"] * self.parts)
            self.put("eval.samples", values[f"{ROLLOUT}.val_kwargs.n"])
        loggers = values["trainer.logger"]
        loggers = loggers if isinstance(loggers, list) else [loggers]
        self.put("log.trackers", [name for name in loggers if name not in ("console", "file")])
        place = f"checkpoints/{values['trainer.project_name']}/{values['trainer.experiment_name']}"
        self.put("output_dir", values["trainer.default_local_dir"] or place)

    def _files(self, option: str) -> list[Path]:
        files = self.values[option]
        return [Path(file).expanduser() for file in (files if isinstance(files, list) else [files])]

    def _reward(self) -> None:
        path, name = (self.values[f"reward.custom_reward_function.{part}"] for part in ("path", "name"))
        sources = sorted({str(row.get("data_source")) for _, row in self.rows})
        ours = "gsm8k" if sources == ["openai/gsm8k"] else "math_equivalence"
        arguments = {name.removeprefix(OPTIONS): value for name, value in self.overrides.items() if OPTIONS in name}
        function = {"function": f"verl:{path}:{name}" if path else ours}
        self.migration.rewards.append(function | ({"arguments": arguments} if arguments else {}))
        if not path and ours != "gsm8k":
            self.lacks("data.reward_fn_key", sources, ours=ours)
