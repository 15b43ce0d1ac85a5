"""Where a step of decoding goes: kinds of work that add up to it, and what a perfect kernel would take for each.

    python -m benchmarks.profile                                        # `make profile`: tens of minutes on two cores
    python -m benchmarks.profile --rows 8 --group_size 8 --policies smollm2 --dtypes bfloat16 --json groups.json

    products    states by weights: layers, experts, LM head
    attention   queries by cached keys and values
    cache       masks and places of cached tokens, and writing them
    norms       norms and rotations
    gates       what else the trunk computes: activations, residuals, choices of experts, embeddings
    sampling    noise, choice, log-probabilities
    rows        what the decoding loop notes of its rows
    python      the remainder, while no operator runs: Python, and what torch does before an operator

Torch's profiler times the operators, and each belongs to the innermost of the ranges that are put around calls here. A
step is timed without them too, and what profiling costs is taken off `python`.
Bytes are what the calls of a kind are given and give back, once each; activations and residuals need none of their own,
since a perfect product makes them of its result. A perfect kernel takes the longer of bytes by the bandwidth and
operations by the speed of products, both as this machine shows them in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import SMOLLM2
from grpo.run.hardware import describe
from policies import presets
from policies.conversion.dense import convert_dense
from policies.decoding import absorbed, latent_cache, linear
from policies.policy import Policy
from review.readers.machine import caption
from rewards.data.word_problems import word_problems
from rollout.backends.hf import RowCache
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.postprocess import Postprocess
from rollout.decoding.shard import Decoding
from rollout.group import Prompt
from rollout.sampling import SamplingParams

KINDS = "products", "attention", "cache", "norms", "gates", "sampling", "rows", "python"
PREFIX, STEP = "kind: ", "kind: rows"
PROMPT_TOKENS, REPEATS = 128, 5  # repeats of a measurement of the machine, of which the best counts


def places_of(trunk: Any) -> list[tuple[Any, str, str]]:
    """Gives the functions that get ranges: who has them, their names, and their kinds."""
    places: list[tuple[Any, str, str]] = [
        *((F, name, "products") for name in ("linear", "grouped_mm")),
        *((owner, name, "products") for owner, name in ((torch, "einsum"), (linear, "_product"))),
        *((owner, "attend", "attention") for owner in (latent_cache.LatentCache, RowCache)),
        (latent_cache, "attention", "attention"),
        (latent_cache.LatentCache, "plan", "cache"),
        *((owner, name, "norms") for owner, name in ((F, "rms_norm"), (absorbed, "rotate"))),
        (absorbed.RotaryTable, "__call__", "norms"),
        (type(trunk), "__call__", "gates"),
        (Batch, "noise", "sampling"),
        (Postprocess, "choose", "sampling"),
        (Postprocess, "note", "rows"),
    ]
    if isinstance(trunk, absorbed.AbsorbedTrunk):
        return places
    kinds = {type(module) for module in trunk.decoder.modules()}
    places += [(kind, "forward", "norms") for kind in kinds if kind.__name__.endswith(("Norm", "RotaryEmbedding"))]
    return [*places, (sys.modules[type(trunk.decoder).__module__], "apply_rotary_pos_emb", "norms")]


def need(name: str, args: Any, result: Any) -> tuple[int, int]:
    """Counts bytes and operations of a call: those of products and attention, and of others one a number."""
    if name == "attend":  # the rest of which is counted apart
        written = args[3].nbytes if isinstance(args[0], latent_cache.LatentCache) else 0
        return 2 * written, 0
    given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (args, result))
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
    if name in ("linear", "_product", "einsum", "grouped_mm"):
        x, weight = given[:2]
        if name == "grouped_mm":  # at most one expert of each row is read
            size -= max(len(weight) - len(x), 0) * weight[0].numel() * weight.element_size()
        return size, 2 * made[0].numel() * x.shape[-1]
    if name == "attention":
        query, cached, mask = given
        widths = query.shape[-1] + made[0].shape[-1]
        return size - mask.numel() * mask.element_size(), 2 * query[..., 0].numel() * cached.shape[1] * widths
    return size, sum(tensor.numel() for tensor in given)


@contextmanager
def ranges(trunk: Any, counts: Sequence[Counter[str]] | None = None) -> Iterator[None]:
    """Puts a range of the profiler around every call of `places_of`, or adds what it needs to `counts`."""

    def around(function: Any, name: str, kind: str) -> Any:
        @wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if counts is None:
                with record_function(PREFIX + kind):
                    return function(*args, **options)
            result = function(*args, **options)
            for counter, number in zip(counts, need(name, args, result), strict=True):
                counter["cache" if name == "attend" else kind] += number
            return result

        return call

    with ExitStack() as stack:
        for owner, name, kind in places_of(trunk):
            stack.enter_context(patch.object(owner, name, around(getattr(owner, name), name, kind)))
        yield


@contextmanager
def steps(before: Callable[[], Any] = nullcontext) -> Iterator[list[float]]:
    """Gives the seconds of every round of decoding, each of which runs inside of `before()`."""
    decode_round, seconds = Decoding.decode_round, list[float]()

    def timed(decoding: Decoding) -> None:
        began = time.perf_counter()
        with before():
            decode_round(decoding)
        seconds.append(time.perf_counter() - began)

    with patch.object(Decoding, "decode_round", timed):
        yield seconds


def parts_of(event: Any, kind: str = "rows") -> Counter[str]:
    """Milliseconds of each kind in a range of the profiler and in all that it contains, each counted once."""
    is_range = event.name.startswith(PREFIX)
    kind = event.name.removeprefix(PREFIX) if is_range else kind
    if event.name == "aten::index_copy_" and kind == "attention":
        kind = "cache"
    parts = Counter({"python" if is_range else kind: event.self_cpu_time_total / 1e3})
    for child in event.cpu_children:
        parts.update(parts_of(child, kind))
    return parts


def profiled(engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, machine: dict[str, Any]) -> dict:
    """A step of decoding by its kinds. Of all steps the fastest counts, since other work only adds to one."""
    with steps() as seconds:
        engine.sample(prompts, params)  # what is made once, such as primitives of oneDNN, is not timed
        seconds.clear()
        engine.sample(prompts, params)
    plain = 1e3 * min(seconds)
    profiler = profile(activities=[ProfilerActivity.CPU])
    with ranges(engine.trunk), steps(lambda: record_function(STEP)), profiler:
        engine.sample(prompts, params)
    ranges_of_steps = [event for event in profiler.events() if event.name == STEP and event.cpu_parent is None]
    fastest = min(ranges_of_steps, key=lambda event: event.cpu_time_total)
    took, parts = fastest.cpu_time_total / 1e3, parts_of(fastest)  # by one clock
    parts["python"] -= took - plain
    counts: tuple[Counter[str], ...] = Counter(), Counter()
    with ranges(engine.trunk, counts), steps(lambda: nullcontext([counter.clear() for counter in counts])):
        engine.sample(prompts, params)  # the last step stays counted
    result: dict[str, Any] = {"ms": plain, "profiled_ms": took, "perfect_ms": 0.0}
    for kind in KINDS:
        moved, operations = (counter[kind] if kind != "rows" else 0 for counter in counts)
        perfect = max(moved / machine["gb_s"], operations / machine["gflops"][str(engine.dtype)]) / 1e6
        result[kind] = {"ms": parts[kind], "share": parts[kind] / plain, "bytes": moved, "operations": operations}
        result[kind]["perfect_ms"] = perfect
        result["perfect_ms"] += perfect
    return result


def machine_of(dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    """Measures this machine: GB/s of a copy, read and written, and GFLOP/s of a product of square matrices."""

    def least(work: Callable[..., Any], *args: Any) -> float:
        return min(timeit.repeat(lambda: work(*args), number=1, repeat=REPEATS))

    source, side, products = torch.ones(1 << 26), 2048, {}
    for dtype in dtypes:
        x = torch.randn(side, side).to(dtype)
        products[str(dtype)] = 2 * side**3 / least(linear.FixedLinear(x), x) / 1e9
    return {"gb_s": 2 * source.nbytes / least(torch.empty_like(source).copy_, source) / 1e9, "gflops": products}


def policy_of(name: str, form: str, args: argparse.Namespace) -> Policy:
    """SmolLM2-135M, or random weights in its shape, dense or in the exact MLA form of the same; or the demo's."""
    corpus = [f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], count=200)]
    if name == "demo":
        return presets.build("tiny", corpus)
    if (args.dense / "config.json").is_file():
        policy = Policy.load(args.dense)
    else:
        torch.manual_seed(0)
        trunk = LlamaForCausalLM(LlamaConfig(**SMOLLM2, bos_token_id=None, eos_token_id=0)).eval()
        policy = Policy(trunk, None, presets.small_tokenizer(corpus))
    return policy if form == "dense" else Policy(convert_dense(policy.trunk), None, policy.tokenizer)


def show(profile: dict[str, Any]) -> None:
    print("{policy}, {form}, {dtype}, {batch} rows: {ms:.2f} ms, perfect {perfect_ms:.2f}".format(**profile))
    for what, scale in (("share", 1), ("ms", 1), ("perfect_ms", 1), ("bytes", 1e6), ("operations", 1e9)):
        unit = {1e6: "MB", 1e9: "GFLOP"}.get(scale, what)
        print(f"  {unit:11}" + "".join(f"{profile[kind][what] / scale:11.3f}" for kind in KINDS), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=("smollm2", "demo"), default=("smollm2", "demo"))
    parser.add_argument("--dense", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float32"), default=("bfloat16", "float32"))
    parser.add_argument("--rows", nargs="+", type=int, default=(1, 8, 32))
    parser.add_argument("--group_size", type=int, default=1, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="of each completion")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/profile.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    report: dict[str, Any] = {"environment": describe(), "machine": machine_of(dtypes), "profiles": []}
    print(f"{caption(report['environment'])}\n{report['machine']}\n{'':13}" + "".join(f"{kind:>11}" for kind in KINDS))
    forms = [(name, form) for name in args.policies for form in (("dense", "MLA") if name == "smollm2" else ("MLA",))]
    for (name, form), dtype in ((form, dtype) for form in forms for dtype in dtypes):
        engine = Engine(policy_of(name, form, args).cast(dtype), dtype)
        vocabulary, chance = len(engine.trunk.embedding), random.Random(0)
        for rows in args.rows:
            group = min(args.group_size, rows)
            ids = [[chance.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(rows // group)]
            prompts = [Prompt(f"p/{number}", "", tokens) for number, tokens in enumerate(ids)]
            params = SamplingParams(group, max_completion_tokens=args.tokens)
            found = {"policy": name, "form": form, "dtype": str(dtype).removeprefix("torch."), "batch": rows}
            report["profiles"].append(found | profiled(engine, prompts, params, report["machine"]))
            show(report["profiles"][-1])
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.json}")


if __name__ == "__main__":
    main()
