"""What a step costs where rows that begin alike are read as trees, beside rows that share a group's prompt alone.

    python benchmarks/trees.py --json out.json

Groups of four episodes of eight turns, after one system prompt of 400 tokens and a question of 40. Every turn samples
60 tokens and reads 40 of a tool. The first four turns of a group's episodes are the same, and then they fork.

    forks       an episode is one sample: all turns follow each other
    segments    every turn is a sample after a prompt of its own, which shows the last 30 tokens of former turns alone,
                as templates do that drop thoughts

Both forms take the same steps by turns, in one process. Seconds are those of the CPU that the step took, of one thread,
so that other work beside it matters little. TRL's `TreeRow` (trl/experimental/async_grpo/packing.py) is read by
FlashAttention on a GPU, so it is asked for its tokens alone, under the same budget.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.pop(0)  # its own folder, which has a module called kernels: transformers looks for the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grpo.config.run import TrainConfig
from grpo.learner import tree
from grpo.learner.batch import TrainingBatch
from grpo.learner.build import make
from grpo.learner.learner import Learner
from grpo.learner.prepare import tokens_in_loss
from grpo.learner.row import PackedRow, Sample
from grpo.run.hardware import command, describe
from policies.policy import Policy
from policies.presets import PRESETS, build
from rewards.config.options import load

SYSTEM, QUESTION, SAID, SHOWN, TOOL = 400, 40, 60, 30, 40  # tokens
TURNS, COMMON, FORKS = 8, 4, 4


def episodes(kind: str, groups: int, vocabulary: int) -> list[PackedRow]:
    rng = random.Random(0)
    ids = lambda count: [rng.randrange(2, vocabulary) for _ in range(count)]  # noqa: E731
    system, rows = ids(SYSTEM), []
    for group in range(groups):
        prompt, common = system + ids(QUESTION), [(ids(SAID), ids(TOOL)) for _ in range(COMMON)]
        by_prompt: dict[tuple[int, ...], list[Sample]] = {}
        for fork in range(FORKS):
            turns = [*common, *((ids(SAID), ids(TOOL)) for _ in range(TURNS - COMMON))]
            index, advantage = group * FORKS + fork, rng.uniform(-1, 1)
            if kind == "forks":
                whole = [token for said, tool in turns for token in said + tool]
                sampled = [own for _ in turns for own in [True] * SAID + [False] * TOOL]
                by_prompt.setdefault(tuple(prompt), []).append(Sample(index, whole, [], advantage, sampled=sampled))
                continue
            read = prompt
            for turn, (said, tool) in enumerate(turns):
                sample = Sample(index, said, [], advantage, start=turn * SAID)
                by_prompt.setdefault(tuple(read), []).append(sample)
                read = read + said[-SHOWN:] + tool
        rows += [PackedRow(list(of), samples, group=group) for of, samples in by_prompt.items()]
    return [replace(row, samples=[_scored(sample) for sample in row.samples]) for row in rows]


def _scored(sample: Sample) -> Sample:
    return replace(sample, sampling_logprobs=[-6.0] * len(sample.token_ids))


def tokens_of_trl(rows: Sequence[PackedRow], most: int) -> int:
    from trl.experimental.async_grpo.packing import TreeRow

    trees: list[Any] = []
    for row in rows:
        for sample in row.samples:
            ids = torch.tensor(row.prompt_token_ids + sample.token_ids)
            mask = torch.tensor(
                [False] * len(row.prompt_token_ids) + (sample.sampled or [True] * len(sample.token_ids))
            )
            asked = {"input_ids": ids, "completion_mask": mask, "group_id": row.group}
            fitting = [one for one in trees if one.fits(asked, most)]
            chosen = next((one for one in fitting if row.group in one.groups), fitting[0] if fitting else TreeRow())
            trees += [] if chosen in trees else [chosen]
            chosen.add(asked)
    return sum(len(one.tokens) for one in trees)


def learner_of(policy: Policy, most: int) -> Learner:
    options = {"model": "tiny", "learner.tokens_per_micro_batch": most, "output_dir": "unused"}
    return make(policy, load(TrainConfig, None, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=["forks", "segments"], default=["forks", "segments"])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens_per_micro_batch", type=int, default=8192)
    parser.add_argument("--small", action="store_true", help="two layers of width 48 in place of the tiny preset")
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = {"hidden_size": 48, "intermediate_size": 96, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    PRESETS["long"] = PRESETS["tiny"] | {"max_position_embeddings": 4096} | (small if arguments.small else {})
    policy = build("long", ["one two three\n"])
    learner, worth = learner_of(policy, arguments.tokens_per_micro_batch), tree.SHARED
    report: dict[str, Any] = {"command": command(sys.argv), "environment": describe()}
    for kind in arguments.kinds:
        rows = episodes(kind, arguments.groups, len(policy.lm_head))
        batch = TrainingBatch(rows, torch.zeros(0), arguments.groups * FORKS, tokens_in_loss(rows), step=1)
        seconds: dict[str, list[float]] = {"rows": [], "trees": []}
        tokens = {"trl": tokens_of_trl(rows, arguments.tokens_per_micro_batch)}
        for pair in range(arguments.pairs):
            for form in ("rows", "trees") if pair % 2 else ("trees", "rows"):
                tree.SHARED = worth if form == "trees" else 1 << 40
                began = time.process_time()
                learner.forward_backward(batch)
                seconds[form].append(time.process_time() - began)
                tokens[form] = sum(int((mini.segment >= 0).sum()) for mini in learner.waiting[0].minis)
                learner._drop()
        ratio = median(ours / rows for ours, rows in zip(seconds["trees"], seconds["rows"], strict=True))
        report[kind] = {"tokens": tokens, "cpu_seconds": seconds, "ratio": ratio}
        print(f"{kind}: tokens {tokens}, CPU seconds of a step {seconds}, trees / rows {ratio:.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
