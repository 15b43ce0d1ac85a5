"""What a reward is: `reward(prompts, completions, **columns) -> list[float | None]`, sync or async.

The signature and the shapes are TRL's, so a function written for TRL's `GRPOTrainer` works here and ours work
there. Arguments are passed by keyword, one list entry per completion, and only those that the function names:

- `prompts`, `completions`: strings, or chat messages (`[{"role": "assistant", "content": "..."}]`)
- `completion_ids` (sampled token ids), `trainer_state` (`.global_step`, ...)
- `log_extra(column, values)` (one value per completion), `log_metric(name, value)` (one number per batch)
- any column of the data set, by its name. `**kwargs` receives the remaining columns; `**_` declines them.

None means that the function abstains. An exception in the list, in place of a number, is the failure of that completion
alone; one that is raised is the failure of the batch, which is then scored again completion by completion. A
completion's reward must depend only on its own row, since batches are cut in any way.

>>> def short(completions, **_):
...     return [1.0 if len(completion) < 20 else 0.0 for completion in completions]
>>> short(completions=["#### 42", "a rather long completion"])
[1.0, 0.0]
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Reward = Callable[..., Any]
Messages = list[dict[str, Any]]
Completions = list[Any]  # strings or lists of chat messages
RightAt = float | None | Literal["undeclared"]  # see `right_at`
AnyReward = TypeVar("AnyReward", bound=Reward)
T = TypeVar("T")

PROVIDED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class RewardError(RuntimeError):
    """A reward that cannot be used or has failed. The message names the reward, its input, and the way out."""


@dataclass(frozen=True)
class Signature:
    """The parameters of a reward function that decide what is passed to it, and its `right_at`.

    >>> def grade(prompts, completions, answer, strict=True, **_): ...
    >>> Signature.of(grade)
    Signature(required=('prompts', 'completions', 'answer'), optional=('strict',), takes_rest=False)
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    takes_rest: bool
    right_at: RightAt = field(default="undeclared", repr=False)

    @classmethod
    def of(cls, function: Reward) -> Signature:
        """Raises TypeError or ValueError for a function that cannot be called by keyword."""
        required: list[str] = []
        optional: list[str] = []
        takes_rest = False
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(f"parameter {name!r} is positional-only; rewards are called by keyword")
            if parameter.kind is parameter.VAR_KEYWORD:
                takes_rest = not name.startswith("_")
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                (required if parameter.default is parameter.empty else optional).append(name)
        return cls(tuple(required), tuple(optional), takes_rest, getattr(function, "right_at", "undeclared"))

    def asks_for(self, name: str) -> bool:
        return name in self.required or name in self.optional

    def check(self, label: str, columns: Iterable[str], arguments: Iterable[str] = ()) -> None:
        """Raise RewardError unless every parameter is a column, is bound by `arguments`, or has a default."""
        columns, arguments = list(columns), list(arguments)
        self.check_arguments(label, arguments)
        for name in self.required:
            if name in PROVIDED or name in columns or name in arguments:
                continue
            if name in ("prompt", "completion"):
                raise RewardError(
                    f"reward {label} asks for {name!r}: decorate it with @rewards.per_completion, or take "
                    f"lists as {name + 's'!r}"
                )
            raise RewardError(
                f"reward {label} asks for the column {name!r}, which is not there"
                f"{did_you_mean(name, columns)}. Columns: {', '.join(sorted(columns)) or 'none'}. Wrap it in a "
                f"function of two lines that takes another column, or bind a value, arguments: {{{name}: ...}}"
            )

    def check_arguments(self, label: str, arguments: Iterable[str]) -> None:
        """Raise RewardError if an argument to bind is not a named parameter (`**kwargs` would hide a typo)."""
        options = [name for name in (*self.required, *self.optional) if name not in PROVIDED]
        for name in arguments:
            if name not in options:
                raise RewardError(
                    f"reward {label} has no parameter {name!r} to bind{did_you_mean(name, options)}. "
                    f"Its parameters: {', '.join(options) or 'none'}"
                )


async def awaited(result: Awaitable[T]) -> T:
    """The value of what an async function has returned, in a coroutine, as event loops ask for one."""
    return await result


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def right_at(mark: float | None) -> Callable[[AnyReward], AnyReward]:
    """Declare what the marks of a reward mean: a completion is right from `mark` on, and wrong below it.

    If its first reward is declared so, an evaluation reports accuracy, pass@k and majority votes, and otherwise the
    mean reward. None declares that marks do not mean right or wrong. Without a declaration they do so only if every
    mark that was seen is 0 or 1. The `mark` is before the reward's weight. Raises ValueError if it is not finite.

    >>> @right_at(1.0)
    ... def works(completions, answer, **_):        # 1.0 for the right answer, 0.5 more for an equation
    ...     return [(a in c) + 0.5 * ("=" in c) for c, a in zip(completions, answer)]
    >>> Signature.of(works).right_at
    1.0
    """
    if mark is not None and not math.isfinite(mark):
        raise ValueError(f"right_at({mark}): give the mark from which a completion is right, or None")

    def declare(function: AnyReward) -> AnyReward:
        function.right_at = None if mark is None else float(mark)  # type: ignore[attr-defined]
        return function

    return declare


def per_completion(function: Reward) -> Reward:
    """Make a reward from a function of one completion, sync or async (then all completions run concurrently).

    It may take `prompt`, `completion`, columns by name (one row's value each), `completion_ids` (one completion's),
    `trainer_state`, `log_metric`, and `log_extra(column, value)` with one value instead of a list.

    >>> @per_completion
    ... def exact(completion, answer):
    ...     return float(completion == answer)
    >>> exact(prompts=["1 + 1 = ", "1 + 2 = "], completions=["2", "4"], answer=["2", "3"])
    [1.0, 0.0]
    """
    parameters = inspect.signature(function).parameters
    signature = Signature.of(function)

    def rows(prompts: Sequence, completions: Sequence, rest: dict, extras: dict) -> Iterator[dict[str, Any]]:
        columns = {
            name: values
            for name, values in (rest | {"prompt": prompts, "completion": completions}).items()
            if signature.asks_for(name) or (signature.takes_rest and name not in PROVIDED)
        }
        columns.pop("log_extra", None)
        whole = {name: columns.pop(name) for name in ("trainer_state", "log_metric") if name in columns}
        for i in range(len(completions)):
            row = {name: values[i] for name, values in columns.items()}
            if signature.asks_for("log_extra"):
                row["log_extra"] = functools.partial(_note, extras, i, len(completions))
            yield row | whole

    def flush(extras: dict[str, list], rest: dict) -> None:
        if log_extra := rest.get("log_extra"):
            for column, values in extras.items():
                log_extra(column, values)

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def reward(prompts, completions, **rest):
            import asyncio  # not above: see rewards/isolation/child.py

            extras: dict[str, list] = {}
            scores = [function(**row) for row in rows(prompts, completions, rest, extras)]
            result = list(await asyncio.gather(*scores))
            flush(extras, rest)
            return result
    else:

        @functools.wraps(function)
        def reward(prompts, completions, **rest):
            extras: dict[str, list] = {}
            result = [function(**row) for row in rows(prompts, completions, rest, extras)]
            flush(extras, rest)
            return result

    others = [
        parameter if parameter.kind is parameter.VAR_KEYWORD else parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, parameter in parameters.items()
        if name not in ("prompt", "completion")
    ]
    lists = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("prompts", "completions")]
    reward.__signature__ = inspect.Signature(lists + others)  # type: ignore[attr-defined]
    reward.of_one = function  # type: ignore[attr-defined]
    return reward


def _note(extras: dict[str, list], i: int, count: int, column: str, value: object) -> None:
    extras.setdefault(column, [None] * count)[i] = value


def bind(function: Reward, arguments: Mapping[str, Any]) -> Reward:
    """The function with keyword arguments fixed. A per-completion function gets them whole, not row by row."""
    if not arguments:
        return function
    if hasattr(function, "of_one"):
        return per_completion(functools.partial(function.of_one, **arguments))
    return functools.partial(function, **arguments)


def text_of(completion: str | Messages) -> str:
    """The text of a plain completion, or that of the policy's last message in a chat completion.

    If no message is the policy's, it is the text of the last one.

    >>> text_of([{"role": "assistant", "content": "#### 42"}, {"role": "tool", "name": "check", "content": "right"}])
    '#### 42'
    """
    if isinstance(completion, str):
        return completion
    messages = [message for message in completion if message.get("role") == "assistant"] or completion
    content = messages[-1].get("content") if messages else ""
    if isinstance(content, list):  # content blocks
        return "".join(block.get("text", "") for block in content)
    return content or ""
