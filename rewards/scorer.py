"""Scores groups of completions with several reward functions. Plain lists in, plain lists out."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rewards.group_score import LARGEST, FailurePolicy, GroupScore, GroupTally, RewardFailed, RewardFailure
from rewards.isolation.pool import ThisProcess, WorkerPool
from rewards.protocol import PROVIDED, Messages, RewardError, RightAt, Signature, did_you_mean
from rewards.registry import find_reward

logger = logging.getLogger(__name__)

BATCH = 256  # completions in one call at most: what one time limit covers and what one failure reruns


@dataclass(frozen=True)
class RewardSpec:
    """One reward function of a run, as plain data.

    `function` is a built-in's name or `path/to/file.py:function`; `arguments` are bound to its parameters; `chat` hands
    it prompts and completions as chat messages instead of strings; `name` labels it in metrics; `columns` names the
    columns for parameters that are called otherwise: `{"reference": "answer"}`.

    >>> RewardSpec("regex_format", weight=0.2, arguments={"pattern": "#### [0-9]+"}).label
    'regex_format'
    """

    function: str
    weight: float = 1.0
    name: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    chat: bool = False
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]


@dataclass
class _Group:
    prompt: Any
    completions: list[str]
    columns: Mapping[str, Any]
    prompt_id: str
    completion_ids: list[list[int]] | None
    completion_columns: Mapping[str, Sequence[Any]]
    messages: Messages | None = None  # of the prompt

    def only(self, sample: int) -> _Group:
        ids = None if self.completion_ids is None else [self.completion_ids[sample]]
        own = {name: [values[sample]] for name, values in self.completion_columns.items()}
        return replace(self, completions=[self.completions[sample]], completion_ids=ids, completion_columns=own)

    def renamed(self, names: Mapping[str, str]) -> _Group:
        """With the columns that `names` maps parameters to under the parameters' names as well."""
        own = {name: self.columns[column] for name, column in names.items() if column in self.columns}
        each = {name: self.completion_columns[c] for name, c in names.items() if c in self.completion_columns}
        return replace(self, columns={**self.columns, **own}, completion_columns={**self.completion_columns, **each})


class _Function:
    """A spec with its source and signature: what the worker needs to load it, and to call it."""

    def __init__(self, spec: RewardSpec, index: int):
        self.spec, self.index, self.label = spec, index, spec.label
        self.source = find_reward(spec.function)
        self.signature = Signature((), (), False)  # known once a worker has loaded it

    def description(self) -> dict[str, Any]:
        return asdict(self.source) | {
            "content": self.source.content.decode("latin-1"),
            "arguments": self.spec.arguments,
            "chat": self.spec.chat,
        }

    def check(self, columns: Sequence[str] | None) -> None:
        """Raise RewardError for a parameter without a value, where the columns are known, and for mistyped names."""
        label, own = repr(self.spec.function), self.spec.columns
        self.signature.check_arguments(label, own)
        if columns is None:
            return
        for name, column in own.items():
            if column not in columns:
                raise RewardError(
                    f"reward {label}: columns={{{name}: {column}}}, but there is no column {column!r}"
                    f"{did_you_mean(column, columns)}. Columns: {', '.join(sorted(columns)) or 'none'}"
                )
        self.signature.check(label, [*columns, *own], self.spec.arguments)

    def request(self, groups: Sequence[_Group], trainer_state: Mapping[str, Any] | None) -> dict[str, Any]:
        """The message for a batch. Raises RewardError when something that the function asks for is missing."""
        groups = [group.renamed(self.spec.columns) for group in groups]
        per_completion = groups[0].completion_columns
        names = self._columns([*groups[0].columns, *per_completion])
        request: dict[str, Any] = {
            "function": self.index,
            "prompts": [(group.messages if self.spec.chat else None) or group.prompt for group in groups],
            "completions": [group.completions for group in groups],
            "columns": {
                name: [self._value(group, name) for group in groups] for name in names if name not in per_completion
            },
            "completion_columns": {
                name: [list(group.completion_columns[name]) for group in groups]
                for name in names
                if name in per_completion
            },
        }
        ids = [group.completion_ids for group in groups]
        for name, value in {
            "completion_ids": None if None in ids else ids,
            "trainer_state": None if trainer_state is None else dict(trainer_state),
        }.items():
            if self.signature.asks_for(name) and value is not None:
                request[name] = value
            elif name in self.signature.required:
                raise RewardError(f"reward {self.spec.function!r} asks for {name}; pass {name} to Scorer.score")
        return request

    def _columns(self, columns: Sequence[str]) -> list[str]:
        """The columns to send: those it names, and the others if it takes `**kwargs`."""
        signature = self.signature
        # A built-in's parameters with a default are options: a column that happens to be called `mode` is not meant.
        if wrong := [n for n in signature.optional if n in self.spec.columns and not self.source.path]:
            raise RewardError(
                f"reward {self.spec.function!r}: columns has {wrong[0]}={self.spec.columns[wrong[0]]}, but this is "
                f"one value for all rows; bind it, arguments: {{{wrong[0]}: ...}}"
            )
        optional = [name for name in signature.optional if name in columns and self.source.path]
        rest = [name for name in dict.fromkeys(columns) if signature.takes_rest and not signature.asks_for(name)]
        taken = (*PROVIDED, *self.spec.arguments)
        return [name for name in (*signature.required, *optional, *rest) if name not in taken]

    def _value(self, group: _Group, name: str) -> Any:
        if name not in group.columns:
            where = f"{self.spec.function!r} (prompt {group.prompt_id!r})"
            self.signature.check(where, group.columns, self.spec.arguments)
            raise RewardError(f"prompt {group.prompt_id!r} has no column {name!r}, which other prompts have")
        value = group.columns[name]
        if culprit := _not_json(value):
            raise RewardError(
                f"column {name!r} of prompt {group.prompt_id!r} holds {culprit}, which cannot be sent to the reward "
                f"{self.spec.function!r}; make it strings, numbers, booleans, None, lists, or dicts with string keys"
            )
        return value


class Scorer:
    """Scores completions in worker processes, each call under a time limit that kills.

    A call that fails is repeated completion by completion, so that the failure is charged where it belongs.
    `on_error` says what a failure then means (contract 6, never a silent zero):

    - `abort`: raise RewardError that names function, prompt, sample and cause
    - `drop_sample`: the completion's reward is None
    - `drop_group`: all rewards of its group are None, and `dropped` is set
    - `score=<number>`: that number stands in for the function's, and is weighted like it

    `timeout_s` limits each call, of a batch (at most 256 completions) as of one completion alone. Raises RewardError
    when a function cannot be loaded, or asks for a column that is not among `columns`. `isolated=False` calls the
    functions in this process, without a limit: for a debugger, and to see that the scores are the same.
    `pass_variables` are environment variables for the workers besides the usual few (`rewards.isolation.variables`).

    >>> with Scorer([RewardSpec("gsm8k"), RewardSpec("gsm8k_format", weight=0.5)], columns=["answer"]) as scorer:
    ...     [group] = scorer.score(["6 * 7 = "], [["#### 42", "41"]], [{"answer": "#### 42"}], prompt_ids=["a"])
    >>> group.rewards
    [1.5, 0.0]
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        *,
        on_error: str = "abort",
        timeout_s: float = 10.0,
        workers: int = 1,
        columns: Sequence[str] | None = None,
        isolated: bool = True,
        pass_variables: Sequence[str] = (),
    ):
        self._policy = FailurePolicy.parse(on_error)
        _check_specs(specs, self._policy.substitute)
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise RewardError(f"reward.timeout_s={timeout_s!r} must be a number of seconds above 0")
        if workers < 1:
            raise RewardError(f"reward.workers={workers!r} must be 1 or more")
        self._timeout_s, self._workers = timeout_s, workers
        self._functions = [_Function(spec, index) for index, spec in enumerate(specs)]
        self._logged_by: dict[str, str] = {}
        descriptions = [function.description() for function in self._functions]
        tokens = [spec.arguments.get("token_variable") for spec in specs if spec.function == "remote"]
        named = [*pass_variables, *(name for name in tokens if name)]
        self._pool: WorkerPool | ThisProcess = (
            WorkerPool(descriptions, size=workers, timeout_s=timeout_s, pass_variables=named)
            if isolated
            else ThisProcess(descriptions)
        )
        try:
            for function, signature in zip(self._functions, self._pool.signatures(), strict=True):
                function.signature = signature
                function.check(columns)
        except BaseException:
            self.close()
            raise

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        columns: Sequence[Mapping[str, Any]],
        *,
        prompt_ids: Sequence[str],
        completion_ids: Sequence[Sequence[Sequence[int]]] | None = None,
        trainer_state: Mapping[str, Any] | None = None,
        completion_columns: Sequence[Mapping[str, Sequence[Any]]] | None = None,
        messages: Sequence[Messages | None] | None = None,
    ) -> list[GroupScore]:
        """Score P groups of completions at once: prompts [P], completions [P][G], columns [P], prompt_ids [P].

        A reward is the weighted sum over the functions that did not abstain, None where all of them did.
        `completion_ids` [P][G][L] and `trainer_state` (JSON-able; it arrives as an object: `trainer_state.global_step`)
        are for functions that ask for them. `completion_columns` [P]{name: [G]} are columns with a value for every
        completion, such as a reward model's score; they win over a column of the same name. `messages` [P] are the chat
        messages of the prompts, for functions with `chat`; without them the prompt is one message of the user. Raises
        RewardError: see the class.
        """
        ids = [None] * len(prompts) if completion_ids is None else completion_ids
        own = [{}] * len(prompts) if completion_columns is None else completion_columns
        chats = [None] * len(prompts) if messages is None else messages
        parts = (prompts, completions, columns, prompt_ids, ids, own, chats)
        if len(set(map(len, parts))) > 1:
            raise RewardError(
                "prompts, completions, columns, prompt_ids, completion_ids, completion_columns and messages "
                "have the lengths "
                f"{', '.join(str(len(part)) for part in parts)}; give one of each per group"
            )
        groups = []
        for prompt, texts, row, prompt_id, tokens, values, chat in zip(*parts, strict=True):
            for name, there in {"completion_ids": tokens, **values}.items():
                if there is not None and len(there) != len(texts):
                    raise RewardError(f"prompt {prompt_id!r}: {len(there)} {name}, {len(texts)} completions")
            tokens = None if tokens is None else [list(sample) for sample in tokens]
            groups.append(_Group(prompt, list(texts), row, prompt_id, tokens, values, chat))
        return self._score(groups, trainer_state, self._policy)

    def dry_run(
        self,
        prompt: str,
        completion: str,
        columns: Mapping[str, Any],
        *,
        completion_ids: Sequence[int] | None = None,
        trainer_state: Mapping[str, Any] | None = None,
        messages: Messages | None = None,
    ) -> GroupScore:
        """Score one row, twice in one batch, before any model is loaded: the score of a group of two.

        Raises RewardError with the fix, whatever `on_error` says. Stand-ins for what does not exist yet: the
        completion's bytes as its token ids, and step 0 as trainer state.
        """
        tokens = list(completion.encode(errors="replace") if completion_ids is None else completion_ids)
        state = trainer_state or {"global_step": 0, "max_steps": 1, "epoch": 0.0}
        group = _Group(prompt, [completion] * 2, columns, "dry run", [tokens] * 2, {}, messages)
        return self._score([group], state, FailurePolicy("abort"), rerun=False)[0]

    def right_at(self, label: str) -> RightAt:
        """What the function with this label declares about its marks, see `rewards.right_at`."""
        return next(function.signature.right_at for function in self._functions if function.label == label)

    def asks_for(self, name: str) -> bool:
        """Whether one of the functions has a parameter of this name."""
        return any(function.signature.asks_for(name) for function in self._functions)

    def describe(self) -> list[dict[str, Any]]:
        """For the run's record, one dict per function: its spec, `path` and `sha256` of a user's file, and
        `code_sha256` of what the function reaches in it."""
        return [
            asdict(function.spec)
            | {"name": function.label, "path": function.source.path, "sha256": function.source.sha256}
            | {"code_sha256": function.source.code_sha256}
            for function in self._functions
        ]

    def close(self) -> None:
        """End all worker processes. The scorer cannot be used afterwards."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(
        self,
        groups: list[_Group],
        trainer_state: Mapping[str, Any] | None,
        policy: FailurePolicy,
        *,
        rerun: bool = True,
    ) -> list[GroupScore]:
        weights = {function.label: function.spec.weight for function in self._functions}
        tallies = [GroupTally(group.prompt_id, len(group.completions), weights) for group in groups]
        calls = [(function, batch) for function in self._functions for batch in self._batches(groups)]
        replies = self._pool.run(
            [function.request([groups[i] for i in batch], trainer_state) for function, batch in calls]
        )
        suspects: list[tuple[_Function, range, dict]] = []
        for (function, batch), reply in zip(calls, replies, strict=True):
            assert reply is not None
            places = [(tallies[i], sample) for i in batch for sample in range(tallies[i].size)]
            # A worker may have been killed from outside: a death counts when it happens again.
            if rerun and "kind" in reply and (len(places) > 1 or reply["kind"] == "died"):
                suspects.append((function, batch, reply))
            else:
                self._note(function, places, reply)
        for function, batch, reply in suspects:
            alone = [(i, sample) for i in batch for sample in range(tallies[i].size)]
            requests = [function.request([groups[i].only(sample)], trainer_state) for i, sample in alone]
            single_replies = self._pool.run(requests, stop_at_failure=policy.action == "abort")
            for (i, sample), single in zip(alone, single_replies, strict=True):
                if single is not None:
                    self._note(function, [(tallies[i], sample)], single)
            if not any(error.function == function.label for i in batch for error in tallies[i].errors):
                self._warn(function, reply)
        if policy.action == "abort":
            for failure in (error for tally in tallies for error in tally.errors):
                raise RewardFailed(self._explain(failure), failure)
        return [tally.result(policy) for tally in tallies]

    def _batches(self, groups: list[_Group]) -> Iterator[range]:
        """Runs of whole groups, enough for every worker, of BATCH completions at most unless one group has more."""
        total = sum(len(group.completions) for group in groups)
        most = min(BATCH, math.ceil(total / self._workers))
        start, size = 0, 0
        for i, group in enumerate(groups):
            if size and size + len(group.completions) > most:
                yield range(start, i)
                start, size = i, 0
            size += len(group.completions)
        if size:
            yield range(start, len(groups))

    def _note(self, function: _Function, places: list[tuple[GroupTally, int]], reply: dict) -> None:
        """Write down what a reply says about the (group, sample) places that were asked about."""
        values = [reply] * len(places) if "kind" in reply else reply["rewards"]
        for (tally, sample), value in zip(places, values, strict=True):
            tally.note(function.label, sample, value)
        extras, metrics = reply.get("extras", {}), reply.get("metrics", {})
        for name in (*extras, *metrics):
            if self._logged_by.setdefault(name, function.label) != function.label:
                raise RewardError(
                    f"rewards {self._logged_by[name]!r} and {function.label!r} both log {name!r}; rename one of them"
                )
        for name, logged in extras.items():
            for (tally, sample), value in zip(places, logged, strict=True):
                tally.note_extra(name, sample, value)
        for name, number in metrics.items():
            for tally in {id(tally): tally for tally, _ in places}.values():
                tally.note_metric(name, number)

    def _warn(self, function: _Function, reply: dict) -> None:
        fix = f"; raise reward.timeout_s={self._timeout_s:g}" if reply["kind"] == "timeout" else ""
        logger.warning(
            "reward %r failed on a batch (%s: %s) and on none of its completions alone: their scores stand, and every "
            "such batch costs a rerun%s",
            *(function.label, reply["kind"], reply["message"], fix),
        )

    def _explain(self, failure: RewardFailure) -> str:
        slower = f"raise reward.timeout_s={self._timeout_s:g}; " if failure.kind == "timeout" else ""
        return (
            f"{failure}\nNo reward was made up for it. Fix the function; {slower}or choose with reward.on_error what a "
            "failure means: 'drop_sample' (leave this completion out), 'drop_group' (leave its whole group out), "
            "'score=0' (count it as 0). A function that has no opinion on a completion returns None"
        )


def _check_specs(specs: Sequence[RewardSpec], substitute: float) -> None:
    if not specs:
        raise RewardError("no reward is given; name at least one, such as RewardSpec('gsm8k')")
    labels = [spec.label for spec in specs]
    for spec in specs:
        if labels.count(spec.label) > 1:
            raise RewardError(f"two rewards are called {spec.label!r}; give one of them another name")
        if not abs(spec.weight) <= LARGEST:
            raise RewardError(f"reward {spec.label!r}: weight={spec.weight!r} must be finite, and between ±{LARGEST:g}")
        if abs(spec.weight * substitute) > LARGEST:
            raise RewardError(
                f"reward.on_error='score={substitute:g}' times weight={spec.weight:g} of reward {spec.label!r} is "
                f"beyond ±{LARGEST:g}, where scores overflow; choose a smaller number"
            )
        if culprit := _not_json(spec.arguments):
            raise RewardError(f"reward {spec.label!r}: arguments hold {culprit}; use plain JSON values")


def _not_json(value: Any) -> str | None:
    """What in `value` JSON cannot carry unchanged, in words, or None."""
    if value is None or isinstance(value, str | int | float):
        return None
    if isinstance(value, list | tuple):
        return next((culprit for item in value if (culprit := _not_json(item))), None)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"a dict with the key {key!r} of type {type(key).__name__}"
        return _not_json(list(value.values()))
    return f"a {type(value).__name__} ({json.dumps(repr(value)[:40])})"
