"""`watch(trainer)`: one line in a script with TRL's GRPOTrainer, and what it trains on is in a run folder.

The page, `compare`, `diagnose` and `audit` then read the folder as one of `quartet train`. What is written is what TRL
has computed; nothing is computed for the record but sums, and what TRL lacks is not there: log-probabilities of a
sampler in the same process are its learner's, and there is no `policy/approx_kl`.

    trainer's call                             what is kept of it
    _generate_and_score_completions            prompts, completions, rewards, advantages: rollouts/step_N.jsonl.zst
    _get_per_token_logps_and_entropies         the learner's log-probabilities, once for each completion
    on_step_end                                the record of the step again, now with them, and its line of metrics
    on_log                                     what TRL logs, by our names, in a second line of the step

These calls go through wrappers that hand on arguments and results as they are. What fails in the record is an event
of the run, and never the reason for a failure of the training.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, TypeVar

import zstandard

from review.findings.alarms import SCORE, Alarms, Watched
from review.findings.templates import of_prompts, of_template
from review.readers.metric_logs import TRL
from review.readers.run_folder import ENVIRONMENT
from rewards.audit.findings import ANSWERS
from rewards.config.names import ours, trainers
from rewards.config.yaml_file import to_yaml
from rewards.episode import ToolStats, answer_of
from rewards.finding import Finding
from rewards.records import is_metric, null_for_nan, rollout_path, split_groups
from rewards.ties import tied

if TYPE_CHECKING:
    from trl import GRPOTrainer

Trainer = TypeVar("Trainer", bound="GRPOTrainer")
PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "vllm", "quartet-review")


def watch(trainer: Trainer, folder: str | Path | None = None) -> Trainer:
    """Write a run folder while this trainer of TRL trains; the trainer itself, as it was. `folder` is
    `args.output_dir/watched` by default. With several processes every one calls it, and the first writes.

    Raises TypeError for what is no GRPOTrainer, before anything is changed.

    >>> trainer = watch(GRPOTrainer(model="Qwen/Qwen3-0.6B", reward_funcs=mine, train_dataset=dataset))
    >>> trainer.train()
    """
    wanted = ("_generate_and_score_completions", "_calculate_rewards", "_get_per_token_logps_and_entropies")
    if missing := [name for name in wanted if not hasattr(trainer, name)]:
        raise TypeError(
            f"{type(trainer).__name__} has no {missing[0]}: give a GRPOTrainer of trl (1.16 was tried), or a class "
            "that inherits from it"
        )
    Watcher(trainer, Path(folder or Path(trainer.args.output_dir) / "watched")).attach()
    return trainer


class Watcher:
    """What is known of the step that the trainer is in. `learned` are the learner's log-probabilities by the ids of
    prompt and completion, since TRL shuffles what it has generated; a text that came twice has them twice."""

    def __init__(self, trainer: Any, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder
        self.writes = trainer.accelerator.is_main_process
        self.alarms = Alarms([SCORE])  # a part of it may pay for length or form on purpose
        self.rewards: list[list[float | None]] = []  # [completion][function], of all processes
        self.inputs: list[Mapping[str, Any]] = []
        self.completions: list[Any] = []  # texts, or messages
        self.ids: list[list[int]] = []  # of the completions; TRL's own tensors are masked where they are not learned
        self.lines: list[dict[str, Any]] = []
        self.step_of_lines = 0
        self.keys: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.learned: dict[tuple[tuple[int, ...], tuple[int, ...]], list[list[float]]] = {}
        self.failed = 0
        self.looked = False  # at the first prompts

    # ---- what is wrapped ---------------------------------------------------------------------------------------------

    def attach(self) -> None:
        trainer = self.trainer
        calls: dict[str, Callable[..., None]] = {
            "_calculate_rewards": self._take_rewards,
            "_generate_and_score_completions": self._take_completions,
            "_get_per_token_logps_and_entropies": self._take_logprobs,
        }
        for name, take in calls.items():
            setattr(trainer, name, self._wrapped(getattr(trainer, name), take))
        trainer.add_callback(_callback(self))

    def _wrapped(self, call: Callable[..., Any], take: Callable[..., None]) -> Callable[..., Any]:
        def wrapper(*arguments: object, **named: object) -> Any:
            result = call(*arguments, **named)
            if self.trainer.model.training:
                with self._guarded():
                    take(result, *arguments, **named)
            return result

        return wrapper

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """What fails inside is an event, the first few times, and nothing else."""
        try:
            yield
        except Exception as error:
            self.failed += 1
            if self.failed <= 3:
                with contextlib.suppress(OSError):
                    self.event("watch_failed", error=f"{type(error).__name__}: {error}"[:500])

    def _take_rewards(
        self,
        result: Any,
        inputs: Sequence[Mapping[str, Any]],
        prompts: object,
        completions: Iterable[Any],
        ids: Iterable[Iterable[int]],
    ) -> None:
        self.rewards = [[None if math.isnan(mark) else mark for mark in row] for row in result.tolist()]
        self.inputs, self.completions, self.ids = list(inputs), list(completions), list(map(list, ids))

    def _take_completions(self, result: Mapping[str, Any], *_: object) -> None:
        """The completions of this process, and then those of all."""
        mine: list[dict[str, Any]] = []
        with self._guarded():
            mine = self._lines_of(result)
        lines = self._of_all(mine)
        logged = {name: list(values)[-len(lines) :] for name, values in self.trainer._logs["extra"].items()}
        for place, (line, marks) in enumerate(zip(lines, self.rewards, strict=True)):
            line["sample"] = place % self.trainer.num_generations
            line["parts"] = dict(zip(self.trainer.reward_func_names, marks, strict=True))
            line["reward"] = self._score(marks)
            line["extras"] = {name: values[place] for name, values in logged.items() if place < len(values)}
        self.lines, self.step_of_lines = lines, self.trainer.state.global_step + 1
        self.keys = [(tuple(line["prompt_ids"]), tuple(line["token_ids"])) for line in lines]
        self.learned.clear()
        self._write_rollouts()
        if not self.looked:
            self.looked = True
            self._sound(of_prompts(_tokenizer(self.trainer), self.inputs, lines))

    def _of_all(self, mine: list[Any]) -> list[Any]:
        """The entries of all processes. Every one asks, also after a failure of its own: else the others would wait."""
        if self.trainer.accelerator.num_processes == 1:
            return mine
        from accelerate.utils import gather_object

        return list(gather_object(mine))

    def _score(self, marks: Sequence[float | None]) -> float | None:
        weights = self.trainer.reward_weights.tolist()
        known = [weight * mark for weight, mark in zip(weights, marks, strict=True) if mark is not None]
        return sum(known) if known else None

    def _lines_of(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        trainer = self.trainer
        tokenizer = _tokenizer(trainer)
        tensors = {name: values.tolist() for name, values in result.items() if getattr(values, "dim", None)}
        ends, most = set(trainer.eos_token_ids), trainer.args.max_completion_length
        lines = []
        for place, row in enumerate(self.inputs):
            prompt_ids = _where(tensors["prompt_ids"][place], tensors["prompt_mask"][place])
            ids, said = self.ids[place], self.completions[place]
            prompt = row.get("prompt", "")
            line = {
                "prompt_id": hashlib.sha256(repr(prompt_ids).encode()).hexdigest()[:12],
                "prompt": prompt if isinstance(prompt, str) else tokenizer.decode(prompt_ids),
                **({} if isinstance(prompt, str) else {"messages": prompt}),
                "prompt_ids": prompt_ids,
                "text": said if isinstance(said, str) else tokenizer.decode(ids, skip_special_tokens=True),
                "token_ids": ids,
                "advantage": tensors["advantages"][place],
                "finish_reason": "stop" if ids and (ids[-1] in ends or len(ids) < most) else "length",
                "policy_version": trainer.state.global_step,
                "gold": _gold(row),
            }
            if "sampling_per_token_logps" in tensors:
                line["logprobs"] = tensors["sampling_per_token_logps"][place][: len(ids)]
            line["loss_mask"] = tensors["completion_mask"][place][: len(ids)]
            if "tool_mask" in tensors:
                line |= _episode(said, tensors["tool_mask"][place][: len(ids)])
            lines.append(line)
        return lines

    def _take_logprobs(
        self,
        result: Sequence[Any],
        _: object,
        input_ids: Any,
        attention_mask: Any,
        kept: int,
        *rest: object,
        **named: object,
    ) -> None:
        """Of the model that learns, where it is asked for a gradient, for the last `kept` tokens of each row."""
        logprobs = result[0]
        if not logprobs.requires_grad:
            return
        rows = zip(input_ids.tolist(), attention_mask.tolist(), logprobs.detach().float().tolist(), strict=True)
        for ids, mask, values in rows:
            first = len(ids) - kept
            key = tuple(_where(ids[:first], mask[:first])), tuple(_where(ids[first:], mask[first:]))
            self.learned.setdefault(key, []).append(_where(values, mask[first:]))

    # ---- what is written ---------------------------------------------------------------------------------------------

    def begin_run(self) -> None:
        if not self.writes:
            return
        (self.folder / "rollouts").mkdir(parents=True, exist_ok=True)
        step = self.trainer.state.global_step
        (self.folder / "config.yaml").write_text(to_yaml(self.options()), encoding="utf-8")
        machine = {
            "time": _now(),
            "command": " ".join(sys.argv),
            "hardware": _hardware(self.trainer.accelerator.device),
            "versions": dict(_versions()),
        }
        (self.folder / ENVIRONMENT).write_text(json.dumps(machine, indent=1), encoding="utf-8")
        self._drop_after(step)
        self.event("resume" if step else "begin", from_step=step, by="TRL")
        template = getattr(self.trainer, "chat_template", None)
        self._sound(of_template(_tokenizer(self.trainer), template, self.trainer.eos_token_ids))

    def _drop_after(self, step: int) -> None:
        """A training that goes on from a checkpoint makes the steps after it again."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if step and file.exists() else []
        file.write_text("".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")

    def options(self) -> dict[str, Any]:
        """The arguments of the trainer by our names, where there is such an option."""
        args, names = self.trainer.args, trainers()
        options: dict[str, Any] = {}
        for name, row in {**names["trl"], **names["trainer"]}.items():
            value = getattr(args, name, None)
            value = row.get("values", {}).get(value, value) if isinstance(value, str | bool | int) else value
            if row.get("same") and isinstance(value, str | bool | int | float):
                _put(options, ours(row)[0], value)
        _put(options, "steps", self.trainer.state.max_steps)
        _put(options, "prompts_per_step", self._prompts_per_step())
        _put(options, "rollout.max_completion_tokens", args.max_completion_length)
        model = self.trainer.model
        options["model"] = str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)
        options["output_dir"] = str(self.folder)
        weights = self.trainer.reward_weights.tolist()
        named = zip(self.trainer.reward_func_names, weights, strict=True)
        options["rewards"] = [{"function": name, "weight": weight, "name": name} for name, weight in named]
        return options

    def _prompts_per_step(self) -> int:
        args = self.trainer.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return int(rows * self.trainer.accelerator.num_processes // self.trainer.num_generations)

    def end_step(self) -> None:
        learned = dict(self._of_all(list(self.learned.items())))
        if not self.writes or not self.lines or self.step_of_lines != self.trainer.state.global_step:
            return
        if learned:
            for key, line in zip(self.keys, self.lines, strict=True):
                each = learned.get(key) or [None]
                line["policy_logprobs"] = each[0]
                learned[key] = each[1:] or each  # the next line of the same text has the next ones
            self._write_rollouts()
        metrics = measured(self.lines)
        groups = [list(map(self._watched, group)) for group in split_groups(self.lines)]
        self._sound(self.alarms.observe(groups))
        self.line(self.step_of_lines, metrics | self.alarms.values)

    def _sound(self, alarms: Sequence[Finding]) -> None:
        for alarm in alarms:
            self.event("alarm", step=self.step_of_lines, said=alarm.evidence, **alarm.as_json())

    def _watched(self, line: Mapping[str, Any]) -> Watched:
        marks = {SCORE: line["reward"]}
        question = str(line["prompt"])
        ids = line["token_ids"]
        if "sampled" in line:
            ids = _where(ids, line["sampled"])
        turns = line.get("turns") or []
        text = answer_of(line["text"], turns)
        return Watched.of(line["prompt_id"], question, line["gold"], text, ids, marks, max(len(turns), 1))

    def log(self, logs: Mapping[str, Any]) -> None:
        step = self.trainer.state.global_step
        known = {TRL[name]: value for name, value in logs.items() if name in TRL}
        if self.writes and known and step:
            self.line(step, known)

    def end(self) -> None:
        self.event("end", how="finished", after_step=self.trainer.state.global_step)

    def line(self, step: int, metrics: Mapping[str, Any]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if value is not None and is_metric(value)}
        self._append("metrics.jsonl", {"step": step, **finite})

    def event(self, event: str, **fields: object) -> None:
        if self.writes:
            self._append("events.jsonl", {"time": _now(), "event": event, **fields})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def _write_rollouts(self) -> None:
        if not self.writes:
            return
        lines = [{"step": self.step_of_lines, "backend": "TRL", **line} for line in self.lines]
        text = "".join(json.dumps(null_for_nan(line), default=str) + "\n" for line in lines)
        path = rollout_path(self.folder, self.step_of_lines)
        partial = path.with_suffix(".partial")
        partial.write_bytes(zstandard.compress(text.encode()))
        partial.replace(path)


def measured(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Rewards and lengths of a step's completions, by the names of `quartet train`."""
    rewards = [line["reward"] for line in lines if line["reward"] is not None]
    groups = [[line["reward"] for line in group] for group in split_groups(lines)]
    known = [[reward for reward in group if reward is not None] for group in groups]
    lengths = [sum(line.get("sampled") or [1] * len(line["token_ids"])) for line in lines]
    metrics = {
        "reward/abstained": fmean(line["reward"] is None for line in lines),
        "group/zero_variance": fmean(tied(group) for group in groups),
        "completion/tokens": sum(lengths),
        "completion/length_mean": fmean(lengths),
        "completion/length_max": max(lengths),
        "completion/truncated": fmean(line["finish_reason"] == "length" for line in lines),
    }
    if rewards:
        metrics |= {"reward/mean": fmean(rewards), "reward/std": fmean(pstdev(group) for group in known if group)}
    for name in lines[0]["parts"]:
        marks = [line["parts"][name] for line in lines if line["parts"][name] is not None]
        metrics |= {f"reward/part/{name}": fmean(marks)} if marks else {}
    return metrics


def _callback(watcher: Watcher) -> Any:
    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        """Tells the watcher where the trainer is."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            with watcher._guarded():
                watcher.begin_run()

        def on_step_end(self, *_: object, **__: object) -> None:
            with watcher._guarded():
                watcher.end_step()

        def on_log(self, *_: object, logs: Mapping[str, Any], **__: object) -> None:
            with watcher._guarded():
                watcher.log(logs)

        def on_train_end(self, *_: object, **__: object) -> None:
            with watcher._guarded():
                watcher.end()

    return Watching()


def _tokenizer(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _where(values: Sequence[Any], mask: Sequence[int]) -> list[Any]:
    return [value for value, keep in zip(values, mask, strict=True) if keep]


def _gold(row: Mapping[str, Any]) -> str | None:
    """The right answer, where a column of the data has it."""
    return next((str(row[name]) for name in ANSWERS if isinstance(row.get(name), str | int | float)), None)


def _episode(said: object, tool_mask: Sequence[int]) -> dict[str, Any]:
    """Turns of an episode with tools, and which of its tokens the policy sampled."""
    messages = said if isinstance(said, list) else []
    turns = []
    for message in messages:
        turns.append({**message, "content": str(message.get("content") or "")})
    calls = sum(message["role"] == "tool" for message in turns)
    return {"turns": turns, "sampled": list(map(bool, tool_mask)), "tools": vars(ToolStats(calls=calls))}


def _hardware(device: Any) -> dict[str, Any]:
    """The processor, and the accelerator if the trainer is on one."""
    import torch

    gpus = []
    if torch.accelerator.is_available() and device.index is not None:  # a processor has none
        names = torch.get_device_module(device)
        gpus = [names.get_device_name(index) for index in range(torch.accelerator.device_count())]
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def _put(options: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        options = options.setdefault(section, {})
    options[last] = value


def _versions() -> Iterator[tuple[str, str]]:
    yield "python", sys.version.split()[0]
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat()
