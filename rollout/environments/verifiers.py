"""Tasks of the package `verifiers` (0.4) in TRL's contract: the tools of their toolsets are methods.

The package itself lets a program of its own talk to an OpenAI endpoint, and starts a server for the tools. Here the
tools are called in the worker process, and the messages of our episode become the trace that the task's rewards read.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any


class Verifiers:
    """One episode of a task. `verifiers` makes the classes."""

    _kind: Any  # the class of the task

    async def reset(self, **columns: Any) -> None:
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

        prompt = self._task.data.prompt or ""
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m.model_dump() for m in prompt]
        nodes = [
            v1.MessageNode(parent=i - 1 if i else None, message=message, sampled=message["role"] == "assistant")
            for i, message in enumerate([*asked, *_in_its_form(turns)])
        ]
        about = v1.TraceTask(type=self._kind.__name__, data=self._task.data)
        trace = v1.Trace(task=about, agent=v1.AgentInfo(config=v1.AgentConfig()), nodes=nodes)
        if states := [toolset.state for toolset in self._toolsets if type(toolset.state) is not v1.State]:
            trace.state = states[0]
        trace.ok = trace.is_completed = True
        await self._task.score(trace)
        return float(trace.reward)

    async def _call(self, place: int, tool: str, arguments: dict[str, Any]) -> Any:
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
    overridden = [name for name in ("setup", "finalize") if getattr(kind, name) is not getattr(v1.Task, name)]
    asks = []
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        runtime = inspect.signature(function).parameters.get("runtime")
        if hasattr(function, "reward") and runtime is not None and runtime.default is runtime.empty:
            asks.append(name)
    for what, there in {
        "a container": kind.NEEDS_CONTAINER,
        f"the method {' and '.join(overridden)}": overridden,
        f"a runtime for {', '.join(asks)}": asks,
        "a state for each of several toolsets": sum(type(toolset.state) is not v1.State for toolset in toolsets) > 1,
    }.items():
        if there:
            raise ValueError(
                f"task {kind.__name__} needs {what}, which only verifiers itself has; write a class instead"
            )
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

    async def call(self: Verifiers, **arguments: Any) -> Any:
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


def _in_its_form(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with what verifiers asks of them: calls have ids, and arguments that are text."""
    messages: list[dict[str, Any]] = []
    calls: list[str] = []
    for turn in turns:
        message = dict(turn)
        if "tool_calls" in turn:
            made = [call["function"] for call in turn["tool_calls"]]
            calls = [f"call_{len(messages)}_{i}" for i in range(len(made))]
            message["tool_calls"] = [
                {"id": key, "name": call["name"], "arguments": json.dumps(call["arguments"])}
                for key, call in zip(calls, made, strict=True)
            ]
        if turn["role"] == "tool":
            message["tool_call_id"] = calls.pop(0) if calls else "none"
        messages.append(message)
    return messages
