"""Measure the figures of benchmarks/RESULTS.md again, one after another; each writes its JSON in benchmarks/results.

    make figures                          # all of them, in some four hours of a quiet machine
    make figures ARGS="rollouts demo"     # only these

The demo is trained in runs/figures, and a run that was stopped is resumed.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SEEDS = range(5)
COMMANDS = {  # the words after `python`
    "peers": "-m benchmarks.peers",
    "rollouts": "benchmarks/rollout.py --dtype bfloat16 --vllm .vllm/bin/python --rows 1,8,32 --tokens 64 --repeats 5 "
    "--only vllm --only 'ours graphs' --json benchmarks/results/rollout_vllm.json",
    "learner": "benchmarks/learner.py --dtype bfloat16 --steps 1 --contenders trl ours_dense ours_dense_small "
    "--json benchmarks/results/learner_bf16.json",
    "learning": "-m benchmarks.learn --tasks words spelling",
}


def measure(words: str) -> None:
    subprocess.run([sys.executable, "-u", *shlex.split(words)], cwd=ROOT, check=True)


def measure_demo() -> None:
    """Train the demo and its controls with each seed, and gather what the controls write."""
    from grpo.cli.parse import main as quartet

    seeds = {}
    for seed in SEEDS:
        folder = ROOT / f"runs/figures/demo-{seed}"
        train = ["train", "examples/01_demo.yaml", "--seed", str(seed), "--output_dir", str(folder), "--resume", "auto"]
        for command in (train, ["control", str(folder)]):
            if code := quartet(command):
                raise SystemExit(code)
        seeds[str(seed)] = json.loads((folder / "control/control.json").read_text())
    report = {"command": "make figures ARGS=demo", "seeds": seeds}
    (RESULTS / "demo.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    names = [*COMMANDS, "demo"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which figures: {', '.join(names)}; default: all")
    asked = parser.parse_args().names or names
    if unknown := sorted(set(asked) - set(names)):
        parser.error(f"no such figures: {', '.join(unknown)}; there are {', '.join(names)}")
    for name in asked:
        print(f"measuring {name}", flush=True)
        measure_demo() if name == "demo" else measure(COMMANDS[name])


if __name__ == "__main__":
    main()
