"""How many GSM8K completions a second does scoring take, isolation on? The aim: 5,000 on two cores.

The completions are the gold solutions of GSM8K's training set and the same with their last digit changed, eight a
prompt, as a step of training hands them over; the time is that of `Scorer.score`, with its processes running already.
Without isolation (in this process, no time limit) is measured beside it, in turn, so that its price shows.

    python benchmarks/scoring.py --json scoring.json
    python benchmarks/scoring.py --reward math_equivalence --prompts 200
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from grpo.cli.commands.reward_probes import misprint
from grpo.data.examples import Example, load_examples
from grpo.run.hardware import describe
from rewards import RewardSpec, Scorer

AIM = 5_000
GROUP_SIZE = 8


def completions(example: Example) -> list[str]:
    """Half of the group is right, half is wrong."""
    return [example.solution, misprint(example.solution) or ""] * (GROUP_SIZE // 2)


def score(scorer: Scorer, examples: Sequence[Example]) -> float:
    """Seconds for one call. Raises ValueError where a score is wrong: a fast grader must be a right one."""
    groups = [completions(example) for example in examples]
    started = time.perf_counter()
    scores = scorer.score(
        [example.question for example in examples],
        groups,
        [example.columns for example in examples],
        prompt_ids=[example.example_id for example in examples],
    )
    seconds = time.perf_counter() - started
    for example, group in zip(examples, scores, strict=True):
        if group.rewards != [1.0, 0.0] * (GROUP_SIZE // 2):
            raise ValueError(f"{example.example_id}: the scores are {group.rewards}")
    return seconds


def measure(reward: str, examples: Sequence[Example], workers: int, repeats: int) -> dict[str, Any]:
    """Completions a second: every repeat, and the median. The two ways take turns."""
    spec = RewardSpec(reward)
    rates: dict[str, list[float]] = {"isolated": [], "in this process": []}
    with Scorer([spec], workers=workers) as isolated, Scorer([spec], isolated=False) as here:
        scorers = {"isolated": isolated, "in this process": here}
        for scorer in scorers.values():
            score(scorer, examples)  # starts the processes, and loads what the reward needs
        for _ in range(repeats):
            for name, scorer in scorers.items():
                rates[name].append(GROUP_SIZE * len(examples) / score(scorer, examples))
    return {name: {"completions_per_second": values, "median": median(values)} for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--data", default="gsm8k", help="gsm8k (default), or a folder with its train.jsonl")
    parser.add_argument("--reward", default="gsm8k", help="a built-in reward or path/to/file.py:function (gsm8k)")
    parser.add_argument("--prompts", type=int, default=1_000, help=f"groups of {GROUP_SIZE} in one call (1000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that score (2)")
    parser.add_argument("--repeats", type=int, default=9, help="calls that are timed, each way (9)")
    arguments = parser.parse_args()
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    environment = describe()
    print(json.dumps(environment, indent=1))
    examples = load_examples(arguments.data, "train", limit=arguments.prompts)
    results = measure(arguments.reward, examples, arguments.workers, arguments.repeats)
    print(f"{arguments.reward}, {len(examples)} prompts x {GROUP_SIZE}, {arguments.workers} workers, completions/s:")
    for name, result in results.items():
        rates = result["completions_per_second"]
        print(f"  {name:16} median {result['median']:10,.0f}   {min(rates):,.0f} to {max(rates):,.0f}")
    reached = results["isolated"]["median"] >= AIM
    print(f"aim: {AIM:,} a second, isolated: {'reached' if reached else 'not reached'}")
    if arguments.json:
        settings = {"reward": arguments.reward, "prompts": len(examples), "group_size": GROUP_SIZE}
        settings |= {"workers": arguments.workers, "aim": AIM}
        record = {"environment": environment, "settings": settings, "results": results, "reached": reached}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
