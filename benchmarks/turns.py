"""What is the cache between turns worth? Steps of a run whose agent talks for eight turns, with it and without it.

Runs of `quartet train` come in pairs, one that keeps no conversation and one that keeps as many as always, in turn
first. The agent answers each of the policy's answers with TOLD words, as a tool does, and asks for at most ANSWER
tokens. Seconds are those of whole steps (`time/step`) and of their rollouts (`time/rollout`), the mean after the first
step. A ratio is that of a pair, without the cache / with it. The machine must be quiet.

    python benchmarks/turns.py --json benchmarks/results/turns.json     # the preset `tiny`, whose context is 512 tokens
    python benchmarks/turns.py --model models/smollm2-135m-mla --pairs 3
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TURNS, ANSWER, TOLD = 8, 24, 16
TIMES = ("time/step", "time/rollout")
RUN: dict[str, Any] = {
    "data.name": "word_problems",
    "data.task_options.levels": "[1, 2]",
    "agent": f"{Path(__file__).resolve()}:talk",
    "steps": 6,
    "prompts_per_step": 4,
    "sft.steps": 0,
    "rollout.group_size": 4,
    "rollout.max_completion_tokens": ANSWER,
    "learner.learning_rate": 1e-6,
    "rewards": "[]",
    "eval.limit": 0,
    "log.trackers": "[]",
    "checkpoint.every": 1000,
}


def talk(base_url: str, api_key: str, prompt: str) -> float:
    """The agent: eight turns of one conversation. Its processes load this file, so that what else it needs is
    imported where it is used."""
    import urllib.request

    text = prompt
    for turn in range(TURNS):
        body = json.dumps({"model": "any", "prompt": text, "max_tokens": ANSWER}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
        with urllib.request.urlopen(urllib.request.Request(f"{base_url}/completions", body, headers)) as answer:
            text += json.loads(answer.read())["choices"][0]["text"]
        text += "\n" + f" {turn}" * TOLD + "\n"
    return float(len(text) % 7)


def run(model: str, folder: Path, options: list[str], kept: str) -> dict[str, float]:
    """The mean seconds of the steps after the first, and how many tokens of a step came from the cache."""
    words = [word for key, value in (RUN | {"model": model}).items() for word in (f"--{key}", str(value))]
    start = f"from grpo.endpoint import agent_sampler; {kept}from grpo.cli.parse import main; raise SystemExit(main())"
    command = [sys.executable, "-c", start, "train", *words, *options, "--output_dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "time/step" in step][1:]
    names = (*TIMES, "agent/cached_tokens", "tools/tokens", "tools/calls_mean")
    return {name: fmean(step.get(name, 0.0) for step in steps) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args()  # the others are options of the runs
    pairs: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.pairs):
            ways = {"with": "", "without": "agent_sampler.CACHE_TOKENS = 0; "}
            order = sorted(ways, reverse=number % 2 == 1)
            made = {way: run(arguments.model, Path(folder, f"{way}_{number}"), options, ways[way]) for way in order}
            pairs.append(made)
            ratios = [f"{name} {made['without'][name] / made['with'][name]:.2f}" for name in TIMES]
            print(f"pair {number + 1}: {', '.join(ratios)}", flush=True)
    found = {name: sorted(pair["without"][name] / pair["with"][name] for pair in pairs) for name in TIMES}
    for name, values in found.items():
        without, kept = (median(pair[way][name] for pair in pairs) for way in ("without", "with"))
        spread = f"{values[0]:.2f} to {values[-1]:.2f}"
        print(f"{name}: {without:.2f} s without, {kept:.2f} s with; ratio {median(values):.2f} ({spread})")
    print(f"tokens from the cache in a step: {fmean(pair['with']['agent/cached_tokens'] for pair in pairs):,.0f}")
    if arguments.json:
        sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here
        from grpo.run.hardware import describe

        content = {"command": sys.argv, "hardware": describe(), "model": arguments.model, "pairs": pairs}
        arguments.json.write_text(json.dumps(content | {"ratios": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
