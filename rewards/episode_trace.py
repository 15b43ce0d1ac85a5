"""An episode as the trace that a task of the package verifiers (0.4) reads, and the tasks that need more than that."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verifiers.v1 import Task, Trace


def refuse(kind: type[Task], more: Mapping[str, Any]) -> None:
    """Raises ValueError for a class of `v1.Task` that needs what only verifiers has, by these or by `more`."""
    from verifiers import v1

    overridden = [name for name in ("setup", "finalize") if getattr(kind, name) is not getattr(v1.Task, name)]
    asks = []
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        runtime = inspect.signature(function).parameters.get("runtime")
        if hasattr(function, "reward") and runtime is not None and runtime.default is runtime.empty:
            asks.append(name)  # `Task.score` leaves these out without a runtime
    for what, there in {
        "a container": kind.NEEDS_CONTAINER,
        f"the method {' and '.join(overridden)}": overridden,
        f"a runtime for {', '.join(asks)}": asks,
        **more,
    }.items():
        if there:
            raise ValueError(
                f"task {kind.__name__} needs {what}, which only verifiers itself has; write a class instead"
            )


def trace_of(task: Task, turns: Sequence[dict[str, Any]]) -> Trace:
    """The messages of an episode as the trace that the task's rewards read."""
    from verifiers import v1

    prompt = task.data.prompt or ""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [m.model_dump() for m in prompt]
    nodes = [
        v1.MessageNode(parent=i - 1 if i else None, message=message, sampled=message["role"] == "assistant")
        for i, message in enumerate([*asked, *_in_its_form(turns)])
    ]
    about = v1.TraceTask(type=type(task).__name__, data=task.data)
    trace = v1.Trace(task=about, agent=v1.AgentInfo(config=v1.AgentConfig()), nodes=nodes)
    trace.ok = trace.is_completed = True
    return trace


def _in_its_form(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with what verifiers asks of them: calls have ids, and arguments that are text. A result without the
    id of a call is that of the first call that has none."""
    messages: list[dict[str, Any]] = []
    calls: list[str] = []
    for turn in turns:
        message = dict(turn)
        if asked := turn.get("tool_calls"):
            calls = [call.get("id") or f"call_{len(messages)}_{i}" for i, call in enumerate(asked)]
            made = [call["function"] for call in asked]
            message["tool_calls"] = [
                {"id": key, "name": call["name"], "arguments": _text_of(call["arguments"])}
                for key, call in zip(calls, made, strict=True)
            ]
        if turn["role"] == "tool":
            named = turn.get("tool_call_id")
            call_id = named if named in calls else calls[0] if calls else "none"
            calls = [other for other in calls if other != call_id]
            message["tool_call_id"] = call_id
        messages.append(message)
    return messages


def _text_of(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)
