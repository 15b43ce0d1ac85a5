"""Whole rollouts of a GRPO step with drafts and without, for every choice of sources: seconds and what was accepted.

The prompts are those of a run's last recorded step, sampled again with the run's final policy, options and other noise.
`history` is what the record has of them, so it is one epoch old. `--first` samples with the policy before GRPO and
without a history, as the first epoch does. Drafts change no token, so seconds compare; choices take turns. Shown too:
of the trunk's forwards, what share decodes how many rows.

    python benchmarks/whole_rollouts.py runs/NAME --json out.json          # a run of quartet train; a quiet machine
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from pretraining import shown  # noqa: E402

from grpo.config.options import load  # noqa: E402
from grpo.config.run import TrainConfig  # noqa: E402
from grpo.policy_source import find_policy, load_found  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.run.records import read_rollouts, recorded_steps  # noqa: E402
from rollout.engine import Engine  # noqa: E402
from rollout.group import Completion, Prompt, RolloutGroup, shards, tokens_per_forward  # noqa: E402
from rollout.sampling import DraftSource, SamplingParams  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32)  # bounds of numbers of rows
NAMES = ("drafted", "accepted")


def choices(head: bool, history: bool) -> dict[str, tuple[DraftSource, ...]]:
    """Sources by name; "none" drafts nothing."""
    found: dict[str, tuple[DraftSource, ...]] = {"none": (), "siblings": ("siblings",)}
    if history:
        found |= {"history": ("history",), "siblings, history": ("siblings", "history")}
    return found | ({"head": ("head",), "all": ("head", *list(found.values())[-1])} if head else {})


def recorded(folder: Path, tokenizer: Any, history: bool) -> list[Prompt]:
    """The prompts of the last step, with what it got for them."""
    got: dict[str, list[list[int]]] = {}
    texts: dict[str, str] = {}
    for row in read_rollouts(folder, recorded_steps(folder)[-1]):
        got.setdefault(row["prompt_id"], []).append(row["token_ids"])
        texts[row["prompt_id"]] = row["prompt"]
    ids = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
    return [Prompt(name, "", ids[name], history=of if history else []) for name, of in got.items()]


def live_rows(sharded: Sequence[Sequence[RolloutGroup]]) -> dict[str, float]:
    """Of all forwards, the share that decodes at most so many rows; a completion is in the first forwards of its shard.

    >>> live_rows([[group]])  # four completions of 2, 2, 4 and 10 forwards
    {"1": 0.6, "2": 0.2, "4": 0.2, "8": 0.0, "16": 0.0, "32": 0.0, "more": 0.0}
    """
    counts: Counter[str] = Counter()
    for groups in sharded:
        forwards = [c.draft.target_forwards for group in groups for c in group.completions]
        for number in range(max(forwards)):
            rows = sum(count > number for count in forwards)
            counts[next((str(bound) for bound in ROWS if rows <= bound), "more")] += 1
    return {name: counts[name] / counts.total() for name in (*map(str, ROWS), "more")}


def accepted(completions: Sequence[Completion], source: str) -> list[float]:
    """Acceptance by depth of one source's drafts."""

    def of(completion: Completion, name: str) -> list[int]:
        draft = completion.draft
        if source != "head":
            return draft.sources.get(source, {}).get(name, [])
        others = [counts[name] for counts in draft.sources.values()]
        return [whole - sum(other[d] for other in others) for d, whole in enumerate(getattr(draft, name))]

    made, taken = ([sum(at) for at in zip(*filter(None, (of(c, n) for c in completions)), strict=True)] for n in NAMES)
    return [t / m for t, m in zip(taken, made, strict=True) if m]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--first", action="store_true", help="the policy before GRPO, and no history")
    parser.add_argument("--only", nargs="+", help="names of choices, beside none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = load(TrainConfig, args.run / "config.yaml", {}, [])
    policy = load_found(find_policy(config.model if args.first else str(args.run)), config)
    dtype = getattr(torch, config.dtype)
    engine = Engine(policy.to(dtype), dtype)
    prompts = recorded(args.run, policy.tokenizer, not args.first)
    given = config.rollout
    parts = shards(prompts, given.prompts_per_shard)
    engine.measure_costs(given.prompts_per_shard * given.group_size, lookups=True)
    params = SamplingParams(
        given.group_size, given.temperature, given.max_completion_tokens, tuple(policy.stop_token_ids), seed=config.seed
    )
    wanted = choices(policy.mtp is not None, not args.first)
    wanted = {name: sources for name, sources in wanted.items() if not args.only or name in {"none", *args.only}}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    sampled: dict[str, list[list[RolloutGroup]]] = {name: [] for name in wanted}
    for repeat in range(args.repeats):
        turn = repeat % len(wanted)
        for name, sources in [*wanted.items()][turn:] + [*wanted.items()][:turn]:
            drafts = {"draft_sources": sources, "draft_tokens": None} if sources else {"draft_tokens": 0}
            at = replace(params, step=1_000_000 + repeat, **drafts)
            began = time.perf_counter()
            found = [engine.sample(part, at) for part in parts]
            seconds[name].append(time.perf_counter() - began)
            sampled[name] += found
            print(f"{name}, {repeat + 1}: {seconds[name][-1]:.1f} s", flush=True)
    texts = {
        name: [[c.token_ids for g in groups for c in g.completions] for groups in s] for name, s in sampled.items()
    }
    lines: list[list[object]] = [["drafts", "seconds", "gain", "tokens a forward", "accepted by depth, of each source"]]
    record: dict[str, dict[str, Any]] = {}
    for name, sources in wanted.items():
        completions = [c for groups in sampled[name] for group in groups for c in group.completions]
        record[name] = {
            "seconds": seconds[name],
            "gain": median(a / b for a, b in zip(seconds["none"], seconds[name], strict=True)),
            "same_tokens": texts[name] == texts["none"],
            "tokens_per_forward": tokens_per_forward(completions),
            "acceptance": {source: accepted(completions, source) for source in sources},
            "forwards_by_rows": live_rows(sampled[name]),
        }
        shares = "; ".join(f"{s} " + " ".join(f"{x:.2f}" for x in a) for s, a in record[name]["acceptance"].items())
        one = record[name]
        lines.append(
            [name, f"{median(seconds[name]):.1f}", f"{one['gain']:.2f}", f"{one['tokens_per_forward']:.2f}", shares]
        )
    print(shown(lines))
    lengths = [len(ids) for groups in texts["none"] for ids in groups]
    print(f"{len(prompts)} prompts x {given.group_size}, {sum(lengths) / len(lengths):.0f} tokens each")
    print(
        "forwards by rows, none: " + " ".join(f"<={n} {s:.2f}" for n, s in record["none"]["forwards_by_rows"].items())
    )
    if args.json:
        costs = asdict(engine.costs) if engine.costs else None
        whole = {"environment": describe(), "first": args.first, "dtype": config.dtype, "tokens": sum(lengths)}
        args.json.write_text(json.dumps(whole | {"choices": record, "costs": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
