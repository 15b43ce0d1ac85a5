"""Honest rollouts, in which a test plants a fault."""

from __future__ import annotations

import random
import zlib
from statistics import fmean, stdev

from rewards.audit.traces import Call, Trace

END = 2
TEXT = "first we count what is there then take the part that was asked for and look whether it is right"
WORDS = TEXT.split()


def honest(seed: int = 0, steps: int = 8, groups: int = 4, size: int = 4, scale: str = "group") -> list[Trace]:
    """Rollouts of an arithmetic task: right with two chances in three, of a policy one step old, none cut."""
    draw = random.Random(seed)
    traces: list[Trace] = []
    for step in range(1, steps + 1):
        for number in range(groups):
            a, b = draw.randint(10, 99), draw.randint(10, 99)
            index = (step - 1) * groups + number
            for sample in range(size):
                right = draw.random() < 0.66
                thoughts = " ".join(draw.choices(WORDS, k=draw.randint(12, 24)))
                text = f"{thoughts}: {a} + {b} gives\n#### {a + b + (0 if right else draw.randint(1, 9))}"
                trace = Trace("mine.jsonl", len(traces) + 1, "common", f"How many are {a} apples and {b} pears?", text)
                trace.messages = [{"role": "user", "content": trace.prompt}]
                trace.turns = [{"role": "assistant", "content": text}]
                trace.prompt_ids, trace.token_ids = list(trace.prompt.encode()), [*text.encode(), END]
                trace.logprobs = logprobs(trace.prompt, trace.token_ids)
                trace.calls = [Call(trace.prompt_ids, trace.token_ids, trace.messages, trace.turns)]
                tidy = float(draw.random() < 0.8)
                trace.parts = {"right": float(right), "tidy": tidy}
                trace.weights = {"right": 1.0, "tidy": 0.5}
                trace.reward = float(right) + 0.5 * tidy
                trace.group, trace.sample, trace.step, trace.version = f"g{index}", sample, step, step - 1
                trace.time = 1000.0 + 60 * step + draw.random()
                trace.finish_reason = "stop"
                trace.columns = {"answer": f"#### {a + b}", "index": index}
                traces.append(trace)
    set_advantages(traces, size, scale)
    return traces


def logprobs(prompt: str, ids: list[int]) -> list[float]:
    """A number for each token that follows from what comes before it."""
    values, state = [], zlib.crc32(prompt.encode())
    for token in ids:
        state = zlib.crc32(bytes([token]), state)
        values.append(-(state % 997 + 1) / 997)
    return values


def set_advantages(traces: list[Trace], size: int, scale: str = "group") -> None:
    for start in range(0, len(traces), size):
        group = traces[start : start + size]
        rewards = [trace.reward or 0.0 for trace in group]
        divisor = {"group": stdev(rewards) + 1e-4, "nothing": 1.0, "batch": 0.55}[scale]
        for trace, reward in zip(group, rewards, strict=True):
            trace.advantage = (reward - fmean(rewards)) / divisor
