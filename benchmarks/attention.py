"""A decoding step of many rows: how much of it is attention, and how near that is to its bytes and its operations.

    python benchmarks/attention.py --json benchmarks/results/attention.json           # make smollm2 first

Every row has `--context` tokens of its own. Measured, in turn: the whole step with its logits; its matrix products
alone; its attention alone, in the layers' own caches. The bytes are the latents', read once; what reading them costs is
measured by adding them up. The operations are those of every head with every cached vector; what they would cost at
the rate of the products is the other floor, where rows are many enough for products not to wait for their weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from pretraining import shown  # noqa: E402

from grpo.run.hardware import describe  # noqa: E402
from policies.allocator import keep_freed_memory  # noqa: E402
from policies.decoding.absorbed import AbsorbedTrunk  # noqa: E402
from policies.policy import Policy  # noqa: E402


@torch.inference_mode()
def measure(trunk: AbsorbedTrunk, rows: int, context: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a step and of its parts, medians of runs in turn."""
    cache = trunk.cache(rows, context + 16)
    for latents in cache.layers_RTE:
        latents.normal_()
    cache.advance(context)
    block, layers, width = trunk.blocks[0], len(trunk.blocks), cache.layers_RTE[0].shape[2]
    key = block.rope + (block.rank if block.nope else 0)
    query, new = torch.randn(rows, 1, block.heads, key), torch.randn(rows, 1, width)
    token, position = torch.ones(rows, 1, dtype=torch.long), cache.lengths_R[:, None]
    linears = [getattr(b, name) for b in trunk.blocks for name in ("into", "out", "dense_gate_up", "dense_down")]
    inputs = {linear.in_features: torch.zeros(rows, linear.in_features) for linear in linears}
    last = torch.zeros(rows, trunk.head.shape[1])

    def step() -> None:
        trunk.logits(trunk(token, position, cache)[:, 0])

    def products() -> None:
        for linear in linears:
            linear(inputs[linear.in_features])
        trunk.logits(last)

    def attention() -> None:
        cache.plan(1)
        for layer in range(layers):
            cache.attend(layer, query, new)

    def read() -> None:
        for latents in cache.layers_RTE:
            latents[:, : context + 1].sum()

    parts: dict[str, Callable[[], None]] = {
        "step": step,
        "attention": attention,
        "products": products,  # whose weights drive the cache out of the processor's own
        "reading": read,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, run in parts.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    found: dict[str, float] = {name: 1e3 * median(values[1:]) for name, values in seconds.items()}
    weights = sum(linear.weight.numel() for linear in linears) + trunk.head.numel()
    operations = 2 * rows * (context + 1) * block.heads * (key + block.rank) * layers
    rate = 2 * rows * weights / found["products"]  # operations a millisecond
    return found | {
        "operations": operations / rate,
        "cache_mib": 4 * rows * (context + 1) * width * layers / 2**20,
        "share_of_products": found["products"] / found["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-mla"))
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--context", type=int, default=160, help="at most 1,000")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if not (args.model / "config.json").exists():
        parser.error(f"there is no {args.model}; `make smollm2` prepares it")
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()  # as the engine does
    trunk = AbsorbedTrunk(Policy.load(args.model, torch.float32).trunk, torch.float32, 1024)
    found: dict[int, dict[str, Any]] = {}
    names = ("step", "products", "attention", "reading", "operations")
    lines: list[list[object]] = [["rows", *names, "products of the step"]]
    for rows in args.rows:
        found[rows] = measure(trunk, rows, args.context, args.repeats)
        lines.append([rows, *(f"{found[rows][n]:.1f}" for n in names), f"{found[rows]['share_of_products']:.2f}"])
    print(f"float32, {args.context} tokens a row, milliseconds; reading and operations are floors of attention")
    print(shown(lines))
    if args.json:
        record = {"environment": describe(), "context": args.context, "rows": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
