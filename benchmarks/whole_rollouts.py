"""Whole rollouts of a GRPO step with drafts and without, for every choice of sources: seconds and what was accepted.

The prompts are those of a run's last recorded step, sampled again with the run's final policy, options and other noise.
`history` is what the record has of them, so it is one epoch old. `--first` samples with the policy before GRPO and
without a history, as the first epoch does. All choices are sampled side by side, a second of one and then a second of
the next, so that a slow moment of the machine is one for all. Drafts change no token, so seconds compare; in bfloat16
near ties may fall otherwise, and the record says where tokens differ. Shown too: what share of the trunk's forwards
decodes how many rows, and the gain there.

    python benchmarks/whole_rollouts.py runs/NAME --json out.json          # a run of quartet train; a quiet machine
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
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
from rollout.depth import Workload  # noqa: E402
from rollout.engine import Engine  # noqa: E402
from rollout.group import (  # noqa: E402
    Completion,
    DraftStats,
    Prompt,
    RolloutGroup,
    draft_gain,
    head_accepted,
    shards,
    tokens_per_forward,
)
from rollout.sampling import DraftSource, SamplingParams  # noqa: E402
from rollout.shard import Decoding  # noqa: E402

ROWS = (1, 2, 4, 8, 16, 32, 64)  # bounds of numbers of rows
TURN = 1.0  # seconds
NAMES = ("drafted", "accepted")


def choices(head: bool, history: bool) -> dict[str, tuple[DraftSource, ...]]:
    """Sources by name; "none" drafts nothing."""
    found: dict[str, tuple[DraftSource, ...]] = {"none": (), "siblings": ("siblings",)}
    if history:
        found |= {"history": ("history",), "siblings, history": ("siblings", "history")}
    return found | ({"head": ("head",), "all": ("head", *list(found.values())[-1])} if head else {})


def recorded(rows: Sequence[dict[str, Any]], tokenizer: Any, history: bool) -> list[Prompt]:
    """The prompts of the last step, with what it got for them."""
    got: dict[str, list[list[int]]] = {}
    texts: dict[str, str] = {}
    for row in rows:
        got.setdefault(row["prompt_id"], []).append(row["token_ids"])
        texts[row["prompt_id"]] = row["prompt"]
    ids = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
    return [Prompt(name, "", ids[name], history=of if history else []) for name, of in got.items()]


def accepted_before(rows: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """What the next step of the run would expect of the head's drafts."""
    return head_accepted(Completion([], [], "", "stop", 0, draft=DraftStats(**row["draft"])) for row in rows)


@dataclass
class Rounds:
    """How many there were, and their seconds and tokens."""

    count: int = 0
    seconds: float = 0.0
    tokens: int = 0


class Rollouts:
    """What one choice of sources samples, and how long it takes."""

    def __init__(self, params: SamplingParams) -> None:
        self.params, self.seconds = params, list[float]()
        self.groups: list[list[RolloutGroup]] = []  # of each shard
        self.by_rows = {name: Rounds() for name in (*map(str, ROWS), "more")}

    def rounds(self, engine: Engine, parts: Sequence[Sequence[Prompt]], step: int) -> Iterator[None]:
        """The rollouts of a step, one round at a time. Prefills are rounds too, but count in `seconds` alone."""
        params, spent = replace(self.params, step=step), 0.0
        for part in parts:
            began = time.perf_counter()
            decoding = Decoding(engine.decoder, part, params)
            spent += time.perf_counter() - began
            yield
            while not decoding.done:
                bound = next((str(bound) for bound in ROWS if decoding.alive <= bound), "more")
                had, began = int(decoding.results.counts.sum()), time.perf_counter()
                decoding.forward()
                past, at = time.perf_counter() - began, self.by_rows[bound]
                at.count, at.seconds, spent = at.count + 1, at.seconds + past, spent + past
                at.tokens += int(decoding.results.counts.sum()) - had
                yield
            began = time.perf_counter()
            self.groups.append(decoding.groups())
            spent += time.perf_counter() - began
        self.seconds.append(spent)

    @property
    def token_ids(self) -> list[list[int]]:
        return [completion.token_ids for groups in self.groups for group in groups for completion in group.completions]

    def shares(self) -> dict[str, float]:
        """Of all rounds, by how many rows they decode at most."""
        whole = sum(at.count for at in self.by_rows.values())
        return {name: at.count / whole for name, at in self.by_rows.items()}

    def speeds(self) -> dict[str, float]:
        """Tokens a second, by how many rows are decoded at most; 0 where there was no such round."""
        return {name: at.tokens / at.seconds if at.seconds else 0.0 for name, at in self.by_rows.items()}


def in_turns(under_way: dict[str, Iterator[None]]) -> None:
    """Run all to their ends, each for `TURN` seconds at a time."""
    while under_way:
        for name, rounds in [*under_way.items()]:
            until = time.perf_counter() + TURN
            while time.perf_counter() < until:
                if next(rounds, under_way) is under_way:  # the end
                    del under_way[name]
                    break


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
    last = read_rollouts(args.run, recorded_steps(args.run)[-1])
    prompts = recorded(last, policy.tokenizer, not args.first)
    given = config.rollout
    parts = shards(prompts, given.prompts_per_shard)
    params = SamplingParams(
        given.group_size, given.temperature, given.max_completion_tokens, tuple(policy.stop_token_ids), seed=config.seed
    )
    params = replace(params, head_accepted=() if args.first else accepted_before(last))
    looks_up = replace(params, draft_sources=("head", "siblings"))
    engine.measure_costs(Workload.of(looks_up, given.prompts_per_shard * given.group_size))
    wanted = choices(policy.mtp is not None, not args.first)
    wanted = {name: sources for name, sources in wanted.items() if not args.only or name in {"none", *args.only}}
    sampled: dict[str, Rollouts] = {}
    for name, sources in wanted.items():
        drafts = {"draft_sources": sources, "draft_tokens": None} if sources else {"draft_tokens": 0}
        sampled[name] = Rollouts(replace(params, **drafts))
    with torch.inference_mode():
        for repeat in range(args.repeats):
            turn, names = repeat % len(wanted), [*wanted]
            in_turns(
                {name: sampled[name].rounds(engine, parts, 1_000_000 + repeat) for name in names[turn:] + names[:turn]}
            )
            print(", ".join(f"{name} {one.seconds[-1]:.1f} s" for name, one in sampled.items()), flush=True)
    heading = ["drafts", "seconds", "gain", "by costs", "tokens a forward", "accepted by depth, of each source"]
    lines: list[list[object]] = [heading]
    record: dict[str, dict[str, Any]] = {}
    none = sampled["none"]
    for name, one in sampled.items():
        completions = [c for groups in one.groups for group in groups for c in group.completions]
        acceptance = {source: accepted(completions, source) for source in wanted[name]}
        record[name] = {
            "seconds": one.seconds,
            "gain": median(a / b for a, b in zip(none.seconds, one.seconds, strict=True)),
            "gain_by_costs": draft_gain(completions),  # None with a fixed number of drafts: of none
            "tokens": sum(map(len, one.token_ids)),
            "same_tokens": one.token_ids == none.token_ids,
            "tokens_per_forward": tokens_per_forward(completions),
            "acceptance": acceptance,
            "forwards_by_rows": one.shares(),
            "tokens_a_second_by_rows": one.speeds(),
        }
        shares = "; ".join(f"{s} " + " ".join(f"{x:.2f}" for x in a) for s, a in acceptance.items())
        gains = [record[name]["gain"], record[name]["gain_by_costs"] or 1.0, record[name]["tokens_per_forward"]]
        lines.append([name, f"{median(one.seconds):.1f}", *(f"{gain:.2f}" for gain in gains), shares])
    print(shown(lines))
    lengths = [len(ids) for ids in none.token_ids]
    print(f"{len(prompts)} prompts x {given.group_size}, {sum(lengths) / len(lengths):.0f} tokens each")
    by_rows: list[list[object]] = [["rows", "share of forwards", "of the time", *(f"gain: {name}" for name in sampled)]]
    for bound, at in none.by_rows.items():
        gains = [one.speeds()[bound] / none.speeds()[bound] if at.tokens else 0.0 for one in sampled.values()]
        of_time = at.seconds / sum(none.seconds)
        by_rows.append([bound, f"{none.shares()[bound]:.2f}", f"{of_time:.2f}", *(f"{gain:.2f}" for gain in gains)])
    print(shown(by_rows))
    if args.json:
        costs = asdict(engine.costs) if engine.costs else None
        whole = {"environment": describe(), "first": args.first, "dtype": config.dtype}
        args.json.write_text(json.dumps(whole | {"choices": record, "costs": costs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
