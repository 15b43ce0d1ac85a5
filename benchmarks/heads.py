"""What dynamic heads cost and bring: a third of 12 heads for each token, against all of them.

For every seed two models learn the same text of word problems by the same steps, the routers balanced by their bias.
Then held-out perplexity, FLOPs and milliseconds of a decoding step at short and long contexts, and the heads' loads.

    python benchmarks/heads.py --json benchmarks/results/heads.json         # 15 minutes on two quiet cores
    python benchmarks/heads.py --quick                                      # does it run? (figures mean nothing)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from decoding import decoder_of, measure  # noqa: E402
from policy import BATCH, COMMON, FFN, LEARNING_RATE, LENGTH, MLA, VOCABULARY  # noqa: E402
from pretraining import (  # noqa: E402
    Run,
    Text,
    activation_rates,
    build,
    load_text,
    perplexity,
    shown,
    tokens_per_second,
    train,
)
from seeds import half_interval  # noqa: E402
from transformers import DeepseekV3Config  # noqa: E402

from grpo.config.learner import BalanceOptions  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from policies.policy import Policy  # noqa: E402

HEADS, ACTIVE, SHARED = 12, 0.33, 1
POINTS = [(1, 256), (8, 256), (1, 4096), (8, 4096)]


def models(text: Text, seed: int, steps: int) -> dict[str, Run]:
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": 8192}
    common = COMMON | MLA | sizes | {"vocab_size": len(text.tokenizer), "intermediate_size": FFN, "eos_token_id": 0}
    found = {name: Run(build(DeepseekV3Config(**common), text.tokenizer, seed), steps) for name in ("all", "some")}
    found["some"].policy.choose_heads(ACTIVE, SHARED, seed)
    found["some"].balance = BalanceOptions(bias_rate=0.003)
    return found


def loads(policy: Policy, text: Text) -> dict[str, float]:
    """The heads' least and largest load on held-out text, relative to the even share, mean over layers."""
    rates_LR = activation_rates(policy, text.heldout[:256], part="self_attn")
    load_LR = rates_LR / rates_LR.mean(1, keepdim=True)
    return {"load_min": load_LR.amin(1).mean().item(), "load_max": load_LR.amax(1).mean().item()}


def of_seed(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    text = load_text(None, VOCABULARY, LENGTH, seed, 300 if options.quick else 12_000)
    runs = models(text, seed, options.steps)
    train(runs, text, BATCH, LEARNING_RATE, lambda line: print(f"seed {seed}: {line}", flush=True))
    heldout = text.heldout[: 4 if options.quick else 512]
    found: dict[str, Any] = {
        name: {
            "perplexity": perplexity(run.policy, heldout),
            "training_tokens_per_second": tokens_per_second(run, BATCH * LENGTH),
        }
        for name, run in runs.items()
    }
    if seed == options.seeds[0]:
        decoders = {name: decoder_of(run.policy, torch.float32, 8192) for name, run in runs.items()}
        points = POINTS[:1] if options.quick else POINTS
        for name, decoded in measure(decoders, points, steps=3 if options.quick else 20).items():
            found[name]["decode"] = decoded
    found["some"]["loads"] = loads(runs["some"].policy, text)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="2 steps on little text: only whether it runs")
    options = parser.parse_args()
    options.steps = 2 if options.quick else options.steps
    by_seed = {seed: of_seed(seed, options) for seed in options.seeds}
    changes = [found["some"]["perplexity"] / found["all"]["perplexity"] - 1 for found in by_seed.values()]
    half = half_interval(changes)
    record = {"environment": describe(), "steps": options.steps, "tokens_per_step": BATCH * LENGTH}
    record |= {"heads": HEADS, "active": round(ACTIVE * HEADS), "shared": SHARED, "seeds": by_seed}
    record["perplexity_change"] = {"mean": fmean(changes), "half_of_its_interval": half}
    first = by_seed[options.seeds[0]]
    lines = []
    for one, some in zip(first["all"]["decode"], first["some"]["decode"], strict=True):
        numbers = (one["flops_per_token"], some["flops_per_token"], one["ms"], some["ms"], one["ms"] / some["ms"])
        lines.append([f"{one['rows']} rows, context {one['context']}", *numbers])
    print(shown([["a decoding step", "FLOPs, all", "FLOPs, some", "ms, all", "ms, some", "faster"], *lines]))
    print(f"held-out perplexity, some against all: {100 * fmean(changes):+.2f} % +- {100 * half:.2f}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
