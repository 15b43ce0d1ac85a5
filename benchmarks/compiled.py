"""Graphs against eager rounds, with few rows (`compile: on`). Each pair takes turns, so that both see the same machine.

    quartet train examples/01_demo.yaml --output_dir runs/demo
    python benchmarks/compiled.py runs/demo/policy --json benchmarks/results/compiled.json

Held-out word problems are continued at T = 1. For each number of rows and drafts: tokens per second without and with
graphs, medians, and the calls whose tokens differ, which are none; how long each graph took to compile and to load.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # else `rollout` would be a file here

import torch  # noqa: E402

from grpo.run.hardware import describe  # noqa: E402
from policies.policy import Policy  # noqa: E402
from rewards.data.examples import load_examples  # noqa: E402
from rollout.compiled import rounds, store  # noqa: E402
from rollout.compiled.graph import Bucket  # noqa: E402
from rollout.cost_table import Workload  # noqa: E402
from rollout.decoding.engine import Engine  # noqa: E402
from rollout.group import Prompt  # noqa: E402
from rollout.sampling import SamplingParams  # noqa: E402


def timed(engine: Engine, prompts: list[Prompt], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the tokens."""
    began = time.perf_counter()
    ids = [c.token_ids for group in engine.sample(prompts, params) for c in group.completions]
    return sum(map(len, ids)) / (time.perf_counter() - began), ids


def prompts_of(policy: Policy, count: int) -> list[Prompt]:
    problems = load_examples("word_problems", "held_out", purpose="eval", limit=count)
    texts = [f"{problem.columns['question']}\n" for problem in problems]
    return [Prompt(str(i), text, policy.tokenizer.encode(text)) for i, text in enumerate(texts)]


def drafts_of(word: str) -> int | None:
    """A number of drafts, or None for what the controller chooses.

    >>> drafts_of("controller"), drafts_of("3")
    (None, 3)
    """
    return None if word == "controller" else int(word)


def compare(
    engine: Engine, prompts: list[Prompt], rows: int, numbers: list[int | None], repeats: int, tokens: int
) -> list[dict[str, Any]]:
    """`rows` completions of as many prompts at a time, with all numbers of drafts, eagerly and by graphs in turn; the
    first call of each is the warm-up. `gain` is the median of pairs over no drafts, both by graphs."""
    stops = tuple(engine.policy.stop_token_ids)
    if None in numbers:
        engine.measure_costs(Workload(rows, tokens, graphs=tokens))
    ways = [(drafts, compiled) for drafts in numbers for compiled in (False, True)]
    rates: dict[tuple[int | None, bool], list[float]] = {way: [] for way in ways}
    differing = dict.fromkeys(numbers, 0)
    for number in range(repeats + 1):
        part, found = [prompts[(number * rows + i) % len(prompts)] for i in range(rows)], {}
        for drafts, compiled in ways[number % len(ways) :] + ways[: number % len(ways)]:
            params = SamplingParams(1, 1.0, tokens, stops, step=number, draft_tokens=drafts, compiled=compiled)
            rate, found[drafts, compiled] = timed(engine, part, params)
            if number:
                rates[drafts, compiled].append(rate)
        for drafts in numbers:
            differing[drafts] += found[drafts, False] != found[drafts, True]
    results = []
    for drafts in numbers:
        one = {name: statistics.median(rates[drafts, name == "compiled"]) for name in ("eager", "compiled")}
        pairs = zip(rates[drafts, True], rates.get((0, True), []), strict=False)
        gain = statistics.median([ours / none for ours, none in pairs] or [float("nan")])
        results.append(
            {"rows": rows, "drafts": drafts, **one, "gain": gain, "differing": differing[drafts], "repeats": repeats}
        )
    return results


def shown(drafts: int | None) -> str:
    return "the controller" if drafts is None else f"{drafts} drafts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--drafts", type=drafts_of, nargs="+", default=[0, 3, None], help="numbers, or `controller`")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--cached", action="store_true", help="take graphs that are there, and time no compilation")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    policy = Policy.load(str(options.policy))
    engine, prompts = Engine(policy), prompts_of(policy, 64)
    compiled: dict[str, dict[str, float]] = {}
    find = store.find

    def timed_find(decoder: Any, bucket: Bucket, given: Any, compiling: Any) -> Any:
        began = time.perf_counter()
        graph = find(decoder, bucket, given, compiling)
        cold = time.perf_counter() - began
        began = time.perf_counter()
        find(decoder, bucket, given, compiling)
        compiled[str(asdict(bucket))] = {"first_s": cold, "from_disk_s": time.perf_counter() - began}
        return graph

    with tempfile.TemporaryDirectory() as folder:
        if not options.cached:
            store.FOLDER = Path(folder)
        rounds.find = timed_find
        engine.graphs = [rounds.Graphs()]
        found = []
        for rows in options.rows:
            for one in compare(engine, prompts, rows, options.drafts, options.repeats, options.tokens):
                found.append(one)
                print(
                    f"{rows} rows, {shown(one['drafts'])}: eager {one['eager']:.0f}, compiled {one['compiled']:.0f} "
                    f"tokens/s, {one['compiled'] / one['eager']:.2f} times; {one['differing']} calls differ",
                    flush=True,
                )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for bucket, seconds in compiled.items():
        print(f"{bucket}: {seconds['first_s']:.1f} s at first, {seconds['from_disk_s']:.2f} s from disk")
    for one in found:
        if one["drafts"] != 0 and 0 in options.drafts:
            print(f"{one['rows']} rows, both compiled: {shown(one['drafts'])} {one['gain']:.2f} times none")
    if options.json:
        result = {**describe(), "rates": found, "graphs": compiled, "peak_mib": memory}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
