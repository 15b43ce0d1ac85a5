"""Do the alarms name hacked rewards, and leave honest runs alone? Seven short runs of examples/01_demo.yaml's policy.

Four runs are scored by the mistaken rewards of tests/cases/hacked_rewards.py, and three (seeds 0, 1, 2) by gsm8k, as
the demo is. All start from one warm start. A run that ended is not run again, one that was stopped is resumed.

    python benchmarks/alarms.py --json alarms.json
    python benchmarks/alarms.py --only length
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

from grpo.algorithm.alarms import Alarms, Watched  # noqa: E402
from grpo.config.options import load  # noqa: E402
from grpo.config.run import SftConfig, TrainConfig  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.run.records import read_events, read_rollouts, recorded_steps  # noqa: E402
from grpo.sft import sft  # noqa: E402
from grpo.task import Task  # noqa: E402
from grpo.train import train  # noqa: E402

DEMO = HERE.parent / "examples/01_demo.yaml"
HACKED = HERE.parent / "tests/cases/hacked_rewards.py"
RUNS: dict[str, tuple[str, int]] = {  # the reward and the seed of each run
    "length": (f"{HACKED}:effort", 0),
    "repetition": (f"{HACKED}:wrong_sign", 0),
    "format": (f"{HACKED}:well_formed", 0),
    "copied": (f"{HACKED}:wrong_column", 0),
    "honest_0": ("gsm8k", 0),
    "honest_1": ("gsm8k", 1),
    "honest_2": ("gsm8k", 2),
}
OPTIONS: dict[str, Any] = {
    "steps": 20,
    "eval.every": 10,
    "eval.limit": 64,
    "log.measure_speed": False,
    "log.trackers": [],
    "log.table_every": 1000,
    "checkpoint.every": 10,
    "checkpoint.keep": 1,
}


def options_of(folder: Path, name: str) -> TrainConfig:
    reward, seed = RUNS[name]
    own = {"model": str(folder / "warm/policy"), "warm_start.steps": 0, "output_dir": str(folder / name)}
    return load(TrainConfig, DEMO, OPTIONS | own | {"seed": seed, "rewards": [{"function": reward}]})


def looked_at(root: Path, name: str) -> dict[str, Any]:
    """The alarms of a run by its records alone, and the largest values that it had."""
    folder = root / name
    with Task.of(options_of(root, name)) as task:
        answers = {example.example_id: example.columns["answer"] for example in task.train}
    first = next(iter(read_rollouts(folder, 1)[0]["parts"]))
    alarms, found, largest = Alarms([first]), [], Counter[str]()
    for step in recorded_steps(folder):
        groups: dict[tuple[str, int], list[Watched]] = {}
        for line in read_rollouts(folder, step):
            answer, text, ids = answers[line["prompt_id"]], line["text"], line["token_ids"]
            seen = Watched.of(line["prompt_id"], line["prompt"], answer, text, ids, line["parts"])
            groups.setdefault((line["prompt_id"], line["draw"]), []).append(seen)
        for alarm in alarms.observe(list(groups.values())):
            found.append({"step": step, "kind": alarm.kind, "value": round(alarm.value, 3), "said": alarm.said})
        for name, value in alarms.values.items():
            kind = name.split("/")[1]
            largest[kind] = max(largest[kind], round(abs(value) if kind == "length" else value, 3))
    events = [event for event in read_events(folder) if event["event"] == "alarm"]
    live = [{"step": event["step"], "kind": event["kind"]} for event in events]
    return {"steps": len(recorded_steps(folder)), "alarms": found, "alarms_in_the_run": live, "largest": dict(largest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/alarms"))
    parser.add_argument("--only", choices=["warm", *RUNS], action="append", help="make these runs alone")
    parser.add_argument("--records", action="store_true", help="make no run, look at the records that there are")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    given = OPTIONS | {"output_dir": str(args.folder / "warm"), "eval.limit": 0, "eval.every": None}
    warm = load(TrainConfig, DEMO, given)
    chosen = args.only or list(RUNS)
    if not args.records:
        sft(SftConfig(**{name: getattr(warm, name) for name in SftConfig.model_fields}), resume="auto")
        for name in chosen:
            if name in RUNS:
                train(options_of(args.folder, name), resume="auto")
    found = {n: looked_at(args.folder, n) for n in chosen if n in RUNS and recorded_steps(args.folder / n)}
    for name, result in found.items():
        print(name, result["steps"], "steps:", [(a["step"], a["said"]) for a in result["alarms"]] or "no alarm")
        print(" ", result["largest"])
    if args.json:
        record = {"environment": describe(), "options": OPTIONS, "runs": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
