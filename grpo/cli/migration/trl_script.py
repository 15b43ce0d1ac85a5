"""Reads a script with TRL's GRPOConfig and GRPOTrainer without training, as options of ours.

Names, defaults and the arithmetic of batches are those of TRL 1.16: trl/trainer/grpo_config.py and grpo_trainer.py
(`__post_init__`, `_get_train_sampler`, `_prepare_inputs`), and of transformers 5: trainer.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from grpo.cli.migration.functions import Functions
from grpo.cli.migration.migration import Migration, carried, relative
from grpo.config.loss import UNREAD
from rewards.config.names import take_option

RECORDER = Path(__file__).with_name("recorder.py")  # a program, so that no module of ours hides one of the script's
ENGINE = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_max_model_length": "max_model_len",
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "vllm_model_impl": "model_impl",
}
OF_PEFT = ("task_type", "peft_type", "peft_version", "inference_mode", "base_model_name_or_path", "revision")
NO_LIMIT = 1e9  # of the gradient's norm


def read_trl_script(
    script: Path, folder: Path, arguments: Sequence[str] = (), *, processes: int = 1, timeout_s: float = 600.0
) -> Migration:
    """Runs `script` with its `arguments`, up to its GRPOTrainer, in a process of its own; no model is loaded.

    Data that it has made in memory, and functions that cannot be imported from where they are, are written into
    `folder`. `processes` is how many the script would be launched with. Raises ValueError with what the script has
    printed last where it makes no GRPOTrainer.
    """
    if processes < 1:
        raise ValueError(f"--processes={processes}: give 1 or more, as many as `accelerate launch` would start")
    facts = _facts(script, folder, arguments, timeout_s)
    return _Reading(script, folder, facts, processes).migration


def _facts(script: Path, folder: Path, arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    if not script.is_file():
        raise FileNotFoundError(f"there is no script {script}")
    with TemporaryDirectory() as place:
        facts, log = Path(place) / "facts.json", Path(place) / "log"
        words = [sys.executable, RECORDER, facts, folder.absolute(), script, *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"WANDB_MODE": "disabled"},
                start_new_session=True,
            )
        try:
            end = f"ended without one (exit code {process.wait(timeout_s)})"
        except subprocess.TimeoutExpired:
            end = f"had made none after {timeout_s:g} s"
        finally:
            with suppress(ProcessLookupError):  # the script, and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not facts.is_file():
            others = set(re.findall(r"(\w+Trainer)\(", script.read_text(encoding="utf-8", errors="replace")))
            if others and "GRPOTrainer" not in others:
                end += f"; {', '.join(sorted(others))} is not read"
            last = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:])
            raise ValueError(f"{script} is to make a GRPOTrainer, and {end}. It printed last:\n{last}")
        return json.loads(facts.read_text(encoding="utf-8"))


class _Reading:
    """One script's facts, as options: a method for each part."""

    def __init__(self, script: Path, folder: Path, facts: dict[str, Any], processes: int):
        known = {*carried("trl")}
        others = facts["of_other_versions"]
        self.facts, self.folder, self.processes, self.defaults = facts, folder, processes, facts["defaults"]
        self.train, self.test = (facts["data"].get(name) for name in ("train", "test"))
        self.values: dict[str, Any] = defaultdict(lambda: None, facts["values"])  # another version may have fewer
        self.values |= {name: others[name] for name in known & set(others)}
        self.functions = Functions(script, folder)
        self.migration = Migration(f"{script.name}, for TRL")
        self.put, self.lacks = self.migration.put, self.migration.lacks
        self.migration.carry_over("trl", self.values)
        for part in (self._steps, self._optimizer, self._loss, self._rollout, self._model, self._adapters):
            part()
        for part in (self._data, self._evaluation, self._saving, self._rewards, self._programs):
            part()
        self.migration.lacks_counterparts(facts["values"] | others, self.defaults, known)
        self.migration.lacks_counterparts(facts["others"], {}, ())
        for assignment in facts["assigned"]:
            self.lacks("trainer", assignment)
        if facts["refused"]:
            self.migration.notes.append(f"TRL itself refuses this configuration here: {facts['refused']}")
        if self.functions.write():
            self.migration.notes.append(f"{relative(self.functions.file)} holds functions that the script cannot lend.")

    def _steps(self) -> None:
        """Counts prompts and steps. An update there learns from B·W·G completions, G the accumulated micro-batches of
        B; S micro-batches come from one generation, and each generation serves num_iterations times."""
        values = self.values
        each, accumulated = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
        group, self.times = values["num_generations"], values["num_iterations"]
        passes = values["steps_per_generation"] or accumulated
        if values["generation_batch_size"]:
            passes = max(values["generation_batch_size"] // (each * self.processes), 1)
        completions = each * self.processes * accumulated
        prompts = math.ceil(completions / group)
        self.put("prompts_per_step", prompts)
        self.migration.notes.append(
            f"{each} completions x {self.processes} processes x {accumulated} accumulated = {completions} an update: "
            f"{prompts} prompts x {group} completions."
        )
        if completions % group:
            self.lacks("gradient_accumulation_steps", accumulated, completions=completions, prompts=prompts)
        if passes > accumulated:
            name = "generation_batch_size" if values["generation_batch_size"] else "steps_per_generation"
            self.lacks(name, values[name], parts=passes / accumulated)
        rows = self.train and self.train["count"]
        if values["max_steps"] <= 0 and not rows:
            self.lacks("num_train_epochs", values["num_train_epochs"])
        batches = max((rows or 1) * group // (each * self.processes * passes), 1) * self.times * passes
        epochs = values["num_train_epochs"] * math.ceil(batches / accumulated)
        self.updates = values["max_steps"] if values["max_steps"] > 0 else math.ceil(epochs)
        self.epoch = math.ceil(batches / accumulated / self.times)
        self.put("steps", math.ceil(self.updates / self.times))

    def _in_steps(self, updates: float) -> int:
        """A number of updates, or a share of them below 1, in steps."""
        return max(math.ceil((updates * self.updates if updates < 1 else updates) / self.times), 1)

    def _optimizer(self) -> None:
        values = self.values
        warmup = values["warmup_steps"] or values["warmup_ratio"]
        if warmup and values["lr_scheduler_type"] != "constant":  # which does not read it there
            self.put("learner.warmup_steps", self._in_steps(warmup))
        self.put("learner.betas", [values["adam_beta1"], values["adam_beta2"]])
        self.put("learner.max_grad_norm", values["max_grad_norm"] or NO_LIMIT)
        checkpoints = values["activation_checkpointing"]
        checkpoints = values["gradient_checkpointing"] if checkpoints is None else checkpoints
        self.put("learner.gradient_checkpointing", bool(checkpoints))

    def _loss(self) -> None:
        values, kind = self.values, self.values["loss_type"]
        if kind == "cispo" and values["epsilon_high"] is None:
            self.put("loss.epsilon_high", values["epsilon"])  # there the cap is epsilon, too
        for name in UNREAD.get(kind, ()):  # TRL does not read it either
            take_option(self.migration.options, f"loss.{name}")
        if kind == "bnpo":
            self.lacks("per_device_train_batch_size", values["per_device_train_batch_size"])
        corrects = values["use_vllm"] and values["vllm_importance_sampling_correction"]
        self.put("loss.importance_correction", values["vllm_importance_sampling_mode"] if corrects else "none")

    def _rollout(self) -> None:
        values = self.values
        if values["max_completion_length"]:
            self.put("rollout.max_completion_tokens", values["max_completion_length"])
        else:
            self.lacks("max_completion_length", None)
        if values["max_tool_calling_iterations"] is not None:
            self.put("max_turns", values["max_tool_calling_iterations"] + 1)
        elif (self.facts["tools"] or self.facts["environments"]) and values["max_completion_length"]:
            self.put("max_turns", values["max_completion_length"])  # no limit: a turn has a token at least
        self.put("data.chat_template_kwargs", values["chat_template_kwargs"] or {})
        if values["use_vllm"]:
            if values["vllm_mode"] == "server":
                self.lacks("vllm_mode", "server")
            engine = {ours: values[name] for name, ours in ENGINE.items() if values[name] != self.defaults.get(name)}
            self.migration.sample_with_vllm("use_vllm", True, engine)

    def _model(self) -> None:
        values, model = self.values, self.facts["model"]
        arguments = model["arguments"] | (values["model_init_kwargs"] or {})
        revision = arguments.pop("revision", None)
        precision = [arguments.pop(name, None) for name in ("dtype", "torch_dtype")]
        self.bits = arguments.pop("quantization_config", None) or self.facts["quantization"]
        self.bits |= {name: arguments.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in arguments}
        self.migration.lacks_counterparts(arguments, {}, ())
        if not model["name"]:
            self.lacks("model", "made in the script")
        self.put("model", f"{model['name']}@{revision}" if revision not in (None, "main") else model["name"] or "tiny")
        half = values["fp16"] or "float16" in precision
        if half:
            self.lacks("fp16", True)
        if half or values["bf16"] or "bfloat16" in precision:
            self.put("dtype", "bfloat16")
        elif values["bf16"] is False:
            self.put("dtype", "float32")
        tokenizer = self.facts["tokenizer"]
        if tokenizer and (tokenizer["name"] != model["name"] or tokenizer["other_template"]):
            self.lacks("processing_class", tokenizer["name"])
        self.put("output_dir", values["output_dir"] or "trainer_output")

    def _adapters(self) -> None:
        lora = self.facts["model"]["lora"]
        if self.bits and (lora is None or not self.bits.get("load_in_4bit")):
            self.lacks("quantization_config", self.bits)
        if lora is None:
            return
        values, targets = lora["values"], lora["values"].get("target_modules")
        if lora["kind"] != "LoraConfig":
            self.lacks("peft_config", lora["kind"])
        self.put("lora.rank", values.get("r", 16))
        self.put("lora.alpha", values.get("lora_alpha", 32))
        self.put("lora.base", "nf4" if self.bits.get("load_in_4bit") else None)
        if targets is None:
            from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

            targets = list(USUAL.get(self.facts["model"]["type"], ())) or "those that peft would choose"
        if isinstance(targets, list):
            self.put("lora.targets", sorted(targets))
        elif targets != "all-linear":
            self.lacks("target_modules", targets)
        self.migration.lacks_counterparts(values, lora["defaults"], {*carried("lora"), *OF_PEFT})

    def _data(self) -> None:
        if self.train is None:
            raise ValueError("train_dataset: the trainer has none; give it one, with a row for each prompt")
        if self.train["pictures"]:
            raise ValueError("train_dataset: its rows have pictures, and a policy reads only text here")
        if self.train["count"] is None:
            self.lacks("train_dataset", "a stream, whose first rows were taken")
        source = self.train["source"]
        self.put("data.name", source["name"] if source else relative(self.folder))
        self.put("data.split", source["split"] if source else "train")
        self.put("data.prompt_column", "prompt")
        self.put("data.solution_column", self.train["solution"])
        self.put("data.template", "chat" if self.train["chat"] else "{prompt}")
        if not source:
            self.migration.notes.append(f"{relative(self.folder)} holds the rows, as the script has made them.")

    def _evaluation(self) -> None:
        values, test = self.values, self.test
        if values["eval_strategy"] == "no" or test is None:
            return
        self.put("eval.limit", test["count"] or 100)
        self.put("eval.split", test["source"]["split"] if test["source"] else "test")
        self.put("eval.samples", values["num_generations_eval"] or values["num_generations"])
        steps = self._in_steps(values["eval_steps"] or values["logging_steps"])
        self.put("eval.every", self.epoch if values["eval_strategy"] == "epoch" else steps)

    def _saving(self) -> None:
        values = self.values
        every = {"no": self.migration.options["steps"], "epoch": self.epoch}.get(values["save_strategy"])
        self.put("checkpoint.every", every or self._in_steps(values["save_steps"]))
        self.put("checkpoint.keep_best", values["load_best_model_at_end"] or values["save_strategy"] == "best")
        trackers = values["report_to"] or []
        trackers = [trackers] if isinstance(trackers, str) else trackers
        if "all" not in trackers:
            self.put("log.trackers", [name for name in trackers if name != "none"])

    def _rewards(self) -> None:
        """Sets each reward function by a reference, or a reward model, with its weight."""
        chat = self.train["chat"]
        if "environments" in self.facts["read"]:
            raise ValueError(
                "reward_funcs: a reward reads `environments`, which are in other processes here; return its score from "
                "a method get_reward(self) of the environment, which TRL calls too"
            )
        weights = self.values["reward_weights"] or [1.0] * len(self.facts["rewards"])
        for number, (fact, weight) in enumerate(zip(self.facts["rewards"], weights, strict=False)):
            reward: dict[str, Any] = {"weight": weight}
            if "model" in fact:
                kind = {"kind": "chat_classifier"} if chat else {}
                reward |= {"function": f"model:{fact['model']}", "name": f"reward_model_{number}", "arguments": kind}
            elif function := self._reference("reward_funcs", fact):
                reward |= {"function": f"chat:{function}" if chat else function, "arguments": fact.get("arguments", {})}
            if "function" in reward:
                self.migration.rewards.append(
                    {name: value for name, value in reward.items() if value or name == "weight"}
                )

    def _programs(self) -> None:
        """Sets tools and environments, which have TRL's contract here."""
        tools = [self._reference("tools", fact) for fact in self.facts["tools"]]
        self.put("tools", [reference for reference in tools if reference])
        facts = self.facts["environments"]
        classes = {name: self._reference("environment_factory", fact) for name, fact in facts.items()}
        if classes and all(classes.values()):
            self.put("environment", classes.get("", classes))

    def _reference(self, option: str, fact: dict[str, Any]) -> str | None:
        reference = self.functions.reference(fact)
        if reference is None:
            self.lacks(option, fact.get("text") or fact["name"])
        return reference
