"""The two steps of a rehearsal, by the run's own path, and the same steps once more with a fault in each."""

from __future__ import annotations

import contextlib
import errno
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil

from grpo.cli.commands.rehearsal import Rehearsal, key_of, with_options
from grpo.config.run import TrainConfig
from grpo.learner.update import NonFiniteStep
from grpo.run import checkpoint
from grpo.run.memory_errors import OutOfMemory
from grpo.run.stop import Stopped
from grpo.task.plan import REFUSALS, Plan
from grpo.task.table import option
from grpo.task.task import Task
from grpo.train import train
from policies import presets, tensor_files
from policies.cut import cut_model
from policies.mtp import MTPHead
from policies.policy import Policy
from review.readers.run_folder import read_events, read_metrics
from rewards.config.options import dump_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from rewards.group_score import GroupScore
    from rollout.group import RolloutGroup

FAILURES = (*REFUSALS, NonFiniteStep, OutOfMemory)
LATEST_S, HANGS_S = 120.0, 2.0  # until the first step of a run that is killed, and of a worker that hangs
WORKERS = ("rewards.isolation.child", "ray::")  # in the command lines of processes that score, act and sample
# Metrics that a fault may change; canaries are drafted by costs that each run measures, and round otherwise.
BY_CHANCE = ("time/", "speed/", "memory/", "faults/", "run/", "sync/", "sync_check/")
SHOWN = (
    *("reward/mean", "reward/errors", "reward/abstained", "tools/calls_mean", "tools/failures"),
    *("time/rollout", "time/reward", "time/learn", "time/step"),
)
# fmt: off
MOST = {
    "prompts_per_step": 2, "rollout.group_size": 4, "rollout.max_completion_tokens": 32, "rollout.max_resamples": 1,
    "sft.steps": 1, "sft.batch_size": 2, "eval.limit": 2, "eval.samples": 2, "rollout.draft_tokens": 2,
}
OTHERWISE = {  # what makes a run large or sends something away
    "steps": 2, "checkpoint.every": 1, "device": "cpu", "dtype": "float32", "log": {"trackers": []},
    "rollout.backend": None, "rollout.vllm": {}, "rollout.workers": 0, "rollout.staleness": 0,
    "learner.workers": 0, "learner.parallel": {}, "learner.optimizer": "adamw",
}
# fmt: on
# A reward of random numbers that breaks ties, so that the steps learn though the random policy is never right.
UNLIKE_REWARD = "def unlike(completion_ids, **_):\n    return [sum(ids) % 997 / 997 for ids in completion_ids]\n"
UNLIKE_WEIGHT = 1e-4


def take_steps(result: Rehearsal, plan: Plan, config: TrainConfig, tokenizer: object, faults: bool) -> None:
    """Trains a small policy for two steps, and tells what the steps say of the real run."""
    with tempfile.TemporaryDirectory(prefix="rehearsal_") as place, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(place)
        try:
            small = rehearsed(config, write_policy(plan, tokenizer, folder / "model"), folder / "run")
        except ValueError as error:
            return result.add("no-step", f"no step was taken: {error}", "model")
        try:
            train(small)
        except Stopped as stopped:  # whose words are about a run that can go on
            raise KeyboardInterrupt from stopped
        except FAILURES as error:
            step = len(steps_of(small.output_dir)) + 1
            return result.add("refused", f"step {step} of the rehearsal: {error}", key_of(str(error)))
        result.steps = steps_of(small.output_dir)
        look_at_steps(result, small)
        for name, fault in FAULTS.items() if faults else ():
            disturbed = with_options(small, {"output_dir": folder / name.replace(" ", "_")})
            result.disturbed[name] = fault(disturbed, result)


def write_policy(plan: Plan, tokenizer: object, folder: Path) -> str:
    """Writes a random policy of the plan's architecture that knows all tokens. Returns what `model` is then. A preset
    is small enough. Raises ValueError where no small model can be built."""
    if plan.source.base in presets.PRESETS:
        return plan.source.base
    model = cut_model(plan.shape, whole_vocabulary=True)
    model.generation_config = plan.bare_policy().trunk.generation_config
    head = MTPHead(model.config) if plan.head else None
    Policy(model, head, tokenizer).save(folder)
    return str(folder)


def rehearsed(config: TrainConfig, model: str, folder: Path) -> TrainConfig:
    """The configuration of the rehearsal: all that decides about texts and rewards stays."""
    changes: dict[str, Any] = OTHERWISE | {key: min(option(config, key) or 0, most) for key, most in MOST.items()}
    changes |= {"model": model, "output_dir": folder}
    changes |= {"eval.every": config.eval.every and 1} | ({"lora.base": None} if config.lora else {})
    if config.distill.teacher:
        changes |= {"distill.teacher": model}
    else:
        file = folder.with_name("unlike.py")
        file.write_text(UNLIKE_REWARD, encoding="utf-8")
        unlike = {"function": f"{file}:unlike", "weight": UNLIKE_WEIGHT}
        changes["rewards"] = [*(reward.model_dump() for reward in config.rewards), unlike]
        for source in (named := [source.model_dump() for source in config.data]):
            source["rewards"] = source["rewards"] and [*source["rewards"], "unlike"]
        changes["data"] = named
    return with_options(config, changes)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics of whole steps; step 0 is an evaluation."""
    return [line for line in read_metrics(folder) if line["step"]] if (folder / "metrics.jsonl").exists() else []


def look_at_steps(result: Rehearsal, config: TrainConfig) -> None:
    """Reads what rewards and tools did with text that means nothing."""
    last = result.steps[-1]
    result.facts["second step of a random policy"] = {name: last[name] for name in SHOWN if last.get(name) is not None}
    failed = [event["message"] for event in read_events(config.output_dir) if event["event"] == "reward_error"]
    right, noise = result.facts.get("scores", {}).get("right"), last.get("reward/mean")
    if failed:
        what = f"rewards or tools failed {len(failed)} times in two steps, the first time: {failed[0]}"
        result.add("reward-fails", what, "reward.on_error")
    elif last.get("reward/abstained") == 1:
        result.add("unmarked", "no completion of the random policy has a score", "rewards")
    if right and noise is not None and noise > 0.8 * right:
        what = f"random tokens score {noise:.3g}, and a right answer {right:.3g}"
        result.add("noise-rewarded", what, "rewards")


# ---- faults ---------------------------------------------------------------------------------------------------------


def _compared(config: TrainConfig, result: Rehearsal) -> str:
    one, other = (
        [{name: value for name, value in step.items() if not name.startswith(BY_CHANCE)} for step in steps]
        for steps in (steps_of(config.output_dir), result.steps)
    )
    same = one == other
    return "and the steps have the same numbers" if same else "but THE STEPS HAVE OTHER NUMBERS"


def _resumed(config: TrainConfig, result: Rehearsal) -> str:
    saved = max(checkpoint.saved(config.output_dir / "checkpoints"), default=0)
    try:
        train(config, resume="auto")
    except FAILURES as error:
        return f"it cannot go on: {error}"
    return f"--resume auto goes on after step {saved}, {_compared(config, result)}"


def killed_run(config: TrainConfig, result: Rehearsal) -> str:
    """Kills a whole run as soon as its first step has its line."""
    file = config.output_dir.with_suffix(".yaml")
    file.write_text(dump_yaml(config), encoding="utf-8")
    command, end = [sys.executable, "-m", "grpo", "train", str(file)], time.monotonic() + LATEST_S
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and time.monotonic() < end and not steps_of(config.output_dir):
            time.sleep(0.02)
        process.kill()
    return f"killed after {len(steps_of(config.output_dir))} steps; {_resumed(config, result)}"


def full_disk(config: TrainConfig, result: Rehearsal) -> str:
    """Lets the disk refuse the checkpoint of the second step."""
    save_file = tensor_files.save_file

    def full(tensors: Mapping[str, Tensor], values: Iterable[Tensor], path: Path) -> None:
        if "step_000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, values, path)

    return _disturbed(config, result, tensor_files, "save_file", full)


def _disturbed(config: TrainConfig, result: Rehearsal, owner: object, name: str, function: Callable[..., Any]) -> str:
    """Trains with another function in this place; where the run ends, it is resumed without."""
    try:
        with patch.object(owner, name, function):
            train(config)
    except FAILURES as error:
        words = str(error).replace(f"{config.output_dir}/", "").partition("; needs")[0]
        return f"the run ends: {words}; {_resumed(config, result)}"
    return f"the run goes on, {_compared(config, result)}"


def _to_workers(act: Callable[[psutil.Process], None], limits: Mapping[str, float]) -> Callable[..., str]:
    """A fault that does this to all processes that score, act or sample, when the first completions are there."""

    def fault(config: TrainConfig, result: Rehearsal) -> str:
        score, met = Task.score, list[int]()

        def disturbing(task: Task, groups: Sequence[RolloutGroup]) -> list[GroupScore]:
            for process in psutil.Process().children(recursive=True) if not met else ():
                with contextlib.suppress(psutil.Error):
                    if any(mark in " ".join(process.cmdline()) for mark in WORKERS):
                        act(process)
                        met.append(process.pid)
            return score(task, groups)

        words = _disturbed(with_options(config, limits), result, Task, "score", disturbing)
        return f"{len(met)} processes; {words}"

    return fault


FAULTS: dict[str, Callable[[TrainConfig, Rehearsal], str]] = {
    "a run that is killed": killed_run,
    "a full disk": full_disk,
    "workers that die": _to_workers(psutil.Process.kill, {}),
    "workers and tools that hang": _to_workers(
        psutil.Process.suspend, {"reward.timeout_s": HANGS_S, "program_timeout_s": HANGS_S}
    ),
}
