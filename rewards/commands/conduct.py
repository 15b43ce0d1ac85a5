"""How a reward function behaves besides its marks: what it changes, prints and keeps, and what its marks hang on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from rewards.commands.check import STATE, RewardCheck, Trial, by_place, try_reward
from rewards.commands.options import RewardTestConfig
from rewards.isolation.pool import ISOLATES, WorkerPool
from rewards.isolation.watched import CALLS
from rewards.scorer import Scorer
from rewards.spec import Group, RewardFunction, RewardSpec

HABITS = ("hash_seed", "changes", "prints", "leaks")
HASH_SEEDS = ("1", "2", "3")  # workers have 0
ROWS = 8  # whose completions the function is watched on
KEPT = 256  # bytes that a call may leave behind


def check_conduct(function: str, config: RewardTestConfig, allowed: Collection[str] = ()) -> RewardCheck:
    """Does what `check_reward` does, and then looks for the HABITS that are not `allowed`, where there are processes to
    look in."""
    if wrong := sorted(set(allowed) - set(HABITS)):
        raise ValueError(f"allow={wrong}: the habits that can be allowed are {', '.join(HABITS)}")
    trial = try_reward(function, config)
    spec = RewardSpec(function, arguments=config.arguments, chat=config.chat, columns=config.columns)
    if ISOLATES and "hash_seed" not in allowed:
        _compare_hash_seeds(trial, spec, config)
    if ISOLATES:
        problems = _watch(trial, spec, config)
        trial.check.problems += [problem for habit, problem in problems.items() if habit not in allowed]
    return trial.check


def _compare_hash_seeds(trial: Trial, spec: RewardSpec, config: RewardTestConfig) -> None:
    columns, scoring = list(trial.examples[0].columns), config.reward
    for seed in HASH_SEEDS:
        with (
            _hash_seed(seed),
            Scorer(
                [spec],
                on_error=scoring.on_error,
                timeout_s=scoring.timeout_s,
                pass_variables=scoring.pass_variables,
                columns=columns,
            ) as scorer,
        ):
            scores = trial.score(scorer)
        if trial.compare(f"with PYTHONHASHSEED={seed}", by_place(scores)):
            return  # one seed says it


def _watch(trial: Trial, spec: RewardSpec, config: RewardTestConfig) -> dict[str, str]:
    """Returns the first problem of each habit, with the completion that shows it."""
    function, scoring = RewardFunction(spec, 0), config.reward
    description = function.description() | {"kind": "watched reward"}
    limit = scoring.timeout_s * 3 * CALLS  # one request calls it so often
    pool = WorkerPool([description], size=1, timeout_s=limit, pass_variables=scoring.pass_variables)
    groups = [_group(trial, i) for i in range(min(ROWS, len(trial.examples)))]
    alone = [group.only(sample) for group in groups for sample in range(len(group.completions))]
    try:
        [function.signature] = pool.signatures()
        requests = [function.request([group], STATE) for group in alone]
        requests.append(function.request(groups, STATE) | {"repeated": True})
        replies = pool.run(requests)
    finally:
        pool.close()
    problems: dict[str, str] = {}
    for group, reply in zip([*alone, groups[0]], replies, strict=True):
        assert reply is not None
        where = f"prompt {group.prompt[:80]!r}, completion {group.completions[0][:80]!r}"
        if len(group.completions) > 1:
            where = f"in a batch, which begins with {where}"
        for habit, what in {
            "fails": f"it fails when called again: {reply['kind']}: {reply['message']}" if "kind" in reply else "",
            "changes": f"it changes its arguments {', '.join(reply['changed'])}" if reply.get("changed") else "",
            "prints": f"it prints {reply['printed'][:80]!r}" if reply.get("printed") else "",
            "leaks": f"it leaks memory, {reply['kept']:,} bytes a call" if reply.get("kept", 0) > KEPT else "",
        }.items():
            if what:
                problems.setdefault(habit, f"{what}; {where}")
    return problems


def _group(trial: Trial, i: int) -> Group:
    """The completions of a row, without the long hostile one."""
    texts = [probe.text for probe in trial.probes[i] if probe.kind != "hostile"]
    ids = [list(text.encode(errors="replace")) for text in texts]
    example = trial.examples[i]
    return Group(trial.prompts[i], texts, example.columns, example.example_id, ids, {}, trial.messages[i])


@contextmanager
def _hash_seed(seed: str) -> Iterator[None]:
    """Workers that are started meanwhile hash texts by this seed."""
    former = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = seed
    try:
        yield
    finally:
        del os.environ["PYTHONHASHSEED"]
        if former is not None:
            os.environ["PYTHONHASHSEED"] = former
