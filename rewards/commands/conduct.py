"""How a reward function behaves besides its marks: what it changes, prints and keeps, and whether hashes decide."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rewards.commands.check import ROUNDING, STATE, RewardCheck, Trial, try_reward
from rewards.commands.options import RewardTestConfig
from rewards.isolation.pool import ISOLATES, WorkerPool
from rewards.isolation.watched import CALLS
from rewards.spec import Group, RewardFunction

HABITS = ("hash_seed", "changes", "prints", "leaks")
ROWS = 8  # whose completions the function is watched on
OF_HABIT = {"fails": "reward-fails", "changes": "arguments-changed", "prints": "prints", "leaks": "memory-leak"}
LEAK = 2048  # bytes that are kept of every call, above which a function leaks
WATCHED = "rewards.isolation.watched:WatchedReward"
HASH_SEEDS = {"1": WATCHED, "2": "reward"}  # in place of 0, which workers have, and what runs with it


def check_conduct(function: str, config: RewardTestConfig, allowed: Collection[str] = ()) -> RewardCheck:
    """Does what `check_reward` does, and then looks for the HABITS that are not `allowed`, where there are processes to
    look in."""
    if wrong := sorted(set(allowed) - set(HABITS)):
        raise ValueError(f"allow={wrong}: the habits that can be allowed are {', '.join(HABITS)}")
    trial = try_reward(function, config)
    problems: dict[str, str] = {}
    differs = any(count for way, count in trial.check.differing.items() if way != "in this process")
    for seed in HASH_SEEDS if ISOLATES else ():
        scores = _watch(trial, seed, problems)
        if not differs and "fails" not in problems and "hash_seed" not in allowed:
            differs = trial.compare(f"with PYTHONHASHSEED={seed}", scores, ROUNDING)
    for habit, what in problems.items():
        if habit not in allowed:
            trial.check.add(OF_HABIT[habit], what)
    return trial.check


def _watch(trial: Trial, seed: str, problems: dict[str, str]) -> dict[tuple[int, int], Any]:
    """Adds the first problem of each habit that shows with this hash seed, with the completion that shows it. Gives the
    scores by row and place."""
    function = RewardFunction(trial.spec, 0)
    rows = range(min(ROWS, len(trial.examples)))
    places = [(i, j) for i in rows for j, probe in enumerate(trial.probes[i]) if probe.kind != "hostile"]
    alone = [_group(trial, i, [j]) for i, j in places]
    groups = [_group(trial, i, [j for row, j in places if row == i]) for i in rows]
    with _pool(trial, function, seed) as pool:
        [function.signature] = pool.signatures()
        requests = [function.request([group], STATE) for group in alone]
        answers = pool.run([*requests, function.request(groups, STATE) | {"repeated": True}])
    replies = [reply or {} for reply in answers]
    for group, reply in zip([*alone, groups[0]], replies, strict=True):
        where = f"prompt {group.prompt[:80]!r}, completion {group.completions[0][:80]!r}"
        if len(group.completions) > 1:
            where = f"in a batch, which begins with {where}"
        for habit, what in _habits(reply).items():
            problems.setdefault(habit, f"{what}; {where}")
    return {place: reply.get("rewards", [None])[0] for place, reply in zip(places, replies, strict=False)}


def _habits(reply: Mapping[str, Any]) -> dict[str, str]:
    """Says what a reply shows, by habit."""
    failures = [reply] if "kind" in reply else [mark for mark in reply.get("rewards", []) if isinstance(mark, dict)]
    shown = {
        "fails": "it fails when called again: {kind}: {message}".format_map(failures[0]) if failures else "",
        "changes": f"it changes its arguments {', '.join(reply['changed'])}" if reply.get("changed") else "",
        "prints": f"it prints {reply['printed'][:80]!r}" if reply.get("printed") else "",
        "leaks": f"it leaks memory, {reply['kept']:,} bytes a call" if reply.get("kept", 0) > LEAK else "",
    }
    return {habit: what for habit, what in shown.items() if what}


def _group(trial: Trial, i: int, chosen: list[int]) -> Group:
    """These completions of a row."""
    texts = [trial.probes[i][j].text for j in chosen]
    ids = [list(text.encode(errors="replace")) for text in texts]
    example = trial.examples[i]
    return Group(trial.prompts[i], texts, example.columns, example.example_id, ids, {}, trial.messages[i])


@contextmanager
def _pool(trial: Trial, function: RewardFunction, seed: str) -> Iterator[WorkerPool]:
    """A worker that hashes texts by this seed, and has time for all calls of one request."""
    former = {"PYTHONHASHSEED": os.environ["PYTHONHASHSEED"]} if "PYTHONHASHSEED" in os.environ else {}
    os.environ["PYTHONHASHSEED"] = seed
    description = function.description() | {"kind": HASH_SEEDS[seed]}
    limit = trial.scoring.timeout_s * 3 * CALLS
    pool = WorkerPool([description], size=1, timeout_s=limit, pass_variables=trial.scoring.pass_variables)
    try:
        yield pool
    finally:
        pool.close()
        del os.environ["PYTHONHASHSEED"]
        os.environ |= former
