"""What every contender is given alike: how large the step is, and how large the task that is learned to a reward.

The settings of a peer that are no sizes are its own documentation's, and are written out in `CONFIGURED`, which the
JSON and the page show.
"""

from __future__ import annotations

from dataclasses import dataclass

STEP_CONTENDERS = ("ours", "ours_vllm", "trl", "trl_no_checkpointing", "trl_ours")
TASK_CONTENDERS = ("ours", "trl", "trl_ours")
NAMES = {
    "ours": "quartet",
    "ours_vllm": "quartet, vLLM samples",
    "trl": "TRL",
    "trl_no_checkpointing": "TRL, no gradient checkpointing",
    "trl_ours": "TRL, quartet samples",
}
CONFIGURED = {
    "ours": "`quartet train`'s defaults",
    "ours_vllm": "`rollout.backend: vllm`, as docs/guides/vllm.md starts it: eager, prefix caching on",
    "trl": "`GRPOConfig`'s defaults: `generate` samples, `gradient_checkpointing=True`, one group a batch",
    "trl_no_checkpointing": "the same with `gradient_checkpointing=False`, if memory allows it",
    "trl_ours": "`GRPOConfig`'s defaults with `rollout_func=rollout_func(policy)`, as docs/guides/algorithms.md has it",
}


@dataclass(frozen=True)
class Step:
    """The step of GSM8K: prompts x group_size completions of exactly `tokens` tokens, `steps` after one to warm up."""

    model: str = "models/smollm2-135m-instruct"
    vllm: str = ".vllm/bin/python"
    prompts: int = 2
    group_size: int = 8
    tokens: int = 32
    steps: int = 2
    dtype: str = "float32"
    threads: int = 2
    learning_rate: float = 1e-6  # both sides' default
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """Word problems of the demo, from a policy that an SFT stage has made, until the mean reward is `target`.

    The reward of a step is the mean over the last `window` steps.
    """

    warm_start: int = 150
    level: int = 1
    prompts: int = 16
    group_size: int = 8
    tokens: int = 64
    learning_rate: float = 4e-4
    window: int = 8
    target: float = 0.72  # the SFT stage leaves about .62
    steps: int = 50
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Form:
    """Sizes of one run of `make peers`; `repeats` is how often each contender is run, in turn with the others."""

    step: Step
    task: Task
    repeats: int
    limit_s: float  # of one contender
    mistake_s: float  # of one mistake


FULL = Form(Step(), Task(), repeats=3, limit_s=900, mistake_s=60)
SMALL = Form(
    Step(prompts=1, group_size=4, tokens=12, steps=1, threads=1),
    Task(warm_start=60, prompts=8, group_size=4, tokens=32, steps=4, window=2, target=0.9),
    repeats=1,
    limit_s=300,
    mistake_s=40,
)
