"""128 routed experts over eight processes, whole (`expert`) or each split in eight (`tensor`), against one process.

    python -m benchmarks.expert_shards --json benchmarks/results/expert_shards.json

The policy has the width and depth of `policy.py`'s mixture of experts. Every layout makes the same GRPO steps on the
same rows, in gloo processes of one thread on this machine. For each: how much of the experts a rank holds, its memory,
how far the first step's log-probabilities and gradient are from those of one process, and seconds a step. The
processes share this machine's cores, so the seconds tell what sharding costs here and not what it gains on eight
devices.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import DeepseekV3Config

from benchmarks.memory import groups_of, resident, start
from benchmarks.policy import COMMON, MLA, MOE
from benchmarks.pretraining import build
from grpo.config.learner import LearnerOptions, MTPOptions, ParallelOptions
from grpo.learner.learner import Learner
from grpo.learner.parallel import join
from grpo.run.hardware import describe
from policies.policy import Policy
from policies.presets import small_tokenizer

SHARDS, EXPERTS, ROW, ROWS = 8, 128, 128, 8
LAYOUTS = {
    "one process": {},
    "16 experts a rank": {"fsdp": SHARDS, "expert": SHARDS},
    "every expert in eight": {"tensor": SHARDS},
}
COMPARED = ("mismatch/logprob_abs_max", "learner/grad_norm")


def write_policy(folder: Path) -> None:
    experts = {"n_routed_experts": EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": 32}
    shape = COMMON | MLA | MOE | experts | {"first_k_dense_replace": 0, "vocab_size": 40_960, "eos_token_id": 0}
    build(DeepseekV3Config(**shape), small_tokenizer(["3 + 4 = 7\n"]), 0).save(folder)


def local_bytes(tensor: torch.Tensor) -> int:
    """Of the part that this rank holds."""
    part = getattr(tensor, "to_local", lambda: tensor)()
    return part.numel() * part.element_size()


def measure(source: str, layout: dict[str, int], steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    ranks = join(True, ParallelOptions(**layout))
    if ranks.size > 1:
        ranks.sum_tensors(torch.zeros(1))  # so that gloo's buffers are not counted
    begin = resident()
    policy = Policy.load(source, layout=ranks.layout)
    learner = Learner(policy, LearnerOptions(tokens_per_micro_batch=ROW), MTPOptions(loss_weight=0), ranks=ranks)
    experts = sum(local_bytes(tensor) for name, tensor in policy.named_parameters() if ".experts." in name)
    seconds, first = [], {}
    for step in range(1, steps + 1):
        began = time.perf_counter()
        metrics = learner.step(learner.prepare(*groups_of(ROWS, ROW)), step)
        seconds.append(time.perf_counter() - began)
        first = first or {name: metrics[name] for name in COMPARED}
    found = {"expert_mib": experts / 2**20, "held_mib": resident() - begin}
    return found | {"seconds": median(seconds[1:] or seconds), "first_step": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="the first one is the warm-up")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], json.loads(args.measure[1]), args.steps)))
        return
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_policy(Path(folder))
        for name, layout in LAYOUTS.items():
            words = ["benchmarks.expert_shards", "--measure", folder, json.dumps(layout), "--steps", str(args.steps)]
            ranks = start(words, SHARDS if layout else 1)
            alone = found.get("one process", ranks[0])["first_step"]
            found[name] = ranks[0] | {
                "expert_mib": [round(rank["expert_mib"], 2) for rank in ranks],
                "held_mib": [round(rank["held_mib"]) for rank in ranks],
                "seconds": max(rank["seconds"] for rank in ranks),
                "apart": max(abs(ranks[0]["first_step"][key] / alone[key] - 1) for key in COMPARED if alone[key]),
            }
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    if args.json:
        record = {"environment": describe(), "experts": EXPERTS, "tokens": ROW * ROWS, "layouts": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
