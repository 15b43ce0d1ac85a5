"""Rubrics of verifiers 0.1 and tasks of verifiers 0.4 as rewards, and a reward of ours as one of theirs.

A `Rubric` makes 0.0 of an exception in one of its functions (verifiers/rubrics/rubric.py, 0.1.14), so its functions are
watched here. `Task.score` of 0.4 raises one.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from rewards.episode_trace import refuse, trace_of
from rewards.forms.ours import Isolated
from rewards.isolation.child import as_messages
from rewards.protocol import PROVIDED, Messages, Reward, RewardError, text_of

if TYPE_CHECKING:
    from verifiers import Rubric
    from verifiers.types import State
    from verifiers.v1 import Task

Scored = tuple[float, Mapping[str, Any]]  # the reward, and what is logged

_FAILURES: ContextVar[list[Exception]] = ContextVar("failures")  # of the functions of a rubric, for one completion


def reward_of(theirs: object) -> Reward:
    """The reward of a Rubric, of an Environment or the `load_environment` that makes one, or of a class of `v1.Task`.

    Their functions get the prompt and the completion as messages. Other columns of a row are what they ask for by name,
    or the fields of the task's data. Each function's value is logged. Raises RewardError for what cannot be scored
    completion by completion, or needs what only verifiers itself has.
    """
    if inspect.isfunction(theirs):
        theirs = theirs()
    rubric = getattr(theirs, "rubric", theirs)
    if hasattr(rubric, "score_rollout"):
        score, fields = _of_rubric(rubric), ["answer", "info"]
    elif isinstance(theirs, type) and hasattr(theirs, "data_type"):
        score, fields = _of_task(theirs), [*theirs.data_type().model_fields]
    else:
        raise RewardError(f"{theirs!r} is neither a Rubric, an Environment nor a v1.Task of verifiers")
    loop = asyncio.new_event_loop()  # one for all batches, since a judge's client belongs to a loop

    def verifiers(
        prompts: list, completions: list, log_extra: Callable[[str, list], None] | None = None, **columns: list
    ) -> list[Any]:
        rows = [
            {name: values[i] for name, values in columns.items() if name not in PROVIDED}
            for i in range(len(completions))
        ]
        asked, answered = as_messages(prompts, "user"), as_messages(completions, "assistant")
        outcomes = loop.run_until_complete(_all(map(score, asked, answered, rows)))
        logged = [{} if isinstance(outcome, BaseException) else outcome[1] for outcome in outcomes]
        if log_extra:
            for name in dict.fromkeys(name for values in logged for name in values):
                log_extra(name, [values.get(name) for values in logged])
        return [outcome if isinstance(outcome, BaseException) else outcome[0] for outcome in outcomes]

    signature = inspect.signature(verifiers)
    *first, columns = signature.parameters.values()
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in fields]
    verifiers.__signature__ = signature.replace(parameters=[*first, *named, columns])  # type: ignore[attr-defined]
    return verifiers


async def _all(scores: Iterable[Awaitable[Scored]]) -> list[Any]:
    return await asyncio.gather(*scores, return_exceptions=True)


def _of_rubric(rubric: Rubric) -> Callable[..., Awaitable[Scored]]:
    if getattr(rubric, "has_group_rewards", False):
        raise RewardError("a rubric with functions of whole groups cannot be a reward: batches are cut anywhere here")
    if hasattr(rubric, "env_map"):  # a row without a route gets 0.0 there
        raise RewardError("an EnvGroup sends each row to one of its environments; name that environment's rubric")
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


def _watch(rubric: Rubric) -> None:
    for part in getattr(rubric, "rubrics", ()):
        _watch(part)
    pairs = zip(rubric.funcs, rubric.weights, strict=True)
    rubric.funcs = [_watched(function) if weight else function for function, weight in pairs]  # others are metrics


def _watched(function: Callable[..., Any]) -> Callable[..., Awaitable[float]]:
    @functools.wraps(function)
    async def watched(*values: object, **named: object) -> float:
        try:
            result = function(*values, **named)
            return float(await result if inspect.isawaitable(result) else result)
        except Exception as error:
            _FAILURES.get().append(error)
            raise

    return watched


def _of_task(kind: type[Task]) -> Callable[..., Awaitable[Scored]]:
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
        async def _call_individual_reward_func(self, func: Callable[..., Awaitable[float]], state: State) -> float:
            return await func(state)  # theirs makes 0.0 of an exception

    of_state.__name__ = reward.label
    return Ours(funcs=[of_state], weights=[weight])
