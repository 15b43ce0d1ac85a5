"""A task of the demo's size, learned until the mean reward is reached: ours, TRL, and TRL with our rollouts.

    python -m benchmarks.peers.learns warm SETTINGS.json POLICY        # the policy that all of them begin with
    python -m benchmarks.peers.learns trl SETTINGS.json OUT.json POLICY

The policy is the demo's (MoE, MLA, a draft head), after a short SFT stage that is not counted. All contenders get the
same problems in batches of equal size, the same loss, learning rate and schedule. Seconds are those of the steps;
loading is left out. The prompts come in each contender's own order, as their defaults have it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.peers.sizes import Task

PROBLEMS = 2000


def config_of(task: Task, output: Path, **more: Any) -> dict[str, Any]:
    """What examples/01_demo.yaml has, in these sizes."""
    return {
        "output_dir": str(output),
        "seed": task.seed,
        "threads": task.threads,
        "data": {"name": "word_problems", "task_options": {"levels": [task.level]}, "limit": PROBLEMS},
        "log": {"trackers": []},
        "eval": {"limit": 0},
        **more,
    }


def warm(task: Task, policy: Path) -> None:
    from grpo.config.run import SftConfig
    from grpo.sft import sft

    learner = {"learning_rate": 2e-3, "warmup_steps": 20, "schedule": "constant"}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "warm"
        sft(SftConfig.model_validate(config_of(task, run, steps=task.warm_start, learner=learner)))
        shutil.copytree(run / "policy", policy, dirs_exist_ok=True)


@contextmanager
def stopped_when_reached(run: Path, task: Task) -> Iterator[None]:
    """Ctrl-C for the run in this folder, once the reward that is asked for has been reached."""
    from grpo.run.stop import Stopped
    from review.readers.run_folder import read_metrics

    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if (run / "metrics.jsonl").exists():
                rewards = [line["reward/mean"] for line in read_metrics(run) if "reward/mean" in line]
                if reached(rewards, task) is not None:
                    return os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        with suppress(Stopped):
            yield
    finally:
        over.set()


def run_ours(task: Task, policy: Path) -> dict[str, list[float]]:
    from grpo.config.run import TrainConfig
    from grpo.train import train
    from review.readers.run_folder import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        given = config_of(
            task,
            run,
            model=str(policy),
            steps=task.steps,
            prompts_per_step=task.prompts,
            rollout={"group_size": task.group_size, "max_completion_tokens": task.tokens},
            rewards=[{"function": "gsm8k"}],
            learner={"learning_rate": task.learning_rate},
            loss={"loss_type": "dapo", "scale_rewards": "none"},
            checkpoint={"every": task.steps},
        )
        with stopped_when_reached(run, task):
            train(TrainConfig.model_validate(given))
        rows = [line for line in read_metrics(run) if "reward/mean" in line]
    return {"reward": [row["reward/mean"] for row in rows], "seconds": [row["time/step"] for row in rows]}


def run_trl(task: Task, policy_folder: Path, our_rollouts: bool) -> dict[str, list[float]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo.trl_bridge import rollout_func
    from policies.policy import Policy
    from rewards import load_reward
    from rewards.data.word_problems import word_problems

    found: dict[str, list[float]] = {"reward": [], "seconds": []}

    class Watch(TrainerCallback):
        def on_step_begin(self, *given: Any, **named: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: Any, **named: Any) -> None:
            found["seconds"].append(time.perf_counter() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **named: Any) -> None:
            if "reward" in logs:
                found["reward"].append(logs["reward"])
                control.should_training_stop |= reached(found["reward"], task) is not None

    policy = Policy.load(policy_folder)
    problems = word_problems("train", [task.level], count=PROBLEMS, seed=task.seed)
    rows = [{"prompt": f"{row['question']}\n", "answer": row["answer"]} for row in problems]
    rollout = rollout_func(policy) if our_rollouts else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=policy.trunk,
            processing_class=policy.tokenizer,
            reward_funcs=[load_reward("gsm8k")],
            args=GRPOConfig(folder, **given_to_trl(task)),
            train_dataset=Dataset.from_list(rows),
            callbacks=[Watch()],
            rollout_func=rollout,
        )
        trainer.train()
    if rollout is not None:
        rollout.close()
    return found


def given_to_trl(task: Task) -> dict[str, Any]:
    from grpo.config.learner import LearnerOptions

    return {
        "per_device_train_batch_size": task.prompts * task.group_size,
        "num_generations": task.group_size,
        "max_completion_length": task.tokens,
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta2": LearnerOptions().betas[1],
        "loss_type": "dapo",
        "scale_rewards": "none",
        "seed": task.seed,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def reached(rewards: Sequence[float], task: Task) -> int | None:
    """The first step at whose end the mean of the last `window` rewards is the target; None if there is none yet."""
    for step in range(task.window, len(rewards) + 1):
        if fmean(rewards[step - task.window : step]) >= task.target:
            return step
    return None


def result(found: dict[str, list[float]], task: Task) -> dict[str, Any]:
    step = reached(found["reward"], task)
    counted = found["seconds"][: step or len(found["seconds"])]
    return {
        "steps": step,
        "seconds": sum(counted),
        "seconds_a_step": fmean(counted),
        "first_reward": fmean(found["reward"][: task.window]),
        "best_reward": max(
            fmean(found["reward"][i : i + task.window]) for i in range(len(found["reward"]) - task.window + 1)
        ),
        "rewards": found["reward"],
    }


def main() -> None:
    import torch

    name, task = sys.argv[1], Task(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(task.threads)
    if name == "warm":
        warm(task, Path(sys.argv[3]))
        return
    policy = Path(sys.argv[4])
    found = run_ours(task, policy) if name == "ours" else run_trl(task, policy, name == "trl_ours")
    settings = {} if name == "ours" else {"settings": given_to_trl(task)}
    Path(sys.argv[3]).write_text(json.dumps(result(found, task) | settings))


if __name__ == "__main__":
    main()
