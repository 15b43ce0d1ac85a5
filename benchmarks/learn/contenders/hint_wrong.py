"""The contrast of hint_beside: the hint is another problem's solution."""

from typing import Any

from benchmarks.learn.contenders.hint import Hint
from grpo.steps.listener import Listener

OPTIONS: dict[str, object] = {}


def listeners(session: Any) -> list[Listener]:
    return [Hint(session, rewards=1.0, wrong=True)]
