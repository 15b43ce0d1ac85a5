"""runs/NAME/rewards.json: which reward functions scored the run, with the hashes of users' files and functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.run.log import RunLog
from grpo.run.records import read_events
from policies.files.atomic import write_file
from rewards.config.json_file import expecting, read_json

FILE = "rewards.json"


def refuse_changed_rewards(output_dir: Path, rewards: Sequence[dict[str, Any]]) -> None:
    """A resumed run scores with the same functions, except for one that has failed and was mended.

    `rewards` is what `Scorer.describe` gives: [{"name": "grade", "path": "mine.py", "code_sha256": "9f2c...", ...}].
    Raises ValueError naming the other functions that have changed.
    """
    failed = _failed(output_dir)
    changed = [reward for reward in _changed(read_rewards(output_dir), rewards) if reward["name"] not in failed]
    if changed:
        named = [f"{r['path']} holds another reward function {r['function'].rpartition(':')[2]!r}" for r in changed]
        raise ValueError(
            f"{', '.join(named)} than when this run was started, and it has not failed since; resume with the function "
            "(and what it uses in its file) as it was, or use --force to go on with the new one"
        )


def record_rewards(run_log: RunLog, rewards: Sequence[dict[str, Any]]) -> None:
    """Write them into the run's folder; a function that a resumed run scored with otherwise becomes an event."""
    former = read_rewards(run_log.output_dir)
    changed = [reward["name"] for reward in _changed(former, rewards)]
    failed = _failed(run_log.output_dir)
    if mended := [name for name in changed if name in failed]:
        run_log.event("reward_mended", functions=mended, unshown={"former": former})
    others = [_without_hashes(reward) for reward in former] != [_without_hashes(reward) for reward in rewards]
    if former and (others or len(mended) < len(changed)):
        run_log.event("rewards_changed", former=former)
    write_file(run_log.output_dir / FILE, json.dumps(rewards, indent=1) + "\n")


def _changed(former: Sequence[dict[str, Any]], rewards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finds those of `rewards` with another hash than in `former`; a run of an older version has the file's alone."""
    then = {reward["name"]: reward for reward in former}
    changed = []
    for reward in rewards:
        if before := then.get(reward["name"]):
            key = "code_sha256" if "code_sha256" in before else "sha256"
            changed += [reward] if before[key] != reward[key] else []
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
    return {key: value for key, value in reward.items() if not key.endswith("sha256")}


def read_rewards(output_dir: Path) -> list[dict[str, Any]]:
    """Raises ValueError for a damaged file."""
    path = output_dir / FILE
    rewards = read_json(path, list) if path.exists() else []
    with expecting(path, "record of rewards"):
        return [{"name": reward["name"], "sha256": reward["sha256"]} | reward for reward in rewards]
