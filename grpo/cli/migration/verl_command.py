"""Reads a command of verl's, `python3 -m verl.trainer.main_ppo key=value ...`, as options of ours.

Names and defaults are those of verl/trainer/config/_generated_ppo_trainer.yaml; what clips and batches mean is in its
verl/trainer/ppo/core_algos.py and verl/workers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yaml import YAMLError

from grpo.cli.migration.hydra import OF_HYDRA, overrides, resolved, value_of
from grpo.cli.migration.migration import Migration, Unsupported, carried, changes_training, relative
from grpo.cli.migration.shell import Shell
from grpo.cli.migration.shell_state import IS_SECRET, how_to_give, is_known, names_in, shown
from grpo.config.loss import UNREAD
from rewards.config.names import leaves, take_option, trainers
from rewards.config.yaml_file import parse_yaml, to_yaml
from rewards.data.source import file_rows

PROGRAM = "verl.trainer.main_ppo"
PROGRAMS = (PROGRAM, "recipe.dapo.main_dapo", "dapo.main_dapo")  # DAPO's has the same options
OPTIONS = "reward.custom_reward_function.reward_kwargs."
DELETED = "it is deleted there, and the default of verl is taken here"
BASES: dict[str, dict[str, Any]] = {"ppo_trainer": {}, "ppo_megatron_trainer": {"model_engine": "megatron"}}
SCHEDULES = {"dp": "constant", "megatron": "constant", "veomni": "cosine", "torchtitan": "linear"}  # by the engine
UNKNOWN = "its value is not in the text and depends on {causes}; {way}. The default of verl is taken"
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
MAY_BE_NULL = {f"{ACTOR}.optim.lr_warmup_steps", "reward.custom_reward_function.name"}
READ_IF = {  # options of a section that verl reads only if another option has this value
    "critic.": ("algorithm.adv_estimator", "gae"),
    "algorithm.kl_ctrl.": ("algorithm.use_kl_in_reward", True),
    "reward_model.": ("reward_model.enable", True),
    "reward.reward_model.": ("reward.reward_model.enable", True),
    "distillation.": ("distillation.enabled", True),
}
ALWAYS_READ = ("enable", "enabled", "reward_manager", "num_workers", "launch_reward_fn_async", "use_reward_loop")
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
    options, notes = _with_file(_by_name(given.values))
    migration = _Reading(options).migration
    for name, (value, causes) in given.unknown.items():
        reason = UNKNOWN.format(causes=", ".join(causes), way=how_to_give(causes[0]))
        option = _renamed(name)
        migration.unsupported.append(Unsupported(option, value, reason, changes_training(option)))
    for name in given.deleted:
        migration.unsupported.append(Unsupported(f"~{name}", None, DELETED, changes_training(_renamed(name))))
    migration.notes.extend([*given.notes, *notes])
    return migration


def _renamed(name: str) -> str:
    """Today's name of an option; `reward` was no section once.

    >>> _renamed("custom_reward_function.path")
    'reward.custom_reward_function.path'
    """
    if name.startswith("custom_reward"):
        return f"reward.{name}"
    return trainers()["verl"].get(name, {}).get("now", name)


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by today's name. A section that is given as a whole becomes its options, and a key of a mapping becomes a
    part of the mapping."""
    rows = trainers()["verl"]
    mappings = [name for name, row in rows.items() if isinstance(row.get("default"), dict)]
    options: dict[str, Any] = {}
    for given, value in values.items():
        is_section = isinstance(value, dict) and any(name.startswith(f"{given}.") for name in rows)
        for each, part in leaves({given: value}) if is_section else [(given, value)]:
            name = _renamed(each)
            mapping = next((option for option in mappings if name.startswith(f"{option}.")), None)
            if mapping:
                options[mapping] = options.get(mapping, {}) | {name.removeprefix(f"{mapping}."): part}
            elif part is not None or name == each:  # else an old name that is not used
                options[name] = part
    return options


def _with_file(options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options, after those of the file of defaults that the command names, and a note if it was read."""
    base = str(options.get("--config-name")).removesuffix(".yaml")
    others = {name: value for name, value in options.items() if name not in OF_HYDRA.values()}
    if base in BASES:
        return BASES[base] | others, []
    folder = options.get("--config-path") or options.get("--config-dir")
    file = Path(str(folder)) / f"{base}.yaml"
    if not folder or not file.is_file():
        return options, []
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
        bases = [name for name in content.pop("defaults") if name != "_self_"]
        [base] = [str(name) for name in bases if name in BASES or len(bases) > 1]
    except (YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return options, []
    content.pop("hydra", None)
    return BASES[base] | _by_name(dict(leaves(content))) | others, [f"{relative(file)} is read, too, as {base} is."]


@dataclass
class Overrides:
    """The options that a command sets."""

    values: dict[str, Any]
    unknown: dict[str, tuple[str, list[str]]]
    """Those whose value the text does not decide, with the text and the variables that would decide it."""
    notes: list[str]
    deleted: list[str] = field(default_factory=list)
    """Those that `~` deletes."""


def read_overrides(text: str, file: Path | None = None) -> Overrides:
    """Reads a shell text up to its command. Raises ValueError if it has none, or ends before it.

    >>> read_overrides("LR=1e-5\\npython3 -m verl.trainer.main_ppo a.lr=$LR +a.names='[x, y]'").values
    {'a.lr': 1e-05, 'a.names': ['x', 'y']}
    """
    shell = Shell(PROGRAMS, os.environ, file)
    words = shell.command(text)
    if words is None:
        ends = "".join(f"; {end}" for end in shell.ends[-1:])
        raise ValueError(f"there is no command of {PROGRAM} in it{ends}; {shell.way_out()}")
    result = Overrides({}, {}, list(shell.notes))
    for each in overrides(words):
        name = shown(each.name)
        shell.refuse_choice(name if is_known(each.name) else "the command", each.name + each.text)
        result.unknown.pop(name, None)
        result.values.pop(name, None)
        if not each.is_known:
            unknown = each.name + each.text
            result.unknown[name] = shown(each.text or each.name), list(dict.fromkeys(names_in(unknown)))
        elif each.deletes:
            result.deleted.append(name)
        else:
            result.values[name] = value_of(each.text)
    _resolve(result)
    return result


def _resolve(result: Overrides) -> None:
    """Gives `${key}` of Hydra, which may stand in quotes of the shell, the value of the option that it names."""
    defaults = {name: row["default"] for name, row in trainers()["verl"].items() if "default" in row}
    environment = {f"oc.env:{name}": value for name, value in os.environ.items() if not IS_SECRET.search(name)}
    known: dict[str, Any] = environment | defaults | result.values
    for name, value in list(result.values.items()):
        try:
            result.values[name] = resolved(value, known.__getitem__)
        except KeyError as error:
            del result.values[name]
            result.unknown[name] = str(value), [str(error.args[0]).removeprefix("oc.env:")]


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
    if value is None and (default is None or name in MAY_BE_NULL):
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
        engine = options.get("model_engine", "dp")
        defaults[f"{ACTOR}.optim.lr_scheduler_type"] = SCHEDULES.get(engine, "constant")
        self.overrides = options
        self.values: dict[str, Any] = defaults | options
        for name in ("trainer.save_freq", "trainer.test_freq"):
            if self.values[name] is False:
                self.values[name] = -1
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
        known |= {"model_engine"} if engine in SCHEDULES else set()
        known |= self._overlong | self._note_unread()
        self.migration.lacks_counterparts(options, defaults, known)

    def _note_unread(self) -> set[str]:
        """Notes the options that verl does not read either, so that they change nothing, and returns their names."""
        unread = set()
        for start, (switch, value) in READ_IF.items():
            if self.values.get(switch, False) == value:
                continue
            for name in self.overrides:
                if name.startswith(start) and not name.removeprefix(start).startswith((*ALWAYS_READ, "reward_kwargs.")):
                    reason = f"verl does not read it without {switch}={value}"
                    self.migration.unsupported.append(Unsupported(name, self.overrides[name], reason, False))
                    unread.add(name)
        return unread

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
        warmup, share = values[f"{ACTOR}.optim.lr_warmup_steps"] or -1, values[f"{ACTOR}.optim.lr_warmup_steps_ratio"]
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
        self._overlong = self._set_overlong()

    def _set_overlong(self) -> set[str]:
        """Sets the punishment of overlong completions of verl's reward manager `dapo`, and returns its options."""
        for section in ("reward", "reward_model"):
            names = {name for name in self.overrides if name.startswith(f"{section}.reward_kwargs.")}
            kwargs = {name.removeprefix(f"{section}.reward_kwargs."): self.overrides[name] for name in names}
            manager = self.values.get(f"{section}.reward_manager.name") or self.values.get(f"{section}.reward_manager")
            span = kwargs.get("overlong_buffer_cfg.len")
            if manager != "dapo" or not kwargs.get("overlong_buffer_cfg.enable") or not isinstance(span, int):
                continue
            most = kwargs.get("max_resp_len") or self.values["data.max_response_length"]
            self.migration.rewards.append(
                {
                    "function": "soft_overlong_punishment",
                    "weight": float(kwargs.get("overlong_buffer_cfg.penalty_factor", 1.0)),
                    "arguments": {"max_length": most, "cache_length": span},
                }
            )
            known = ("overlong_buffer_cfg.", "max_resp_len")
            names = {name for name in names if name.removeprefix(f"{section}.reward_kwargs.").startswith(known)}
            return names | {f"{section}.reward_manager.name", f"{section}.reward_manager"}
        return set()
