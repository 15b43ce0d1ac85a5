"""What a run's result depends on, as a resume compares it: reward functions (runs/NAME/rewards.json, with the hashes of
users' files and functions) and other files (`grpo.run.sources`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.run.log import RunLog
from grpo.run.sources import Sources
from policies.files.atomic import write_file
from review.readers.run_folder import read_events
from rewards.config.json_file import expecting, read_json

FILE = "rewards.json"


def refuse_changed_sources(output_dir: Path, rewards: Sequence[dict[str, Any]], sources: Sources | None = None) -> None:
    """A resumed run uses the same functions and files, except where a reward has failed and was mended.

    `rewards` is what `Scorer.describe` gives: [{"name": "grade", "path": "mine.py", "code_sha256": "9f2c...", ...}].
    Raises ValueError naming the others that have changed.
    """
    failed = _failed(output_dir)
    changed = [reward for reward in _changed(read_rewards(output_dir), rewards) if reward["name"] not in failed]
    if changed:
        named = [f"{r['path']} holds another reward function {r['function'].rpartition(':')[2]!r}" for r in changed]
        raise ValueError(
            f"{', '.join(named)} than when this run was started, and it has not failed since; resume with the function "
            "(and what it uses in its file) as it was, or use --force to go on with the new one"
        )
    files = sources.changed(output_dir) if sources else {}
    others = {function: paths for function, paths in files.items() if not _labels(sources, [function]) & failed}
    if others:
        raise ValueError(
            f"{_in_words(others)}, which is not what it was when this run was started; put it back as it was, or use "
            "--force to continue with what is there now"
        )


def record_sources(run_log: RunLog, rewards: Sequence[dict[str, Any]], sources: Sources | None = None) -> None:
    """Write them into the run's folder; what a resumed run did with other ones becomes an event."""
    former = read_rewards(run_log.output_dir)
    changed = {reward["name"] for reward in _changed(former, rewards)}
    files = sources.changed(run_log.output_dir) if sources else {}
    failed = _failed(run_log.output_dir)
    mended = [name for name in (changed | _labels(sources, files)) if name in failed]
    if mended:
        run_log.event("reward_mended", functions=sorted(mended), unshown={"former": former})
    others = [_without_hashes(reward) for reward in former] != [_without_hashes(reward) for reward in rewards]
    if former and (others or not changed <= set(mended)):
        run_log.event("rewards_changed", former=former)
    unmended = {function: paths for function, paths in files.items() if not _labels(sources, [function]) & failed}
    if unmended:
        run_log.event("sources_changed", files=unmended)
    write_file(run_log.output_dir / FILE, json.dumps(rewards, indent=1) + "\n")
    if sources:
        sources.record(run_log.output_dir)


def _labels(sources: Sources | None, functions: Iterable[str]) -> set[str]:
    """The rewards that fail when one of these functions fails."""
    each = [sources.rewards_of(function) for function in functions] if sources else []
    return {label for labels in each for label in labels if label}


def _in_words(files: Mapping[str, Sequence[str]]) -> str:
    """Name each file after the function that uses it.

    >>> _in_words({"agent.py:play": ["/home/me/rules.json"]})
    'agent.py:play uses /home/me/rules.json'
    """
    return "; ".join(f"{function} uses {', '.join(paths)}" for function, paths in files.items())


def _changed(former: Sequence[dict[str, Any]], rewards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finds those of `rewards` with another hash than in `former`."""
    then = {reward["name"]: reward for reward in former}
    changed = []
    for reward in rewards:
        if before := then.get(reward["name"]):
            changed += [reward] if before.get("code_sha256") != reward["code_sha256"] else []
    return changed


def _failed(output_dir: Path) -> set[str]:
    """The functions that have failed in this run, and were not changed since."""
    failed: set[str] = set()
    for event in read_events(output_dir):
        if event["event"] == "reward_error":
            failed.add(event["function"])
        elif event["event"] == "reward_mended":
            failed.difference_update(event["functions"])
        elif event["event"] == "rewards_changed":
            failed.clear()
    return failed


def _without_hashes(reward: dict[str, Any]) -> dict[str, Any]:
    of_older_versions = ("chat", "columns")
    return {key: value for key, value in reward.items() if not key.endswith("sha256") and key not in of_older_versions}


def read_rewards(output_dir: Path) -> list[dict[str, Any]]:
    """Raises ValueError for a damaged file."""
    path = output_dir / FILE
    rewards = read_json(path, list) if path.exists() else []
    with expecting(path, "record of rewards"):
        return [{"name": reward["name"], "sha256": reward["sha256"]} | reward for reward in rewards]
