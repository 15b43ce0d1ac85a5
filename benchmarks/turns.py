"""What an episode of several turns costs with the latent cache kept, against reading it again at every turn.

The same episodes both ways: the engine's own, and one call of the engine for each turn, whose prompt is all that came
before. Counts are of tokens that the trunk computes; they depend on the lengths alone. Seconds need a quiet machine.

    python benchmarks/turns.py                      # half a minute on two cores: tiny preset, 8 turns of 32 + 24 tokens
    python benchmarks/turns.py --turns 16 --json turns.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # `rollout` is the package

import torch  # noqa: E402

import rollout.environments.episodes as episodes  # noqa: E402
from grpo.data.word_problems import word_problems  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from policies.presets import build  # noqa: E402
from rollout.engine import Engine  # noqa: E402
from rollout.environments.format import Call, Turn  # noqa: E402
from rollout.group import Prompt  # noqa: E402
from rollout.sampling import EnvironmentSpec, SamplingParams  # noqa: E402


class FixedTurns:
    """Every turn is a call, and every reply has the same number of tokens."""

    length = 24

    def __init__(self, tokenizer: Any, tools: Any, **_: Any) -> None:
        self.tool = tools[0].__name__

    def tools_prompt(self, messages: Any) -> list[int]:
        return [5 + i % 200 for i in range(64)]

    def read(self, token_ids: Any) -> Turn:
        return Turn("", (Call(self.tool, {"expression": "1"}),))

    def reply(self, results: Any) -> list[int]:
        return [9 + i % 200 for i in range(self.length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="episodes that are decoded together")
    parser.add_argument("--tokens", type=int, default=32, help="sampled in a turn on average")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    episodes.TurnFormat = FixedTurns  # type: ignore[misc, assignment]
    policy = build("tiny", [row["question"] for row in word_problems("train", [1], count=200)], 0)
    engine, counted = Engine(policy), [0]
    stops = tuple(range(7, len(engine.trunk.embedding), args.tokens))  # an untrained policy finds all tokens alike
    forward = type(engine.trunk).__call__

    def count(trunk: Any, ids: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        counted[0] += ids.numel()
        return forward(trunk, ids, positions, cache)

    type(engine.trunk).__call__ = count
    spec = EnvironmentSpec(environments=(("", "calculator"),), max_turns=args.turns)
    longest = min(args.turns * (4 * args.tokens + FixedTurns.length), policy.max_length - 64)
    params = SamplingParams(1, 1.0, longest, stops, environment=spec)
    prompts = [Prompt(f"p/{i}", "x", [5]) for i in range(args.rows)]
    kept, again = [], []
    groups = engine.sample(prompts, params)  # starts the tools
    for _ in range(args.repeats):
        counted[0], started = 0, time.perf_counter()
        engine.sample(prompts, params)
        kept.append((time.perf_counter() - started, counted[0]))
        counted[0], started = 0, time.perf_counter()
        _read_again(engine, groups)
        again.append((time.perf_counter() - started, counted[0]))
    engine.close()
    seconds = [median(s for s, _ in way) for way in (kept, again)]
    result = {
        "turns": sum(g.completions[0].num_turns for g in groups) / len(groups),
        "tokens": sum(len(g.completions[0].token_ids) for g in groups),
        "computed": {"kept": kept[0][1], "read_again": again[0][1], "ratio": again[0][1] / kept[0][1]},
        "seconds": {"kept": seconds[0], "read_again": seconds[1], "ratio": seconds[1] / seconds[0]},
        "environment": describe(),
    }
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def _read_again(engine: Engine, groups: Any) -> None:
    """Every turn as a prompt of its own, all rows together, with as many tokens as their turns had on average."""
    turns: list[list[tuple[list[int], int]]] = []
    for group in groups:
        [completion], own = group.completions, group.completions[0].sampled
        begins = [i for i in range(len(own)) if own[i] and (i == 0 or not own[i - 1])]
        ends = [next((i for i in range(b, len(own)) if not own[i]), len(own)) for b in begins]
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            if number == len(turns):
                turns.append([])
            turns[number].append((group.prompt.token_ids + completion.token_ids[:begin], end - begin))
    for turn in turns:
        prompts = [Prompt(f"q/{i}", "", ids) for i, (ids, _) in enumerate(turn)]
        room = engine.policy.max_length - max(len(ids) for ids, _ in turn)
        engine.sample(prompts, SamplingParams(1, 1.0, min(room, round(sum(n for _, n in turn) / len(turn))), ()))


if __name__ == "__main__":
    main()
