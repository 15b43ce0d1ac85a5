"""What dynamic heads cost and bring: a third of 12 heads for each token, against all of them.

`quality`: for every seed two models learn the same text of word problems by the same steps, the routers balanced by
their bias. Then held-out perplexity and the heads' loads. `decode`: FLOPs and milliseconds of a decoding step at short
and long contexts, and of the attention in it, of fresh models, once for every seed.

    python benchmarks/heads.py --part quality --json heads_quality.json    # 15 minutes
    python benchmarks/heads.py --part decode --json benchmarks/results/heads_decode.json    # quiet, a minute
    python benchmarks/heads.py --quick                                      # does it run? (figures mean nothing)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from decoding import UNKNOWN, Decoder, decoder_of, measure, plainly  # noqa: E402
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
from seeds import interval  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import DeepseekV3Config  # noqa: E402

from grpo.config.learner import BalanceOptions  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from policies.decoding.absorbed import AbsorbedBlock  # noqa: E402
from policies.decoding.latent_cache import LatentCache  # noqa: E402
from policies.policy import Policy  # noqa: E402

HEADS, ACTIVE, SHARED = 12, 0.33, 1
POINTS = [(1, 256), (8, 256), (1, 4096), (8, 4096)]
NUMBERS = ("flops_per_token", "ms", "attention_flops_per_token", "attention_ms")


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


@torch.inference_mode()
def attention_of(decoder: Decoder, rows: int, context: int, steps: int) -> dict[str, float]:
    """FLOPs per token and median milliseconds of what a step attends in all layers: scores and weighted sums over the
    cache, and where a router chooses heads its choice and the gathering, without the products before and after."""
    chooses = decoder.blocks[0].head_gate is not None
    owner, name = (AbsorbedBlock, "_attend_by_some") if chooses else (LatentCache, "attend")
    attend, seconds, flops = getattr(owner, name), list[float](), list[int]()

    def timed(*args: Any) -> torch.Tensor:
        started = time.perf_counter()
        found = attend(*args)
        seconds[-1] += time.perf_counter() - started
        return found

    def counted(*args: Any) -> torch.Tensor:
        with FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter, plainly:
            found = attend(*args)
        flops.append(counter.get_total_flops())
        return found

    tokens = torch.randint(2, len(decoder.head), (rows,))
    decoder.start(rows, context, steps + 4)
    with mock.patch.object(owner, name, timed):
        for _ in range(steps + 3):
            seconds.append(0.0)
            decoder.step(tokens)
    with mock.patch.object(owner, name, counted):
        decoder.step(tokens)
    return {"attention_ms": 1e3 * median(seconds[3:]), "attention_flops_per_token": sum(flops) / rows}


def decode_of(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    text = load_text(None, VOCABULARY, LENGTH, seed, 300 if options.quick else 12_000)
    decoders = {name: decoder_of(run.policy, torch.float32, 8192) for name, run in models(text, seed, 1).items()}
    points, steps = (POINTS[:1], 3) if options.quick else (POINTS, 20)
    found = measure(decoders, points, steps)
    for i, point in enumerate(points):
        rounds = [{name: attention_of(one, *point, steps) for name, one in decoders.items()} for _ in range(3)]
        for name in decoders:  # they take turns
            found[name][i] |= {number: median(each[name][number] for each in rounds) for number in rounds[0][name]}
    return found


def quality_of(seed: int, options: argparse.Namespace) -> dict[str, Any]:
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
    found["some"]["loads"] = loads(runs["some"].policy, text)
    return found


def shares(by_seed: dict[int, Any]) -> list[dict[str, Any]]:
    """At every point what the chosen heads take of what all take."""
    lines = []
    for i, point in enumerate(next(iter(by_seed.values()))["all"]):
        line: dict[str, Any] = {"rows": point["rows"], "context": point["context"]}
        for number in NUMBERS:
            line[number] = interval([one["some"][i][number] / one["all"][i][number] for one in by_seed.values()])
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--part", action="append", choices=["quality", "decode"], help="repeatable; both by default")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps (default: 400)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="2 steps on little text: only whether it runs")
    options = parser.parse_args()
    options.steps = 2 if options.quick else options.steps
    record: dict[str, Any] = {"environment": describe(), "heads": HEADS, "active": round(ACTIVE * HEADS)}
    record["shared"] = SHARED
    if "decode" in (options.part or ["decode"]):
        decoded = {seed: decode_of(seed, options) for seed in options.seeds}
        record["decode"] = {"seeds": decoded, "some_of_all": shares(decoded)}
        lines = [
            [f"{at['rows']} rows, context {at['context']}", *(at[number]["mean"] for number in NUMBERS)]
            for at in record["decode"]["some_of_all"]
        ]
        print(shown([["some of all", "FLOPs", "ms", "FLOPs, attention", "ms, attention"], *lines]))
    if "quality" in (options.part or ["quality"]):
        by_seed = {seed: quality_of(seed, options) for seed in options.seeds}
        changes = [found["some"]["perplexity"] / found["all"]["perplexity"] - 1 for found in by_seed.values()]
        change = interval(changes)
        record["quality"] = {"steps": options.steps, "tokens_per_step": BATCH * LENGTH, "seeds": by_seed}
        record["quality"]["perplexity_change"] = change
        half = change["half_of_its_interval"] or float("nan")
        print(f"held-out perplexity, some against all: {100 * change['mean']:+.2f} % +- {100 * half:.2f}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
