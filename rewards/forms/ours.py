"""A reward of ours that another tool calls, completion by completion."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from typing import Any

from rewards.isolation.child import plain
from rewards.protocol import RewardError
from rewards.scorer import Scorer
from rewards.spec import RewardSpec


class Isolated:
    """Scores one completion at a time in a process of its own, under a time limit of `timeout_s`.

    `function` is what a configuration would name, and the options are those of `RewardSpec`. It can be pickled and may
    be used by several threads. The process is started by the first call, one for each process that calls.
    """

    def __init__(self, function: str, timeout_s: float = 10.0, **options: Any) -> None:
        self._spec, self._timeout_s = RewardSpec(function, **options), timeout_s
        self._scorers: dict[int, Scorer] = {}
        self.label = self._spec.label

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_scorers": {}}

    def mark(self, prompt: Any, completion: Any, columns: Mapping[str, Any]) -> float:
        """The reward of a completion, a text or chat messages, for a row of the data.

        Raises RewardError where the function fails, is late or abstains: other tools have no word for an abstention.
        """
        process = os.getpid()
        if process not in self._scorers:  # a fork must not write into the sockets of its parent
            self._scorers[process] = scorer = Scorer([self._spec], timeout_s=self._timeout_s)
            weakref.finalize(self, _close, scorer, process)
        row = json.loads(json.dumps(dict(columns), default=plain))
        [group] = self._scorers[process].score([prompt], [[completion]], [row], prompt_ids=["of the call"])
        [mark] = group.rewards
        if mark is None:
            raise RewardError(
                f"reward {self.label!r} abstained on {str(completion)[:80]!r}; here it must give a number"
            )
        return mark


def _close(scorer: Scorer, process: int) -> None:
    """Ends the process of a reward that nobody holds any more. A fork leaves its parent's alone."""
    if os.getpid() == process:
        scorer.close()
