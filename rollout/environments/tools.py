"""Tools from files: they run in the worker processes that rewards run in, with limits of time and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.isolation.child import LoadedTool, describe_tool
from rewards.isolation.pool import WorkerPool
from rollout.environments.format import Call


@dataclass(frozen=True)
class ToolFailure:
    """Why a call gave no result. `kind` is `raised`, `timeout` or `died` (its process ended, or was out of memory)."""

    tool: str
    kind: str
    message: str


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: the text for the model, which says so if the call failed, and the failure, if any."""

    text: str
    failure: ToolFailure | None = None


class ToolBox:
    """The tools of `path/to/file.py:function`. Calls run in worker processes, and a late one is killed.

    `functions` are the tools by name, whose docstrings `TurnFormat` reads. Each file runs once in this process too, for
    that. `timeout_s` limits a call, and `memory` the bytes of data of a worker (0 for no limit). An answer depends on
    the arguments alone: any worker may get any call, so a tool keeps no state. Raises RewardError for a file or a
    function that is not there.

    >>> with ToolBox(["tools.py:area"]) as tools:               # def area(width: float, height: float) -> float: ...
    ...     tools.call([Call("area", {"width": 3, "height": 4})])
    [ToolResult(text='12', failure=None)]
    """

    def __init__(self, tools: Sequence[str], *, workers: int = 1, timeout_s: float = 10.0, memory: int = 0) -> None:
        descriptions = [describe_tool(tool) for tool in tools]
        loaded = [LoadedTool(**description) for description in descriptions]
        self.functions = {tool.function.__name__: tool.function for tool in loaded}
        if len(self.functions) < len(tools):
            raise ValueError(f"tools={list(tools)}: two of them have one name; rename one")
        self._index = {name: index for index, name in enumerate(self.functions)}
        self._pool = WorkerPool(descriptions, size=workers, timeout_s=timeout_s, memory=memory)

    def call(self, calls: Sequence[Call]) -> list[ToolResult]:
        """One result for each call, in order; they run side by side on the workers. No tool makes it raise."""
        requests = [{"function": self._index[call.name], "arguments": call.arguments} for call in calls]
        replies = self._pool.run(requests)
        return [_result(call.name, reply or {}) for call, reply in zip(calls, replies, strict=True)]

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> ToolBox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _result(name: str, reply: dict) -> ToolResult:
    if "text" in reply:
        return ToolResult(reply["text"])
    told = {"timeout": "the tool took too long", "died": "the tool ended its process"}
    text = f"error: {reply.get('told') or told[reply['kind']]}"
    return ToolResult(text, ToolFailure(name, reply["kind"], reply["message"]))
