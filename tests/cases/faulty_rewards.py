"""Reward functions that misbehave on the completion that says so; loaded by path, as a user's file."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time

_lock = threading.Lock()


def faulty(prompts, completions, log_extra, **_):
    """1.0 for each completion, unless it names a fault."""
    print("a user's print must not disturb the protocol")
    os.write(1, b'{"rewards": [9.0]}\n')
    rewards = []
    for completion in completions:
        reward = 1.0
        match completion:
            case "raise":
                raise ValueError("boom")
            case "exit":
                sys.exit(2)
            case "loop":
                while True:
                    pass
            case "c_hang":
                re.match(r"(a+)+$", "a" * 60 + "b")
            case "sleep":
                time.sleep(1000)
            case "child_and_sleep":
                child = subprocess.Popen(["sleep", "1000"])
                with open(prompts[0], "a") as file:  # the prompt is where to tell the child's id
                    file.write(f"{child.pid}\n")
                time.sleep(1000)
            case "nan":
                reward = float("nan")
            case "inf":
                reward = float("inf")
            case "none":
                reward = None
            case "text":
                reward = "1.0"
            case "die":
                os._exit(3)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "short":
                continue
        rewards.append(reward)
    log_extra("pid", [os.getpid()] * len(completions))
    return rewards


def _closure_over_a_lock():
    def unpicklable(completions, **_):
        with _lock:
            return [float(len(completion)) for completion in completions]

    return unpicklable


unpicklable = _closure_over_a_lock()


async def asynchronous(completions, **_):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


def first_only(completions, **_):
    """Right for one completion, and of the wrong length for more."""
    return [float(len(completions[0]))]


def slow_batch(completions, **_):
    time.sleep(0.3 * len(completions))
    return [1.0] * len(completions)


def chat(prompts, completions, **_):
    """As TRL passes chat messages."""
    assert prompts[0][0]["role"] == "user"
    return [float(completion[0]["content"] == "yes") for completion in completions]


def messages(completions, **_):
    """How many messages each has."""
    if any(completion[0]["content"] == "raise" for completion in completions):
        raise ValueError("boom")
    return [float(len(completion)) for completion in completions]


def everything(completions, completion_ids, answer, trainer_state, log_extra, log_metric, scale=1.0, **kwargs):
    log_extra("ids", completion_ids)
    log_metric("step", trainer_state.global_step)
    return [scale * (len(ids) + bonus) for ids, bonus in zip(completion_ids, kwargs["bonus"], strict=True)]


def also_logs_ids(completions, log_extra, **_):
    log_extra("ids", completions)
    return [None] * len(completions)


def logs_too_few(completions, log_extra, **_):
    log_extra("x", [1])
    return [0.0] * len(completions)


def numbers(completions, **_):
    import numpy

    return numpy.array([1, 2.5])[: len(completions)]


def loaded_modules(completions, log_extra, **_):
    log_extra("heavy", [sorted({"torch", "ray", "transformers"} & set(sys.modules))] * len(completions))
    return [hash("the order of sets is the same in every worker") % 1000 / 1000] * len(completions)


def optional(completions, completion_ids=None, trainer_state=None, answer="none", **_):
    return [float(completion_ids is None and trainer_state is None and answer == "none")] * len(completions)


def scalar(completions, **_):
    return 1.0


def abstains(completions, **_):
    return [None if completion == "none" else 1.0 for completion in completions]
