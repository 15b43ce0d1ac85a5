"""What goes wrong in sampling, in words that hold for every engine."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Literal

from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams

METRICS = {"faults/sampling_seconds": "from the start of what a pool has lost to its being done again, seconds"}
OnFinished = Callable[[int], None]  # gets the number of completions that have ended since it was last called
OnLost = Callable[[str, str, str], None]  # gets what was lost, such as "worker 1", why, and what is done about it
Kind = Literal["worker", "node", "object_store", "vllm"]
MOST_LOST = 3  # losses that a pool mends between two publications
ADVICE = (
    "If memory ran out, lower rollout.workers or rollout.prompts_per_shard; if a shard needs more time, lower "
    "rollout.prompts_per_shard"
)
VLLM_ADVICE = (
    "If memory ran out, give vLLM less by rollout.vllm.engine ({kv_cache_memory_bytes: N} on a CPU, "
    "{gpu_memory_utilization: SHARE} on a GPU)"
)


class RolloutError(RuntimeError):
    """Sampling cannot go on. The message names the prompt or the setting, and the way out.

    `groups` are those that were sampled all the same; completions of them that failed are marked `abort`.
    """

    def __init__(self, message: str, groups: Sequence[RolloutGroup] = ()) -> None:
        super().__init__(message)
        self.groups = list(groups)

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.groups)


class Faults:
    """Counts what a pool has lost, and the seconds that it took until the lost work was done again. What else a pool
    tells adds to `unreported`, by metric.

    `most` losses are mended between two publications; the next one ends the run. Work that is lost at the same time
    counts once: the seconds are those in which any of it was missing.

    >>> faults.lost("worker", "worker 1", "its process 7 was killed", work="shard 3", since=shard_began)
    >>> faults.done("shard 3")   # 2.5 s after the shard had begun for the first time
    >>> faults.metrics()
    {"faults/worker": 1.0, "faults/sampling_seconds": 2.5}
    """

    def __init__(self, on_lost: OnLost = lambda what, reason, action: None, most: int = MOST_LOST) -> None:
        self.on_lost, self.most = on_lost, most
        self.since_sync = 0
        self.unreported: defaultdict[str, float] = defaultdict(float)
        self._missing: set[Hashable] = set()  # lost work
        self._began = 0.0  # when the first of it began
        self._lock = Lock()  # with rollout.staleness a thread samples while another asks for the metrics

    def on_weight_sync(self) -> None:
        """Is told of a publication: losses count anew from here on, and work that was missing is given up."""
        self.since_sync = 0
        self._missing.clear()

    def lost(
        self, kind: Kind, what: str, reason: str, *, work: Hashable, since: float, action: str = "it is replaced"
    ) -> None:
        """Is told of a loss: `work`, which had begun at `since` of time.monotonic(), is to be done again. Raises
        RolloutError where too much was lost."""
        self.since_sync += 1
        given_up = self.since_sync > self.most
        self.on_lost(what, reason, "the run ends" if given_up else action)
        if given_up:
            raise RolloutError(
                f"{self.since_sync} losses since the last weight sync; the last one was {what}: {reason}. "
                f"{VLLM_ADVICE if kind == 'vllm' else ADVICE}; go on with --resume auto"
            )
        with self._lock:
            self.unreported[f"faults/{kind}"] += 1
            self._began = min(self._began, since) if self._missing else since
            self._missing.add(work)

    def done(self, work: Hashable) -> None:
        """Call it for all work that ends, lost before or not."""
        with self._lock:
            if work in self._missing:
                self._missing.remove(work)
                if not self._missing:
                    self.unreported["faults/sampling_seconds"] += time.monotonic() - self._began

    def metrics(self) -> dict[str, float]:
        """What was counted since the last call; faults/* are absent where nothing was lost."""
        with self._lock:
            metrics, self.unreported = dict(self.unreported), defaultdict(float)
        return metrics


def why_died(error: Exception) -> tuple[Kind, str]:
    """Tells what was lost with a Ray actor, and why, in fewer words than Ray's where these only guess."""
    words = " ".join(str(error).split())
    if "its node has died" in words:
        node = re.search(r"Node Id: (\w+)", words)
        return "node", f"its machine left the cluster{f' (node {node[1][:8]})' if node else ''}"
    if "Worker exit type: SYSTEM_ERROR" in words and (process := re.search(r"pid: (\d+)", words)):
        return "worker", f"its process {process[1]} was killed or crashed, perhaps since memory ran out"
    return "worker", f"it died: {words}"


def prompt_fault(prompt: Prompt, params: SamplingParams, vocabulary: int, limit: int) -> str | None:
    """Says why this prompt cannot be continued within `limit` tokens, and the way out."""
    length = len(prompt.token_ids)
    if length == 0:
        return f"prompt {prompt.prompt_id!r} has no tokens; a policy continues at least one"
    if outside := [token for token in prompt.token_ids if not 0 <= token < vocabulary]:
        return (
            f"prompt {prompt.prompt_id!r} holds token {outside[0]}, outside the vocabulary of {vocabulary}; "
            "use the policy's own tokenizer"
        )
    if length + params.max_completion_tokens > limit:
        return (
            f"prompt {prompt.prompt_id!r} has {length} tokens; with rollout.max_completion_tokens="
            f"{params.max_completion_tokens} it passes the context of {limit}: shorten one of them"
        )
    return None


def not_finite(groups: Sequence[RolloutGroup]) -> str | None:
    """Says so where completions are marked `abort`, as those are whose logits are not finite."""
    failed = [g.prompt.prompt_id for g in groups if any(c.finish_reason == "abort" for c in g.completions)]
    if not failed:
        return None
    return (
        f"the policy's logits are not finite for completions of {len(failed)} of {len(groups)} prompts, "
        f"{failed[:4]}: the weights hold NaN or overflow; resume from an earlier checkpoint with a lower "
        "learner.learning_rate"
    )
