"""What the policy's architecture buys, each part against its peer, measured in one run.

(a) MLA against multi-head attention of the same width: cache, bytes and FLOPs per token, decode time, and held-out
    perplexity after the same training.
(b) MoE against a dense model of the same total parameters: decode and training speed; perplexity against a dense model
    of the same active FLOPs.
(c) SmolLM2-135M in its exact MLA form against the original: decode and training speed, memory (`make smollm2` first).

    python benchmarks/policy.py --json policy.json                     # 10 minutes on two cores
    python benchmarks/policy.py --part b --seeds 0 1 2                 # with intervals; (b) alone takes several seeds
    python benchmarks/policy.py --part a --data ../gsm8k               # text: a folder with GSM8K's train.jsonl
    python benchmarks/policy.py --quick                                # does it run? (figures mean nothing)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
# Last, not first: `rollout` is the package and not the benchmark of that name beside this file.
sys.path[:] = [*(path for path in sys.path if Path(path).resolve() != HERE), str(HERE)]

import torch  # noqa: E402
from decoding import decoder_of, measure, weight_bytes  # noqa: E402
from pretraining import Run, Text, build, load_text, perplexity, rows, shown, tokens_per_second, train  # noqa: E402
from seeds import interval  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import DeepseekV3Config, LlamaConfig  # noqa: E402

from grpo.config.learner import BalanceOptions, LearnerOptions, MTPOptions  # noqa: E402
from grpo.learner.learner import Learner  # noqa: E402
from grpo.run.hardware import describe  # noqa: E402
from policies.anatomy import cache_numbers, count_parameters  # noqa: E402
from policies.policy import Policy  # noqa: E402
from rollout.compiled.rounds import FEW_ROWS  # noqa: E402
from rollout.engine import Engine  # noqa: E402
from rollout.group import Prompt  # noqa: E402
from rollout.sampling import SamplingParams  # noqa: E402

WIDTH, LAYERS, HEADS = 256, 4, 8
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 4096,
    "initializer_range": 0.04,
}
# 28 + 8 cached numbers a layer where 8 heads of keys and values hold 512: -93 %.
MLA = {
    "kv_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": None,
    "first_k_dense_replace": LAYERS,
}
FFN = 704
EXPERTS, TOP_K, SHARED, EXPERT_WIDTH = 16, 2, 1, 224
MOE = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "n_shared_experts": SHARED,
    "moe_intermediate_size": EXPERT_WIDTH,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
LENGTH, BATCH, LEARNING_RATE, VOCABULARY = 128, 8, 2e-3, 1024
MODELS = {"original": "smollm2-135m-instruct", "exact_mla": "smollm2-135m-mla"}
AIMS = {
    "cache_bytes_per_token": "-93 %",
    "bytes_read_per_token": "-82 %",
    "perplexity": "<= +3.7 %",
    "speed": "3.2x",
}


def say(line: str) -> None:
    print(line, flush=True)


def change(ours: float, peer: float) -> str:
    """ours against peer in percent.

    >>> change(7.0, 100.0)
    '-93.0 %'
    """
    return f"{100 * (ours / peer - 1):+.1f} %"


def table(title: str, header: list[str], lines: list[list[object]]) -> None:
    say(f"\n{title}\n{shown([header, *lines])}\n")


def at(points: list[dict[str, float]]) -> list[str]:
    return [f"{point['rows']} rows, context {point['context']}" for point in points]


def part_a(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """MLA against multi-head attention: the same width, depth, heads and feed-forward."""
    common = COMMON | {"vocab_size": len(text.tokenizer), "intermediate_size": FFN, "eos_token_id": 0}
    configs = {"mha": LlamaConfig(**common), "mla": DeepseekV3Config(**common | MLA)}
    steps = 4 if options.quick else options.steps or 400
    runs = {name: Run(build(config, text.tokenizer, options.seed), steps) for name, config in configs.items()}
    train(runs, text, BATCH, LEARNING_RATE, lambda line: say(f"(a) {line}"))
    decoders = {
        name: decoder_of(run.policy, torch.float32, COMMON["max_position_embeddings"]) for name, run in runs.items()
    }
    points = [(2, 32)] if options.quick else [(1, 256), (8, 1024), (32, 1024), (32, 2048)]
    decoded = measure(decoders, points, steps=3 if options.quick else 20)
    heldout = text.heldout[: 4 if options.quick else 512]
    result = {
        name: {
            "parameters": count_parameters(run.policy.trunk, run.policy.config)[0],
            "cache_bytes_per_token": 4 * cache_numbers(run.policy.config),
            "training_flops_per_token": training_flops(run.policy),
            "training_tokens_per_second": tokens_per_second(run, BATCH * LENGTH),
            "training_loss": run.loss,
            "perplexity": perplexity(run.policy, heldout),
            "decode": decoded[name],
        }
        for name, run in runs.items()
    }
    mha, mla = result["mha"], result["mla"]
    lines = [
        [name, mha[name], mla[name], change(mla[name], mha[name]), AIMS.get(name, "")]
        for name in ("parameters", "cache_bytes_per_token", "training_flops_per_token", "training_tokens_per_second")
    ]
    for place, peer, ours in zip(at(mha["decode"]), mha["decode"], mla["decode"], strict=True):
        for name in ("bytes_read_per_token", "flops_per_token", "ms"):
            lines.append(
                [f"{name}, {place}", peer[name], ours[name], change(ours[name], peer[name]), AIMS.get(name, "")]
            )
    name = "perplexity"
    lines.append([f"held-out {name}", mha[name], mla[name], change(mla[name], mha[name]), AIMS[name]])
    table(f"(a) {steps} steps of {BATCH * LENGTH} tokens", ["", "multi-head", "MLA", "change", "aim"], lines)
    return {"steps": steps, "tokens_per_step": BATCH * LENGTH, "models": result, "aims": AIMS}


def training_flops(policy: Policy) -> float:
    """FLOPs per token of a forward over one block, by torch's counter; the backward takes twice as many."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        policy.trunk(torch.zeros(1, LENGTH, dtype=torch.long), use_cache=False)
    return counter.get_total_flops() / LENGTH


def part_b(options: argparse.Namespace, text: Text, seed: int) -> dict[str, Any]:
    """MoE against dense models with the same attention: as many parameters in all, as many in use."""
    common = COMMON | MLA | {"vocab_size": len(text.tokenizer), "eos_token_id": 0}
    configs = {
        "moe": DeepseekV3Config(**common | MOE | {"first_k_dense_replace": 0}),
        "dense_same_parameters": DeepseekV3Config(**common | {"intermediate_size": (EXPERTS + SHARED) * EXPERT_WIDTH}),
        "dense_same_flops": DeepseekV3Config(**common | {"intermediate_size": (TOP_K + SHARED) * EXPERT_WIDTH}),
    }
    steps = 4 if options.quick else options.steps or 300
    runs = {name: Run(build(config, text.tokenizer, seed), steps) for name, config in configs.items()}
    runs["moe"].balance = BalanceOptions(bias_rate=0.003)
    runs["dense_same_parameters"].steps = min(max(1, steps // 2), 20)  # for its speed alone
    train(runs, text, BATCH, LEARNING_RATE, lambda line: say(f"(b) {line}"))
    decoders = {name: decoder_of(run.policy, torch.float32, 1024) for name, run in runs.items()}
    points = [(2, 32)] if options.quick else [(1, 256), (8, 256), (32, 256)]
    decoded = measure(decoders, points, steps=3 if options.quick else 20)
    rounds = sampled({name: run.policy for name, run in runs.items()}, [1] if options.quick else [1, 8, 32], options)
    heldout = text.heldout[: 4 if options.quick else 512]
    result: dict[str, Any] = {}
    for name, run in runs.items():
        result[name] = {
            "parameters": count_parameters(run.policy.trunk, run.policy.config)[0],
            "active_parameters": count_parameters(run.policy.trunk, run.policy.config)[1],
            "training_tokens_per_second": tokens_per_second(run, BATCH * LENGTH),
            "decode": [
                {k: v for k, v in point.items() if k != "bytes_read_per_token"}
                | {"bytes_read_per_token": bytes_read(decoders[name], point["rows"], point["context"])}
                for point in decoded[name]
            ],
            "sampling": rounds[name],
        }
        if name != "dense_same_parameters":
            result[name] |= {"training_loss": run.loss, "perplexity": perplexity(run.policy, heldout)}
    moe, same, active = (result[name] for name in ("moe", "dense_same_parameters", "dense_same_flops"))
    lines: list[list[object]] = [
        [name, moe[name], same[name], active[name], "", ""] for name in ("parameters", "active_parameters")
    ]
    name = "training_tokens_per_second"
    lines.append([name, moe[name], same[name], active[name], f"{moe[name] / same[name]:.2f}x", AIMS["speed"]])
    for i, place in enumerate(at(moe["decode"])):
        speeds = [model["decode"][i]["tokens_per_second"] for model in (moe, same, active)]
        lines.append([f"tokens per second, {place}", *speeds, f"{speeds[0] / speeds[1]:.2f}x", AIMS["speed"]])
        for name in ("flops_per_token", "bytes_read_per_token"):
            counts = [model["decode"][i][name] for model in (moe, same, active)]
            lines.append([f"{name}, {place}", *counts, f"1 / {counts[1] / counts[0]:.2f}", ""])
    for place in moe["sampling"]:
        speeds = [model["sampling"][place] for model in (moe, same, active)]
        lines.append([f"tokens per second, {place}", *speeds, f"{speeds[0] / speeds[1]:.2f}x", AIMS["speed"]])
    name = "perplexity"
    lines.append(["held-out perplexity", moe[name], "", active[name], change(moe[name], active[name]), ""])
    header = ["", "MoE", "dense, same parameters", "dense, same FLOPs", "MoE against it", "aim"]
    table(f"(b) {steps} steps of {BATCH * LENGTH} tokens (perplexity: against the same FLOPs)", header, lines)
    return {"steps": steps, "tokens_per_step": BATCH * LENGTH, "models": result, "aims": AIMS}


def times(models: Mapping[str, Any]) -> dict[str, float]:
    """The MoE's speeds over those of the dense model of the same parameters, and its perplexity over that of the one of
    the same FLOPs. `by bytes_read` and `by flops`: what the dense one reads or computes for a token, over the MoE's."""
    moe, same, active = (models[name] for name in ("moe", "dense_same_parameters", "dense_same_flops"))
    name = "training_tokens_per_second"
    found = {"training": moe[name] / same[name]}
    found |= {f"sampling, {place}": moe["sampling"][place] / same["sampling"][place] for place in moe["sampling"]}
    for place, ours, peer in zip(at(moe["decode"]), moe["decode"], same["decode"], strict=True):
        found[f"a decoding step, {place}"] = ours["tokens_per_second"] / peer["tokens_per_second"]
        for kind in ("bytes_read", "flops"):
            found[f"by {kind}, {place}"] = peer[f"{kind}_per_token"] / ours[f"{kind}_per_token"]
    return found | {"perplexity": moe["perplexity"] / active["perplexity"]}


def over_seeds(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Part b for every seed, and means of its ratios with half of their 95 % intervals."""
    found = {}
    for seed in options.seeds:
        own = text if seed == options.seeds[0] else text_of(options, seed)
        found[seed] = part_b(options, own, seed)
    each = {name: [times(one["models"])[name] for one in found.values()] for name in times(found[seed]["models"])}
    ratios = {name: interval(values) for name, values in each.items()}
    lines = [[name, ratio["mean"], ratio["half_of_its_interval"] or "-"] for name, ratio in ratios.items()]
    table(f"(b) MoE over dense, seeds {options.seeds}", ["", "times", "+-"], lines)
    return {"seeds": found, "times": ratios}


def text_of(options: argparse.Namespace, seed: int) -> Text:
    return load_text(options.data, VOCABULARY, LENGTH, seed, 300 if options.quick else 12_000)


def bytes_read(decoder: Any, rows: int, context: int) -> float:
    """Bytes of weights and cache that a step reads for each row: of the routed experts those that some row chooses, as
    many as independent even choices give, E (1 - (1 - k/E)^rows)."""
    experts = sum(block.gate_up.nbytes + block.down.nbytes for block in decoder.blocks if block.gate is not None)
    unread = (1 - TOP_K / EXPERTS) ** rows * experts
    return (weight_bytes(decoder) - unread) / rows + context * cache_numbers(
        decoder.config
    ) * decoder.head.element_size()


def sampled(policies: dict[str, Policy], rows: list[int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second of whole calls of the engine, eagerly and, with few rows, by graphs; models take turns."""
    tokens, repeats = (4, 1) if options.quick else (96, 7)
    engines = {name: Engine(policy) for name, policy in policies.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in policies}
    for count in rows:
        prompts = [Prompt(str(i), "", [7 * (i + j) % VOCABULARY for j in range(64)]) for i in range(count)]
        for compiled in (False, True) if count <= FEW_ROWS and not options.quick else (False,):
            rates: dict[str, list[float]] = {name: [] for name in engines}
            for step in range(repeats + 1):
                params = SamplingParams(1, 1.0, tokens, step=step, compiled=compiled)
                for name, engine in engines.items():
                    started = time.perf_counter()
                    engine.sample(prompts, params)
                    rates[name].append(count * tokens / (time.perf_counter() - started))
            for name, values in rates.items():
                found[name][f"{count} rows, {'graphs' if compiled else 'eager'}"] = median(values[1:] or values)
    return found


def part_c(options: argparse.Namespace) -> dict[str, Any]:
    """Every form in a process of its own, for its peak memory; original, exact, exact, original."""
    folders = {form: options.models / name for form, name in MODELS.items()}
    if missing := [str(folder) for folder in folders.values() if not (folder / "config.json").exists()]:
        reason = f"skipped: {' and '.join(missing)} not there; `make smollm2` prepares them"
        say(f"(c) {reason}")
        return {"skipped": reason}
    rounds: dict[str, list[dict[str, Any]]] = {form: [] for form in MODELS}
    order = list(MODELS) if options.quick else [*MODELS, *reversed(MODELS)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for i, form in enumerate(order, start=1):
            say(f"(c) {i}/{len(order)}: {form} ...")
            given = str(folders[form]), options.decode_dtype, torch.get_num_threads(), options.quick
            rounds[form].append(processes.submit(smollm2, *given).result())
    result = {form: merged(found) for form, found in rounds.items()}
    original, exact = result["original"], result["exact_mla"]
    lines: list[list[object]] = [
        [name, original[name], exact[name], change(exact[name], original[name])]
        for name in original
        if name != "decode"
    ]
    for place, peer, ours in zip(at(original["decode"]), original["decode"], exact["decode"], strict=True):
        for name in ("tokens_per_second", "bytes_read_per_token", "flops_per_token"):
            lines.append([f"{name}, {place}", peer[name], ours[name], change(ours[name], peer[name])])
    title = f"(c) SmolLM2-135M, decoding in {options.decode_dtype}, training in float32"
    table(title, ["", "original", "exact MLA", "change"], lines)
    return {"decode_dtype": options.decode_dtype, "models": result}


def smollm2(folder: str, dtype: str, threads: int, quick: bool) -> dict[str, Any]:
    """One form, measured in this process: first decoding, then training."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    policy = Policy.load(folder)
    decoder = decoder_of(policy, getattr(torch, dtype), 1024)
    points = [(2, 32)] if quick else [(1, 256), (8, 256), (32, 256)]
    decoded = measure({"it": decoder}, points, steps=2 if quick else 10, rounds=1)["it"]
    found = {
        "parameters": count_parameters(policy.trunk, policy.config)[0],
        "cache_bytes_per_token": cache_numbers(policy.config) * decoder.head.element_size(),
        "decode_weights_gib": weight_bytes(decoder) / 2**30,
        "decode_peak_gib": peak_gib(),
        "decode": decoded,
    }
    del decoder
    learner = Learner(policy, LearnerOptions(learning_rate=1e-6), MTPOptions(loss_weight=0))
    batch = rows(torch.randint(3, policy.config.vocab_size, (1, 16) if quick else (4, 128)))
    seconds = []
    for step in range(1, 2 if quick else 5):
        started = time.perf_counter()
        learner.sft_step(batch, step)
        seconds.append(time.perf_counter() - started)
    tokens = sum(row.length for row in batch)
    return found | {
        "training_tokens_per_second": tokens / median(seconds[1:] or seconds),
        "training_peak_gib": peak_gib(),
    }


def peak_gib() -> float:
    """Peak resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def merged(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, number by number."""
    first = rounds[0]
    if isinstance(first, dict):
        return {name: merged([found[name] for found in rounds]) for name in first}
    if isinstance(first, list):
        return [merged([found[i] for found in rounds]) for i in range(len(first))]
    return median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, with hardware, versions and command")
    parser.add_argument("--part", action="append", choices="abc", help="repeatable; all by default")
    parser.add_argument(
        "--data", type=Path, help="a folder with GSM8K's train.jsonl; built-in word problems by default"
    )
    parser.add_argument("--models", type=Path, default=Path("models"), help="where (c) finds SmolLM2 (default: models)")
    parser.add_argument(
        "--decode_dtype", "--decode-dtype", default="bfloat16", choices=["bfloat16", "float32"], help="(c)"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of (a) and (b); 400 and 300 by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and data; (a) takes the first")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only whether it runs")
    options = parser.parse_args()
    parts = options.part or list("abc")
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}")
    if options.data and not (options.data / "train.jsonl").is_file():
        parser.error(f"--data {options.data}: there is no train.jsonl in it; leave it out for built-in word problems")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps {options.steps}: use 1 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.seed = options.seeds[0]
    torch.manual_seed(options.seed)
    record: dict[str, Any] = {"environment": describe(), "seed": options.seed, "quick": options.quick}
    say(json.dumps(record["environment"], indent=1))
    started = time.perf_counter()
    if {"a", "b"} & set(parts):
        text = text_of(options, options.seed)
        record["text"] = {
            "source": options.data.name if options.data else "word_problems",
            "vocabulary": len(text.tokenizer),
        }
        record["text"] |= {"train_tokens": text.train.numel(), "heldout_tokens": text.heldout.numel()}
    for part in parts:
        record[part] = part_c(options) if part == "c" else {"a": part_a, "b": over_seeds}[part](options, text)
    record["seconds"] = round(time.perf_counter() - started, 1)
    say(f"{record['seconds']} s in all")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
