"""Reads a command of verl's, `python3 -m verl.trainer.main_ppo key=value ...`, as options of ours.

Names and defaults are those of verl/trainer/config/_generated_ppo_trainer.yaml; what clips and batches mean is in its
verl/trainer/ppo/core_algos.py and verl/workers.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from yaml import YAMLError

from grpo.cli.migration.migration import Migration, Unsupported, relative, tables
from rewards.config.yaml_file import parse_yaml
from rewards.data.source import file_rows

PROGRAM = "verl.trainer.main_ppo"
OPTIONS = "reward.custom_reward_function.reward_kwargs."
UNKNOWN = "its value is not in the text; write it there. The default of verl is taken"
SECRET = re.compile("KEY|TOKEN|SECRET|PASS")  # variables whose values are not written
OF_HYDRA = {"-cn": "--config-name", "-cp": "--config-path", "-cd": "--config-dir"}  # another file of defaults
ASSIGNMENT = re.compile(  # an array of several lines or of one, or a word
    r"^[ \t]*(?:export[ \t]+)?(\w+)=(?:\([ \t]*\n(.*?)^[ \t]*\)|\(([^\n]*)\)[ \t]*$|(|[^\s(][^\n]*)$)", re.M | re.S
)
ACTOR, MODEL, ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("actor", "model", "rollout"))


def read_verl_command(command: str | Path) -> Migration:
    """Reads a command, or the shell file `*.sh` that holds one. Raises ValueError where there is none."""
    text = Path(command).read_text(encoding="utf-8") if str(command).endswith(".sh") else str(command)
    options = {_renamed(name): value for name, value in overrides(text).items()}
    return _Reading(options).migration


def _renamed(name: str) -> str:
    """Today's name of an option; `reward` was no section once.

    >>> _renamed("custom_reward_function.path")
    'reward.custom_reward_function.path'
    """
    return f"reward.{name}" if name.startswith("custom_reward") else tables()["verl_renamed"].get(name, name)


def _sum_of(terms: str) -> int:
    """Adds up whole numbers and their products as a shell does.

    >>> _sum_of("2 * 1024 + 512 / 3 - 1")
    2217
    """
    total = 0
    for sign, product in re.findall(r"([-+]?)([\d*/]+)", re.sub(r"\s", "", terms)):
        value = 1
        for operator, number in re.findall(r"([*/]?)(\d+)", product):
            value = value // int(number) if operator == "/" else value * int(number)
        total += -value if sign == "-" else value
    return total


def overrides(text: str) -> dict[str, Any]:
    """The options of the command in a text, with the variables that the text gives a value to.

    >>> overrides("LR=1e-5\\npython3 -m verl.trainer.main_ppo a.lr=$LR +a.names='[x, y]'")
    {'a.lr': 1e-05, 'a.names': ['x', 'y']}
    """
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"\$\(\([^()]*\)\)", lambda computed: "".join(computed[0].split()), text)  # one word each
    lines = text.splitlines()
    number = next((i for i, line in enumerate(lines) if PROGRAM in line and not line.lstrip().startswith("#")), None)
    if number is None:
        raise ValueError(f"there is no command of {PROGRAM} in it")
    variables = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    before = re.split(r"&&|;", lines[number].partition(PROGRAM)[0])[:-1]  # of the same line
    for name, rows, row, word in ASSIGNMENT.findall("\n".join([*lines[:number], *before])):
        with suppress(ValueError):  # a text of several lines
            value = next(iter(shlex.split(word, comments=True)), "") if word else rows or row
            variables[name] = _resolved(value, variables)
    words = _resolved(lines[number], variables).partition(PROGRAM)[2]
    for short, option in OF_HYDRA.items():
        words = re.sub(rf"(?<!\S)({short}|{option})[ =]+", f"{option}=", words)
    pairs = [word.lstrip("+~").partition("=") for word in shlex.split(words, comments=True) if "=" in word]
    known = OF_HYDRA.values()
    return {name: _value(value) for name, _, value in pairs if not name.startswith("-") or name in known}


def _resolved(text: str, variables: dict[str, str]) -> str:
    """The text with the values of variables, or what it names for those that have none, and with its sums."""

    def value_of(mention: re.Match[str]) -> str:
        value, otherwise = variables.get(mention[1] or mention[2] or mention[4]), mention[3]
        if otherwise is not None and not value:
            return otherwise
        return mention[0] if value is None else value

    def sum_of(mention: re.Match[str]) -> str:
        terms = re.sub(r"[A-Za-z_]\w*", lambda name: variables.get(name[0], name[0]), mention[1])
        is_sum = re.fullmatch(r"\s*\d+(\s*([-+*]\s*\d+|/\s*0*[1-9]\d*))*\s*", terms)
        return str(_sum_of(terms)) if is_sum else f"$(({terms}))"

    for _ in range(8):  # what a variable has in it, or what stands for another one
        text = re.sub(r'"?\$\{(\w+)\[@\]\}"?|\$\{(\w+)(?::?-([^${}]*))?\}|\$(\w+)', value_of, text)
        text = re.sub(r"\$\(\(([^()]*)\)\)", sum_of, text)
    return text


def _value(text: str) -> Any:
    try:
        return parse_yaml(text)
    except YAMLError:  # hydra knows escapes that YAML does not
        return text


class _Reading:
    """The options of one command: a method for each part."""

    def __init__(self, options: dict[str, Any]):
        defaults = tables()["verl_defaults"]
        if str(options.get("--config-name")).removesuffix(".yaml") == "ppo_trainer":  # the one that is read here
            options = {name: value for name, value in options.items() if name not in OF_HYDRA.values()}
        unknown = {name: value for name, value in options.items() if isinstance(value, str) and "$" in value}
        options = {name: value for name, value in options.items() if name not in unknown}
        self.overrides = options
        self.values: dict[str, Any] = defaults | options
        self.files, self.tests = (self._files(f"data.{name}_files") for name in ("train", "val"))
        self.rows = list(file_rows(self.files[0])) if self.files[0].is_file() else []
        self.migration = Migration(PROGRAM)
        self.put, self.lacks = self.migration.put, self.migration.lacks
        self.migration.carry_over("verl_same", self.values)
        self.migration.unsupported.extend(Unsupported(name, value, UNKNOWN) for name, value in unknown.items())
        for part in (self._steps, self._policy, self._data, self._reward):
            part()
        known = {*tables()["verl_same"], *tables()["verl_converted"], f"{ACTOR}.clip_ratio"}
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
            self.put("lora.rank", values[f"{MODEL}.lora_rank"])
            self.put("lora.alpha", values[f"{MODEL}.lora_alpha"])
            self.put("lora.targets", None if targets == "all-linear" else targets)

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
