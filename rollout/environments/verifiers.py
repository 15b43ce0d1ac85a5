"""Tasks of the package `verifiers` (0.4) in TRL's contract: the tools of their toolsets are methods.

The package itself lets a program of its own talk to an OpenAI endpoint, and starts a server for the tools. Here the
tools are called in the worker process, and the messages of our episode become the trace that the task's rewards read.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from rewards.episode_trace import refuse, trace_of


class Verifiers:
    """One episode of a task. `verifiers` makes the classes."""

    _kind: Any  # the class of the task

    async def reset(self, **columns: object) -> None:
        """Begin the task whose data are the columns with the names of its fields."""
        fields = self._kind.data_type().model_fields
        data = self._kind.data_type()(**{name: value for name, value in columns.items() if name in fields})
        self._task = self._kind(data)
        self._toolsets = self._kind.toolsets(self._task.config)
        for toolset in self._toolsets:
            await toolset.setup()
            await toolset.setup_task(data)

    async def get_reward(self, turns: Sequence[dict[str, Any]]) -> float:
        """The weighted sum of the task's rewards, which read the messages of the episode as a trace."""
        from verifiers import v1

        trace = trace_of(self._task, turns)
        if states := [toolset.state for toolset in self._toolsets if type(toolset.state) is not v1.State]:
            trace.state = states[0]
        await self._task.score(trace)
        return float(trace.reward)

    async def _call(self, place: int, tool: str, arguments: dict[str, Any]) -> object:
        result = getattr(self._toolsets[place], tool)(**arguments)
        return await result if inspect.isawaitable(result) else result


def verifiers(task: Any) -> type[Verifiers]:
    """The class of a `verifiers.v1.Task`, for `environment: my_environment.py:Search`. `task` may be a taskset's id.

    The data need a column for each field of the task's data. Raises ImportError without the package, and ValueError
    for a task that needs more than its toolsets: a container, a `setup` or `finalize`, a runtime, several states.

    >>> Search = verifiers("my_taskset")
    """
    try:
        from verifiers import v1
    except ImportError as error:
        raise ImportError("a task of verifiers needs the package: pip install 'quartet-rl[verifiers]'") from error
    kind = v1.task_type(task) if isinstance(task, str) else task
    toolsets = kind.toolsets(kind.config_type()())
    several = sum(type(toolset.state) is not v1.State for toolset in toolsets) > 1
    refuse(kind, {"a state for each of several toolsets": several})
    methods = {}
    for place, toolset in enumerate(toolsets):
        for name, tool in inspect.getmembers(type(toolset), inspect.isfunction):
            if getattr(tool, "tool", False):
                method = "_".join(filter(None, [toolset.server_name, getattr(tool, "tool_name", None) or name]))
                methods[method] = _method(method, place, name, tool)
    if not methods:
        raise ValueError(f"task {kind.__name__} has no tools; use its rewards without an environment")
    return type(kind.__name__, (Verifiers,), {"_kind": kind, **methods})


def _method(title: str, place: int, name: str, tool: Callable[..., Any]) -> Callable[..., Any]:
    """A method with the tool's signature, and a docstring that describes each argument, as transformers wants it."""

    async def call(self: Verifiers, **arguments: object) -> object:
        return await self._call(place, name, arguments)

    about, _, described = inspect.cleandoc(tool.__doc__ or title).partition("Args:")
    fields = [field for field in inspect.signature(tool).parameters if field != "self"]
    matches = {field: re.search(rf"^\s*{field}\b[^:\n]*:\s*(.+)", described, re.MULTILINE) for field in fields}
    lines = [f"    {field}: {match.group(1) if match else field}" for field, match in matches.items()]
    call.__name__ = title
    call.__doc__ = "\n".join([about.strip(), *(["", "Args:", *lines] if lines else [])])
    call.__annotations__ = inspect.get_annotations(tool, eval_str=True)
    call.__signature__ = inspect.signature(tool, eval_str=True)  # type: ignore[attr-defined]
    return call
