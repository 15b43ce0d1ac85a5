"""Scores groups of completions with several reward functions. It takes and returns plain lists."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, product
from typing import Any

from rewards.group_score import FailurePolicy, GroupScore, GroupTally, RewardFailed, RewardFailure
from rewards.protocol import Messages, RewardError, RightAt
from rewards.registry import CALLABLES
from rewards.spec import Group, RewardFunction, RewardSpec, check_specs

logger = logging.getLogger(__name__)

BATCH = 256  # the most completions in one call, which has one time limit; after a failure they run again


class Scorer:
    """Scores completions in worker processes. A call that exceeds its time limit is killed.

    A call that fails is repeated completion by completion, so that the failure is that of one completion. `on_error`
    then decides what happens (contract 6: never a silent zero):

    - `abort`: raise RewardError that names function, prompt, sample and cause
    - `drop_sample`: the completion's reward is None
    - `drop_group`: all rewards of its group are None, and `dropped` is set
    - `score=<number>`: that number replaces the function's, and is weighted like it

    `timeout_s` limits each call, whether of a batch (at most 256 completions) or of one completion. Raises RewardError
    if a function cannot be loaded, or asks for a column that is not among `columns`. `isolated=False` calls the
    functions in this process, without a limit. All are called so where one was handed over from Python, and has no file
    for a worker to load, and on Windows, with a warning. `pass_variables` are environment variables for the workers
    besides the usual few (`rewards.isolation.variables`).

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
        check_specs(specs, self._policy.substitute)
        if not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise RewardError(f"reward.timeout_s={timeout_s!r} must be a number of seconds above 0")
        if workers < 1:
            raise RewardError(f"workers={workers!r} must be 1 or more")
        self._timeout_s, self._workers = timeout_s, workers
        self._functions = [RewardFunction(spec, index) for index, spec in enumerate(specs)]
        self._logged_by: dict[str, str] = {}
        self._lost, self._lost_s = 0, 0.0
        descriptions = [function.description() for function in self._functions]
        tokens = [spec.arguments.get("token_variable") for spec in specs if ":" not in spec.function]  # built-ins
        named = [*pass_variables, *(name for name in tokens if name)]
        isolated = isolated and not any(spec.function in CALLABLES for spec in specs)
        from rewards.isolation.pool import ISOLATES, ThisProcess, WorkerPool

        self._pool: WorkerPool | ThisProcess = ThisProcess(descriptions)
        if isolated and ISOLATES:
            self._pool = WorkerPool(descriptions, size=workers, timeout_s=timeout_s, pass_variables=named)
        elif isolated:
            logger.warning(
                "on Windows rewards run in the process of the run: reward.timeout_s ends no call that hangs, and a "
                "reward may read what the run may; Linux, macOS and WSL 2 have processes for them"
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
        turns: Sequence[Sequence[Messages] | None] | None = None,
    ) -> list[GroupScore]:
        """Score P groups of completions at once: prompts [P], completions [P][G], columns [P], prompt_ids [P].

        A reward is the weighted sum over the functions that did not abstain, or None if all did whose weight is not 0.
        `completion_ids` [P][G][L] and `trainer_state` (JSON-able; functions get an object: `trainer_state.global_step`)
        are for functions that ask for them. `completion_columns` [P]{name: [G]} have a value for every completion, and
        replace a column of the same name. Functions with `chat:` before their name read `messages` [P] of the prompts
        and `turns` [P][G] of episodes; without them a text is one message of the user or of the assistant. Raises
        RewardError as described for the class.
        """
        ids = [None] * len(prompts) if completion_ids is None else completion_ids
        each = [{}] * len(prompts) if completion_columns is None else completion_columns
        chats = [None] * len(prompts) if messages is None else messages
        episodes = [None] * len(prompts) if turns is None else turns
        parts = (prompts, completions, columns, prompt_ids, ids, each, chats, episodes)
        if len(set(map(len, parts))) > 1:
            raise RewardError(
                "prompts, completions, columns, prompt_ids, completion_ids, completion_columns, messages and turns "
                f"have the lengths {', '.join(str(len(part)) for part in parts)}; give one of each per group"
            )
        groups = []
        for prompt, texts, row, prompt_id, tokens, values, chat, episode in zip(*parts, strict=True):
            for name, part in {"completion_ids": tokens, "turns": episode, **values}.items():
                if part is not None and len(part) != len(texts):
                    raise RewardError(f"prompt {prompt_id!r}: {len(part)} {name}, {len(texts)} completions")
            tokens = None if tokens is None else [list(sample) for sample in tokens]
            episode = None if episode is None else list(episode)
            groups.append(Group(prompt, list(texts), row, prompt_id, tokens, values, chat, episode))
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
        """Score one row twice in one batch, before any model is loaded. Returns the score of a group of two.

        Raises RewardError with the fix, whatever `on_error` is. As there are no tokens and no trainer yet, the bytes of
        the completion are its token ids, and the trainer state is that of step 0.
        """
        tokens = list(completion.encode(errors="replace") if completion_ids is None else completion_ids)
        state = trainer_state or {"global_step": 0, "max_steps": 1, "epoch": 0.0}
        group = Group(prompt, [completion] * 2, columns, "dry run", [tokens] * 2, {}, messages)
        return self._score([group], state, FailurePolicy("abort"), rerun=False)[0]

    def right_at(self, label: str) -> RightAt:
        """Gives what the function with this label has declared about its marks, see `rewards.right_at`."""
        return next(function.signature.right_at for function in self._functions if function.label == label)

    def asks_for(self, name: str) -> bool:
        """Tells whether one of the functions has a parameter of this name."""
        return any(function.signature.asks_for(name) for function in self._functions)

    def describe(self) -> list[dict[str, Any]]:
        """One dict per function for the run's record: its spec, `path` and `sha256` of a user's file, and
        `code_sha256` of what the function reaches in it."""
        return [
            asdict(function.spec)
            | {"name": function.label, "path": function.source.path, "sha256": function.source.sha256}
            | {"code_sha256": function.source.code_sha256}
            for function in self._functions
        ]

    def take_lost(self) -> tuple[int, float]:
        """Tells how many worker processes died or were late since the last call, and the seconds that it took until
        their work was done again or given up."""
        lost, self._lost, self._lost_s = (self._lost, self._lost_s), 0, 0.0
        return lost

    def close(self) -> None:
        """End all worker processes. The scorer cannot be used afterwards."""
        self._pool.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score(
        self, groups: list[Group], trainer_state: Mapping[str, Any] | None, policy: FailurePolicy, *, rerun: bool = True
    ) -> list[GroupScore]:
        try:
            return self._scores(groups, trainer_state, policy, rerun)
        finally:
            if lost := self._pool.take_lost():
                self._lost += len(lost)
                self._lost_s += time.monotonic() - min(lost)

    def _scores(
        self, groups: list[Group], trainer_state: Mapping[str, Any] | None, policy: FailurePolicy, rerun: bool
    ) -> list[GroupScore]:
        weights = {function.label: function.spec.weight for function in self._functions}
        tallies = [GroupTally(group.prompt_id, len(group.completions), weights) for group in groups]
        calls, requests = [], []
        for function, batch in product(self._functions, self._batches(groups)):
            calls.append((function, batch))
            requests.append(function.request(groups[batch.start : batch.stop], trainer_state))
        replies = self._pool.run(requests)
        suspects: list[tuple[RewardFunction, range, dict]] = []
        for (function, batch), reply in zip(calls, replies, strict=True):
            assert reply is not None
            places = [(tallies[i], sample) for i, sample in _samples(tallies, batch)]
            # A worker may have been killed from outside, so only a second death is a failure.
            if rerun and "kind" in reply and (len(places) > 1 or reply["kind"] == "died"):
                suspects.append((function, batch, reply))
            else:
                self._note(function, places, reply)
        for function, batch, reply in suspects:
            alone = list(_samples(tallies, batch))
            requests = [function.request([groups[i].only(sample)], trainer_state) for i, sample in alone]
            single_replies = self._pool.run(requests, stop_at_failure=policy.action == "abort")
            for (i, sample), single in zip(alone, single_replies, strict=True):
                if single is not None:
                    self._note(function, [(tallies[i], sample)], single)
            errors = chain.from_iterable(tallies[i].errors for i in batch)
            if not any(error.function == function.label for error in errors):
                self._warn(function, reply)
        if policy.action == "abort":
            for failure in chain.from_iterable(tally.errors for tally in tallies):
                raise RewardFailed(self._explain(failure), failure)
        return [tally.result(policy) for tally in tallies]

    def _batches(self, groups: list[Group]) -> Iterator[range]:
        """Ranges of whole groups: enough for all workers, each of at most BATCH completions unless a group has more."""
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

    def _note(self, function: RewardFunction, places: list[tuple[GroupTally, int]], reply: dict) -> None:
        """Add a reply to the tallies of the (group, sample) places that were asked about."""
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

    def _warn(self, function: RewardFunction, reply: dict) -> None:
        fix = f"; raise reward.timeout_s={self._timeout_s:g}" if reply["kind"] == "timeout" else ""
        logger.warning(
            "reward %r failed on a batch (%s: %s) but on none of its completions alone: their scores are kept, and "
            "every such batch costs a rerun%s",
            *(function.label, reply["kind"], reply["message"], fix),
        )

    def _explain(self, failure: RewardFailure) -> str:
        slower = f"raise reward.timeout_s={self._timeout_s:g}; " if failure.kind == "timeout" else ""
        return (
            f"{failure}\nNo reward was made up for it. Fix the function; {slower}or choose with reward.on_error what a "
            "failure means: 'drop_sample' (leave this completion out), 'drop_group' (leave its whole group out), "
            "'score=0' (count it as 0). A function that cannot judge a completion should return None"
        )


def _samples(tallies: Sequence[GroupTally], batch: range) -> Iterator[tuple[int, int]]:
    """The group and the sample index of every completion of a batch."""
    for i in batch:
        for sample in range(tallies[i].size):
            yield i, sample
