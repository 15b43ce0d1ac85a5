"""Full memory, of a GPU or of the host, as an error that says what was going on and which option to lower."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any, Literal, NamedTuple

Phase = Literal["loading", "sampling", "evaluating", "learning", "stepping", "publishing"]
SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA's, the host's, cuBLAS's


class OutOfMemory(RuntimeError):
    """The memory of a device is full. The message names the phase and what to do."""


class Way(NamedTuple):
    """What lowers a peak. `text` says so of the option `key`, where its value is one for which this is `useful`."""

    key: str
    text: str = "lower {key}={value}"
    useful: Callable[[Any], bool] = lambda value: value > 1


NAMES: dict[Phase, str] = {
    "loading": "loading the policy, its optimizer and its sampler",
    "sampling": "sampling",
    "evaluating": "evaluating held-out problems",
    "learning": "computing log-probabilities and the backward pass",
    "stepping": "making the optimizer step",
    "publishing": "publishing weights to the sampler",
}
PRECISION = Way("dtype", "set dtype: bfloat16", lambda dtype: dtype != "bfloat16")
SHARDS = Way("learner.parallel.fsdp", "start more processes, which share the weights ({key})", lambda ranks: True)
WORKERS = Way("rollout.workers", "set {key}: 1, which samples on a device of its own", lambda workers: workers == 0)
ELSEWHERE = "in GRPO train adapters alone (lora.rank)", "in GRPO sample on another device (rollout.workers: 1)"
WAYS: dict[Phase, tuple[Way, ...]] = {
    "loading": (
        *(PRECISION, SHARDS, WORKERS),
        Way("loss.beta", "set {key}: 0, which needs no reference policy", lambda beta: beta > 0),
    ),
    "sampling": (
        *(Way("rollout.prompts_per_shard"), Way("rollout.max_completion_tokens"), Way("rollout.group_size")),
        Way("samples"),  # of quartet sample
    ),
    "evaluating": (
        *(Way("rollout.max_completion_tokens"), Way("eval.samples")),
        Way("rollout.prompts_per_shard"),  # of quartet eval
    ),
    "learning": (
        Way("learner.tokens_per_micro_batch"),
        Way("learner.gradient_checkpointing", "set {key}: true", lambda on: not on),
        Way("mtp.tokens_per_update"),  # of quartet mtp
        SHARDS,
    ),
    "stepping": (
        SHARDS,
        *(Way("learner", text, lambda _: True) for text in ELSEWHERE),
    ),
    "publishing": (PRECISION, SHARDS, WORKERS),
}


@contextmanager
def phase(name: Phase, options: object) -> Iterator[None]:
    """Names what is going on inside it: full memory raises OutOfMemory, which says what was going on and what to lower.
    Of phases inside each other the innermost is named.

    `options` are those of the command, or an object that has some of them. What the failed computation has
    held is freed, so that a checkpoint can still be written.

    >>> with phase("learning", config):
    ...     learner.step(batch, step)
    OutOfMemory: out of memory while computing log-probabilities and the backward pass: lower
    learner.tokens_per_micro_batch=8192, set learner.gradient_checkpointing: true, or start more processes, which share
    the weights (learner.parallel.fsdp). CUDA out of memory. Tried to allocate 2.00 GiB. ...
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_full(error):
            raise
        words = _beginning(str(getattr(error, "cause", error)))  # of a Ray worker without its traceback
        traceback.clear_frames(error.__traceback__)
        raise OutOfMemory(f"out of memory while {NAMES[name]}: {_ways_out(name, options)}. {words}") from None


def is_full(error: BaseException) -> bool:
    """Tells whether this error says that there is no memory left, on a device, on the host or in a Ray worker."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")  # a torch that is not loaded, or cannot be, has raised nothing
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def _ways_out(name: Phase, options: object) -> str:
    ways = []
    for way in WAYS[name]:
        with suppress(AttributeError):  # an option that this command does not have
            value = attrgetter(way.key)(options)
            if way.useful(value):
                ways.append(way.text.format(key=way.key, value=value))
    *first, last = ways or ["use a device with more memory"]
    return ", ".join([*first, f"or {last}"]) if first else last


def _beginning(message: str) -> str:
    """The first sentences of torch's message, which say how much was wanted and how much there was."""
    return ". ".join(message.split("\n")[0].split(". ")[:3]).rstrip(".")
