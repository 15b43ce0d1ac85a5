"""Multi-head attention against MLA with a latent of 128, at several budgets: how far apart is the perplexity?

Both have 16 heads of 24 and the same width, depth and feed-forward. MLA caches 144 numbers a token and layer, not 768.
The learning rate is tuned for each of them on a part of the held-out text that is not reported. Then each learns from
scratch for each budget and seed. The difference is fitted against the logarithm of the tokens, to say where it would be
the aim's 3.7 %. What has ended is not run again, so a benchmark that was stopped goes on. First decoding steps of
both are measured: what they read and compute.

    python benchmarks/equal_quality.py --json benchmarks/results/equal_quality.json    # built-in word problems
    python benchmarks/equal_quality.py --data ../gsm8k --json ...                      # GSM8K's training text
    python benchmarks/equal_quality.py --quick                                         # does it run?
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from decoding import decoder_of, measure  # noqa: E402
from policy import BATCH, COMMON, FFN, LENGTH, MLA, VOCABULARY  # noqa: E402
from pretraining import Run, build, load_text, perplexity, shown, train  # noqa: E402
from seeds import half_interval  # noqa: E402
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedTokenizerBase  # noqa: E402

from grpo.run.hardware import describe  # noqa: E402
from policies.anatomy import cache_numbers, count_parameters  # noqa: E402
from policies.files.atomic import write_file  # noqa: E402

HEADS, HEAD = 16, 24
MODELS = ("multi-head", "mla")
AIM = 3.7  # per cent
text_of = cache(load_text)


@dataclass(frozen=True)
class Job:
    model: str
    seed: int
    steps: int
    rate: float
    tunes: bool  # on the first half of the held-out text; what is reported comes from the second


def config_of(model: str, vocabulary: int) -> LlamaConfig | DeepseekV3Config:
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "vocab_size": vocabulary}
    common = COMMON | sizes | {"intermediate_size": FFN, "eos_token_id": 0}
    if model == "multi-head":
        return LlamaConfig(**common, head_dim=HEAD)
    latent = {"kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": HEAD, "v_head_dim": HEAD}
    return DeepseekV3Config(**common | MLA | latent)


def work(job: Job, data: Path | None, documents: int, folder: Path) -> dict[str, Any]:
    """What the job finds, or has found: each leaves a file."""
    parts = [data.name if data else "word_problems", str(documents), *(str(part) for part in asdict(job).values())]
    file = folder / f"{'_'.join(parts)}.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    text = text_of(data, VOCABULARY, LENGTH, job.seed, documents)
    run = Run(build(config_of(job.model, len(text.tokenizer)), text.tokenizer, job.seed), job.steps)
    train({job.model: run}, text, BATCH, job.rate, lambda line: None)
    half = len(text.heldout) // 2
    heldout = text.heldout[:half] if job.tunes else text.heldout[half:]
    policy = run.policy
    found = asdict(job) | {
        "perplexity": perplexity(policy, heldout),
        "seconds": sum(run.seconds),
        "parameters": count_parameters(policy.trunk, policy.config)[0],
        "cached_numbers": cache_numbers(policy.config) // policy.config.num_hidden_layers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, json.dumps(found))
    return found


def decoding_work(tokenizer: PreTrainedTokenizerBase, quick: bool) -> list[dict[str, float]]:
    """A decoding step of both, untrained: what MLA caches and reads for a token and what it computes, in per cent of
    multi-head attention, and milliseconds. The cache alone is 4 bytes a number, each read once for a token."""
    configs = {model: config_of(model, len(tokenizer)) for model in MODELS}
    decoders = {name: decoder_of(build(config, tokenizer, 0), torch.float32, 4096) for name, config in configs.items()}
    points = [(2, 32)] if quick else [(1, 256), (32, 256), (32, 1024), (32, 2048)]
    peers, ours = measure(decoders, points, steps=3 if quick else 20).values()
    cache = 100 * (cache_numbers(configs["mla"]) / cache_numbers(configs["multi-head"]) - 1)
    return [
        {"rows": one["rows"], "context": one["context"], "cache": cache}
        | {name: 100 * (two[name] / one[name] - 1) for name in ("bytes_read_per_token", "flops_per_token", "ms")}
        for one, two in zip(peers, ours, strict=True)
    ]


def crossing(tokens: Sequence[float], changes: Sequence[float]) -> dict[str, float | None]:
    """The line of least squares through the changes [per cent] over log2(tokens), and where it falls to the aim: None
    if it does not fall.

    >>> crossing([1024.0, 2048.0, 4096.0], [10.7, 8.7, 6.7])
    {'per_doubling': -2.0, 'tokens_at_aim': 11585.2}
    """
    x = [math.log2(count) for count in tokens]
    spread = sum((a - fmean(x)) ** 2 for a in x) or math.inf  # one budget alone has no slope
    slope = sum((a - fmean(x)) * (b - fmean(changes)) for a, b in zip(x, changes, strict=True)) / spread
    at = fmean(x) + (AIM - fmean(changes)) / slope if slope < 0 else math.inf
    return {"per_doubling": round(slope, 3), "tokens_at_aim": round(2**at, 1) if at < 64 else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--data", type=Path, help="a folder with GSM8K's train.jsonl; word problems by default")
    parser.add_argument(
        "--documents", type=int, default=12_000, help="how many are used at most; a tenth of them is held out"
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[200, 400, 800, 1600], help="optimizer steps")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3], help="learning rates; one is not tuned"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="models that learn at once, with one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/equal_quality"), help="of what has ended")
    parser.add_argument("--quick", action="store_true", help="few steps on little text: only whether it runs")
    options = parser.parse_args()
    if options.data and not (options.data / "train.jsonl").is_file():
        parser.error(f"--data {options.data}: there is no train.jsonl in it; leave it out for built-in word problems")
    if options.quick:
        options.budgets, options.rates = [2, 4], [1e-3, 2e-3]
    documents, spawn = (300 if options.quick else options.documents), multiprocessing.get_context("spawn")
    found: list[dict[str, Any]] = []

    def run(pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        shortest_first = sorted(jobs, key=lambda job: job.steps)
        futures = [pool.submit(work, job, options.data, documents, options.folder) for job in shortest_first]
        done = []
        for future in as_completed(futures):
            done.append(future.result())
            print(json.dumps(done[-1]), flush=True)
        found.extend(done)
        return done

    decoded = decoding_work(
        text_of(options.data, VOCABULARY, LENGTH, options.seeds[0], documents).tokenizer, options.quick
    )
    print(shown([["MLA, a step, %", *list(decoded[0])], *[["", *point.values()] for point in decoded]]), flush=True)

    with ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        tuning = sorted(options.budgets)[len(options.budgets) // 2]
        best = dict.fromkeys(MODELS, options.rates[0])
        if len(options.rates) > 1:
            tuned = run(pool, [Job(m, options.seeds[0], tuning, r, True) for m in MODELS for r in options.rates])
            best = {
                m: min((t for t in tuned if t["model"] == m), key=lambda t: t["perplexity"])["rate"] for m in MODELS
            }
        given = [(m, s, b) for m in MODELS for s in options.seeds for b in options.budgets]
        by_job = {
            (f["model"], f["seed"], f["steps"]): f for f in run(pool, [Job(*g, best[g[0]], False) for g in given])
        }

    lines, curve = [], []
    for budget in options.budgets:
        values = {m: [by_job[m, s, budget]["perplexity"] for s in options.seeds] for m in MODELS}
        changes = [100 * (b / a - 1) for a, b in zip(*values.values(), strict=True)]
        tokens = budget * BATCH * LENGTH
        half = half_interval(changes) if len(changes) == 3 else None
        curve.append({"tokens": tokens, "change": fmean(changes), "half_of_its_interval": half})
        lines.append([f"{tokens:,}", *(fmean(v) for v in values.values()), fmean(changes), half or "-"])
    fit = crossing([point["tokens"] for point in curve], [point["change"] for point in curve])
    print(shown([["tokens", *MODELS, "change, %", "+-"], *lines]))
    print(f"learning rates: {best}")
    where = "nowhere on this line" if fit["tokens_at_aim"] is None else f"at {fit['tokens_at_aim']:.3g} tokens"
    print(f"{fit['per_doubling']:+.2f} points a doubling; {AIM} % {where}")
    if options.json:
        text = options.data.name if options.data else "word_problems"
        record = {"environment": describe(), "text": text, "documents": documents}
        record |= {"rates": best, "runs": found, "curve": curve, "fit": fit, "work": decoded}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
