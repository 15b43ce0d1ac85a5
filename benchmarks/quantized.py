"""What a sampler with matrices in 8 or 4 bits costs and saves: speed of decoding, a publication, memory.

The kinds take turns in one run, so that a slow moment of the machine is one for all of them. There are no drafts.
Of a kind the least whole time and the least time of the prompt count, since other work only adds to them.

    python benchmarks/quantized.py models/smollm2-135m-mla                    # some minutes on two cores
    python benchmarks/quantized.py tiny --dtype float32 --rows 1 4 --json quantized.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != HERE]  # `rollout` is the package

import torch  # noqa: E402

from grpo.config.policy import ModelOptions  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from grpo.source.policy_source import load_policy  # noqa: E402
from policies.decoding.linear import FixedLinear  # noqa: E402
from rewards.data.word_problems import word_problems  # noqa: E402
from rollout.decoding.engine import Engine  # noqa: E402
from rollout.group import Prompt  # noqa: E402
from rollout.sampling import Copies, SamplingParams  # noqa: E402

KINDS = "none", "int8", "int4"
CONTEXT, TOKENS = 96, 8  # of the prompt, and decoded in a measurement


def bytes_of(engine: Engine) -> int:
    """Of what blocks and LM head decode with, stacked experts too; blocked matrices have the size of plain ones."""
    found: dict[int, int] = {}  # by address: the embedding may be the LM head too
    for block in (engine.trunk, *engine.trunk.blocks):
        for value in vars(block).values():
            for part in value if isinstance(value, list) else [value]:
                held = [part]
                if isinstance(part, FixedLinear):
                    held = [part.weight, *([part.packed.codes, part.packed.scales] if part.packed else [])]
                for tensor in held:
                    if isinstance(tensor, torch.Tensor):
                        found[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    return sum(found.values())


def measured(args: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    corpus = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=200)]
    policy = load_policy(ModelOptions(model=args.model, dtype=args.dtype, device="cpu", threads=args.threads), corpus)
    weights, engines, publications = policy.weights(), {}, {}
    for kind in KINDS:
        engines[kind] = Engine(policy, dtype, copies=Copies(kind, kind))
        started = time.perf_counter()
        engines[kind].sync_weights(weights, 1)
        publications[kind] = time.perf_counter() - started
    prompt = Prompt("p", "", [7 * i % policy.config.vocab_size for i in range(CONTEXT)])
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for _ in range(args.repeats):
        for rows in args.rows:
            for kind in KINDS:
                for tokens in (TOKENS, 1):
                    started = time.perf_counter()
                    engines[kind].sample([prompt], SamplingParams(rows, 1.0, tokens, draft_tokens=0))
                    seconds.setdefault((kind, rows, tokens), []).append(time.perf_counter() - started)
    step = {
        kind: {
            str(rows): 1e3 * (min(seconds[kind, rows, TOKENS]) - min(seconds[kind, rows, 1])) / (TOKENS - 1)
            for rows in args.rows
        }
        for kind in KINDS
    }
    return {
        "model": Path(args.model).name,
        "dtype": args.dtype,
        "ms_per_step": step,
        "publication_s": publications,
        "matrices_mib": {kind: bytes_of(engine) / 2**20 for kind, engine in engines.items()},
        "repeats": args.repeats,
        "environment": describe() | {"command": "python benchmarks/quantized.py"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset, a checkpoint folder or a hub id, of the DeepSeek-V3 form")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = measured(args)
    print(f"{args.model}, {args.dtype}: milliseconds of a step, and how many times faster than none")
    for rows in args.rows:
        plain = found["ms_per_step"]["none"][str(rows)]
        cells = (f"{k} {ms[str(rows)]:.1f} ({plain / ms[str(rows)]:.2f}x)" for k, ms in found["ms_per_step"].items())
        print(f"{rows:>4} rows  " + "   ".join(cells))
    for name in ("publication_s", "matrices_mib"):
        print(f"{name:<14} " + "   ".join(f"{kind} {value:.2f}" for kind, value in found[name].items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
