"""Rubrics of verifiers 0.1 and tasks of verifiers 0.4 as rewards, and a reward of ours as one of theirs.

A `Rubric` makes 0.0 of an exception in one of its functions (verifiers/rubrics/rubric.py, 0.1.14), so its functions are
watched here. `Task.score` of 0.4 raises one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from rewards.forms.ours import Isolated
from rewards.protocol import PROVIDED, Messages, Reward, RewardError, text_of

Scored = tuple[float, Mapping[str, Any]]  # the reward, and what is logged

_FAILURES: ContextVar[list[Exception]] = ContextVar("failures")  # of the functions of a rubric, for one completion


def reward_of(theirs: Any) -> Reward:
    """The reward of a Rubric, of an Environment or the `load_environment` that makes one, or of a class of `v1.Task`.

    Their functions get the prompt and the completion as messages. Other columns of a row are what they ask for by name,
    or the fields of the task's data. Each function's value is logged. Raises RewardError for what cannot be scored
    completion by completion, or needs what only verifiers itself has.
    """
    if inspect.isfunction(theirs):
        theirs = theirs()
    rubric = getattr(theirs, "rubric", theirs)
    if hasattr(rubric, "score_rollout"):
        score = _of_rubric(rubric)
    elif isinstance(theirs, type) and hasattr(theirs, "data_type"):
        score = _of_task(theirs)
    else:
        raise RewardError(f"{theirs!r} is neither a Rubric, an Environment nor a v1.Task of verifiers")
    loop = asyncio.new_event_loop()  # one for all batches, since a judge's client belongs to a loop

    def verifiers(prompts: list, completions: list, log_extra: Any = None, **columns: list) -> list[Any]:
        rows = [
            {name: values[i] for name, values in columns.items() if name not in PROVIDED}
            for i in range(len(completions))
        ]
        asked = [_messages(prompt, "user") for prompt in prompts]
        answered = [_messages(completion, "assistant") for completion in completions]
        outcomes = loop.run_until_complete(_all(map(score, asked, answered, rows)))
        logged = [{} if isinstance(outcome, BaseException) else outcome[1] for outcome in outcomes]
        if log_extra:
            for name in dict.fromkeys(name for values in logged for name in values):
                log_extra(name, [values.get(name) for values in logged])
        return [outcome if isinstance(outcome, BaseException) else outcome[0] for outcome in outcomes]

    return verifiers


async def _all(scores: Any) -> list[Any]:
    return await asyncio.gather(*scores, return_exceptions=True)


def _messages(said: Any, role: str) -> Messages:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _of_rubric(rubric: Any) -> Callable[..., Awaitable[Scored]]:
    if getattr(rubric, "has_group_rewards", False):
        raise RewardError("a rubric with functions of whole groups cannot be a reward: batches are cut anywhere here")
    _watch(rubric)

    async def score(prompt: Messages, completion: Messages, row: dict[str, Any]) -> Scored:
        from verifiers.types import State

        _FAILURES.set([])
        about = {"answer": "", "info": {}, "example_id": 0, **row, "prompt": prompt}
        state = State(input=about, task=row.get("task"), completion=completion, trajectory=[], metrics={}, reward=None)
        await rubric.score_rollout(state)
        if failures := _FAILURES.get():
            raise failures[0]
        return state["reward"], state["metrics"]

    return score


def _watch(rubric: Any) -> None:
    for part in getattr(rubric, "rubrics", ()):
        _watch(part)
    rubric.funcs = [_watched(function) for function in rubric.funcs]


def _watched(function: Callable[..., Any]) -> Callable[..., Awaitable[float]]:
    @functools.wraps(function)
    async def watched(*values: Any, **named: Any) -> float:
        try:
            result = function(*values, **named)
            return float(await result if inspect.isawaitable(result) else result)
        except Exception as error:
            _FAILURES.get().append(error)
            raise

    return watched


def _of_task(kind: Any) -> Callable[..., Awaitable[Scored]]:
    from verifiers import v1

    states = [toolset for toolset in kind.toolsets(kind.config_type()()) if type(toolset.state) is not v1.State]
    refuse(kind, {"the state of its tools": states})

    async def score(prompt: Messages, completion: Messages, row: dict[str, Any]) -> Scored:
        fields = {"prompt": text_of(prompt[-1:])} | row
        task = kind(kind.data_type()(**{k: v for k, v in fields.items() if k in kind.data_type().model_fields}))
        trace = trace_of(task, completion)
        await task.score(trace)
        return float(trace.reward), {name: reward.score for name, reward in trace.rewards.items()}

    return score


def refuse(kind: Any, more: Mapping[str, Any]) -> None:
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


def trace_of(task: Any, turns: Sequence[dict[str, Any]]) -> Any:
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


def as_verifiers(function: str, weight: float = 1.0, **options: Any) -> Any:
    """A reward of ours for verifiers: in 0.1 a `Rubric`, in 0.4 a method for a class of `v1.Task`.

    Its columns are those of the row (0.1) or the fields of the task's data (0.4). Where it fails the error goes on, in
    place of a 0. For the options see `rewards.forms.ours`.

    >>> rubric = as_verifiers("gsm8k")  # doctest: +SKIP
    """
    import verifiers

    reward = Isolated(function, **options)
    if not hasattr(verifiers, "Rubric"):
        from verifiers import v1

        async def score(self: Any, task: Any, trace: Any) -> float:
            return await asyncio.to_thread(reward.mark, task.prompt_text, trace.last_reply, task.model_dump())

        score.__name__ = reward.label
        return v1.reward(score, weight=weight)

    async def of_state(state: Mapping[str, Any]) -> float:
        columns = {**state["input"], "answer": state["answer"]}
        return await asyncio.to_thread(reward.mark, state["prompt"], text_of(state["completion"]), columns)

    class Ours(verifiers.Rubric):
        async def _call_individual_reward_func(self, func: Any, state: Any) -> float:
            return await func(state)  # theirs makes 0.0 of an exception

    of_state.__name__ = reward.label
    return Ours(funcs=[of_state], weights=[weight])
