"""runs/NAME/rewards.json: which reward functions scored the run, with path and SHA-256 of users' files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo.run_log import RunLog

FILE = "rewards.json"


def refuse_changed_rewards(output_dir: Path, rewards: Sequence[dict[str, Any]]) -> None:
    """A resumed run scores with the same code. Raises ValueError naming the files that hold other code now.

    `rewards` is what `Scorer.describe` gives: [{"function": "mine.py:grade", "sha256": "9f2c...", ...}].
    """
    former = {reward["name"]: reward["sha256"] for reward in read_rewards(output_dir)}
    changed = [r["path"] for r in rewards if r["name"] in former and former[r["name"]] != r["sha256"]]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} holds another reward function than when this run was started; resume with the "
            "file as it was, or use --force to go on with the new one"
        )


def record_rewards(run_log: RunLog, rewards: Sequence[dict[str, Any]]) -> None:
    """Write them into the run's folder; what a resumed run had before, if it is something else, becomes an event."""
    former = read_rewards(run_log.output_dir)
    if former and former != rewards:
        run_log.event("rewards_changed", former=former)
    path = run_log.output_dir / FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rewards, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_rewards(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
