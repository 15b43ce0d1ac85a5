"""vLLM beside our own engine, as samplers of one learner: the same weights, prompts and numbers, in turn, in one run.

    make vllm && make smollm2
    python -m benchmarks.vllm train --json vllm.json              # GRPO on GSM8K: fp32 and bf16, all weights and LoRA
    quartet sft examples/01_demo.yaml --output_dir runs/demo --warm_start.steps 400
    python -m benchmarks.vllm drafts --demo runs/demo/policy --json drafts.json
    python -m benchmarks.vllm alarms --json alarms.json           # honest publications, in fp32 and bf16

`train`: every step publishes to both samplers and samples with both; the learner learns from vLLM's groups, by the
rewards of examples/02 (GSM8K marks, and the format beside them) and a small one in which no group ties. `mismatch` is
|learner's - sampler's log-probability|. `ratio` is vLLM's mean mismatch by ours, with an interval of 95 % (bootstrap
over completions). `stale` is the mismatch between vLLM's tokens and the weights of the step after: what a sampler would
show that had not taken the new weights. In bf16, `from_fp32` is the distance of sampler and learner from the same
weights computed in fp32.

`alarms`: 200 honest publications of a policy of the demo's size, with a step of GRPO between them.

`drafts`: log-probabilities and accepted drafts of the demo policy and of a random one with latents of 512 + 64.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from benchmarks.publication import learner_of, policy_of, sampling_of
from benchmarks.publication import step as learn
from grpo.config.options import load
from grpo.config.run import TrainConfig
from grpo.data.word_problems import word_problems
from grpo.learner.build import grpo_learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.policy_source import load_policy
from grpo.publisher import Publisher
from grpo.run.hardware import describe
from grpo.sampling import sampling_params
from grpo.task import Task
from policies.mtp import MTPHead
from policies.policy import Policy
from policies.presets import small_tokenizer
from rollout.backends.vllm.pool import VLLMPool
from rollout.backends.vllm.settings import VLLMSettings
from rollout.engine import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.pool import LocalPool, Pool
from rollout.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
REWARDS = {"gsm8k": 1.0, "gsm8k_flexible": 0.5, "gsm8k_format": 0.2, "repetition_penalty": 0.05}
LATENTS = {  # the sizes of DeepSeek-V3's latents, in a small model
    **{"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8, "n_group": 4},
    **{"topk_group": 2, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"routed_scaling_factor": 1.0, "max_position_embeddings": 512, "initializer_range": 0.08},
}


def scores_of(policy: Policy, groups: Sequence[RolloutGroup], temperature: float) -> list[list[float]]:
    """The learner's log-probabilities of each completion."""
    return [own for group in groups for own in logprobs_of_groups(policy, [group], temperature)[0]]


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> list[list[float]]:
    """|difference| of every token, by completion."""
    return [[abs(a - b) for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)]


def gaps(policy: Policy, groups: Sequence[RolloutGroup], temperature: float) -> list[list[float]]:
    """|learner's - sampler's log-probability|."""
    return apart(sampled(groups), scores_of(policy, groups, temperature))


def sampled(groups: Sequence[RolloutGroup]) -> list[list[float]]:
    return [completion.logprobs for group in groups for completion in group.completions]


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def ratio(these: Sequence[Sequence[float]], those: Sequence[Sequence[float]], draws: int = 2000) -> list[float]:
    """Mean of `these` by mean of `those`, and the ends of its interval, where completions are drawn again."""
    random, means = np.random.default_rng(0), []
    for rows in (these, those):
        sums, counts = np.array([sum(row) for row in rows]), np.array([len(row) for row in rows])
        at = random.integers(len(rows), size=(draws, len(rows)))
        means.append(sums[at].sum(1) / counts[at].sum(1))
    ends = np.quantile(means[0] / means[1], [0.025, 0.975])
    return [fmean(flat(these)) / fmean(flat(those)), *map(float, ends)]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def train(options: argparse.Namespace, dtype: str, lora: bool) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": str(options.model),
        "output_dir": options.log,
        "dtype": dtype,
        "threads": options.threads,
        "data.limit": 200,
        "prompts_per_step": options.prompts,
        "rollout.backend": "vllm",
        "rollout.vllm.python": options.python,
        "rollout.group_size": options.group_size,
        "rollout.max_completion_tokens": options.tokens,
        "learner.learning_rate": 1e-4 if lora else 1e-5,
        "learner.warmup_steps": 0,
        "rewards": [{"function": function, "weight": weight} for function, weight in REWARDS.items()],
    }
    name = "lora" if lora else "full"
    config = load(TrainConfig, ROOT / f"examples/02_gsm8k_smollm2_{name}.yaml", given)
    with Task.of(config) as task:
        return train_on(task, config, options, dtype, name)


def train_on(task: Task, config: TrainConfig, options: argparse.Namespace, dtype: str, name: str) -> dict[str, Any]:
    policy = load_policy(config)
    learner = grpo_learner(policy, config, REWARDS)
    prompts = [task.prompt(example, policy.tokenizer) for example in task.train[: options.prompts * options.steps]]
    params = sampling_params(policy, config.rollout, options.group_size, 0)
    kind = getattr(torch, dtype)
    settings = VLLMSettings(python=options.python, log=options.log / f"{dtype}_{name}.log")
    vllm, seconds_to_start = timed(lambda: VLLMPool(policy, settings, kind, options.threads))
    pools: dict[str, Pool] = {"vllm": vllm, "ours": LocalPool(policy, kind, options.prompts)}
    steps: list[dict[str, Any]] = []
    far: dict[str, list[list[float]]] = {sampler: [] for sampler in pools}  # of all steps, by completion
    from_fp32: dict[str, list[float]] = {f"{who}_{where}": [] for where in pools for who in ("sampler", "learner")}
    vllm.metrics()
    try:
        for step in range(1, options.steps + 1):
            drawn = prompts[(step - 1) * options.prompts : step * options.prompts]
            line: dict[str, Any] = {"step": step}
            made: dict[str, list[RolloutGroup]] = {}
            exact = copy.deepcopy(policy).cast(torch.float32) if dtype != "float32" else None
            for sampler, pool in list(pools.items())[:: 1 if step % 2 else -1]:
                _, publishing = timed(lambda pool=pool, step=step: pool.publish(learner.weights(), step))
                groups, sampling = timed(lambda pool=pool, step=step, drawn=drawn: pool.sample(drawn, params.at(step)))
                own, scores = sampled(groups), scores_of(policy, groups, params.temperature)
                rows = apart(own, scores)
                far[sampler] += rows
                line[sampler] = {
                    "mismatch_mean": fmean(flat(rows)),
                    "mismatch_max": max(flat(rows)),
                    "tokens": len(flat(rows)),
                    "tokens_per_second": len(flat(rows)) / sampling,
                    "seconds_sampling": sampling,
                    "seconds_publishing": publishing,
                    "bytes_published": pool.metrics().get("publish/bytes"),
                }
                if exact is not None:
                    truth = scores_of(exact, groups, params.temperature)
                    for who, theirs in (("sampler", own), ("learner", scores)):
                        from_fp32[f"{who}_{sampler}"] += flat(apart(theirs, truth))
                made[sampler] = groups
            del exact
            groups, marks = made["vllm"], task.score(made["vllm"])
            before = {name: tensor.clone() for name, tensor in learner.weights().items()}
            batch = learner.prepare(groups, marks)
            metrics, learning = timed(lambda batch=batch, step=step: learner.step(batch, step))
            assert metrics["learner/updates"] == 1
            line["stale_mean"] = fmean(flat(gaps(policy, groups, params.temperature)))
            line["tensors_changed"] = sum(not torch.equal(t, before[name]) for name, t in learner.weights().items())
            line["rewards"] = {part: fmean(flat([mark.parts[part] for mark in marks])) for part in marks[0].parts}
            line["tied_groups"] = sum(len(set(mark.rewards)) == 1 for mark in marks)
            line["seconds_learning"] = learning
            for sampler in pools:
                line[sampler]["seconds_step"] = learning + sum(
                    line[sampler][f"seconds_{part}"] for part in ("sampling", "publishing")
                )
            steps.append(line)
            print(json.dumps(line), flush=True)
    finally:
        vllm.close()
    summary: dict[str, Any] = {
        sampler: {
            "mismatch_mean": fmean(flat(far[sampler])),
            "mismatch_max": max(flat(far[sampler])),
            **{
                f"{name}_median": median(line[sampler][name] for line in steps[1:] or steps)
                for name in ("tokens_per_second", "seconds_publishing", "seconds_step")
            },
        }
        for sampler in pools
    }
    summary |= {"stale_mean_least": min(line["stale_mean"] for line in steps), "seconds_to_start": seconds_to_start}
    summary["ratio"] = ratio(far["vllm"], far["ours"])
    if dtype != "float32":
        summary["from_fp32"] = {who: fmean(values) for who, values in from_fp32.items()}
    print(f"{dtype} {name}: {json.dumps(summary)}", flush=True)
    return {"dtype": dtype, "weights": name, "summary": summary, "steps": steps}


def with_long_latents() -> Policy:
    """Random, and sharp enough that drafts are sometimes right."""
    tokenizer = small_tokenizer([f"{row['question']}\n{row['answer']}\n" for row in word_problems("train", [1], 200)])
    torch.manual_seed(0)
    trunk = DeepseekV3ForCausalLM(DeepseekV3Config(vocab_size=len(tokenizer), **LATENTS)).eval()
    trunk.config.eos_token_id = trunk.generation_config.eos_token_id = tokenizer.eos_token_id
    return Policy(trunk, MTPHead(trunk.config), tokenizer)


def drafts(options: argparse.Namespace, name: str, policy: Policy) -> dict[str, Any]:
    rows = word_problems("heldout", [1, 2], 64)
    texts = [f"{row['question']}\n" for row in rows[: options.prompts]]
    prompts = [Prompt(f"{i}", text, policy.tokenizer(text).input_ids) for i, text in enumerate(texts)]
    params = SamplingParams(options.group_size, 1.0, options.tokens, tuple(policy.stop_token_ids))
    params = replace(params, draft_tokens=options.drafts)
    settings = VLLMSettings(python=options.python, log=options.log / f"{name}.log", draft_tokens=options.drafts)
    vllm = VLLMPool(policy, settings, torch.float32, options.threads)
    found: dict[str, Any] = {"policy": name, "drafts": options.drafts}
    try:
        for sampler, pool in {"vllm": vllm, "ours": LocalPool(policy, torch.float32, options.prompts)}.items():
            pool.publish(policy.publication(), 1)
            groups = pool.sample(prompts, params)
            far = flat(gaps(policy, groups, 1.0))
            stats = [completion.draft for group in groups for completion in group.completions]
            made = [sum(s.drafted[d] for s in stats) for d in range(options.drafts)]
            taken = [sum(s.accepted[d] for s in stats) for d in range(options.drafts)]
            found[sampler] = {
                "mismatch_mean": fmean(far),
                "mismatch_max": max(far),
                "tokens": len(far),
                "drafted": made,
                "accepted": taken,
                "acceptance": sum(taken) / sum(made),
                "acceptance_by_depth": [a / b for a, b in zip(taken, made, strict=True)],
            }
    finally:
        vllm.close()
    print(json.dumps(found), flush=True)
    return found


def alarms(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """What the canaries of honest publications give, and how many of them are refused."""
    kind = getattr(torch, dtype)
    learner = learner_of(policy_of(None, "native", kind))
    params = replace(sampling_of(learner.policy), draft_tokens=options.drafts)
    settings = VLLMSettings(python=options.python, log=options.log / f"alarms_{dtype}.log", draft_tokens=options.drafts)
    pool, count, found = VLLMPool(learner.policy, settings, kind, options.threads), 0, list[dict[str, float]]()
    try:
        publisher = Publisher(pool, learner, params)
        for number in range(1, options.publications + 1):
            try:
                found.append(publisher.publish())
            except RolloutError as error:
                count += 1
                print(error, flush=True)
            learn(learner, pool, number, params)
            if number % 25 == 0:
                worst = max(metrics["canary/logprob_abs_max"] for metrics in found)
                print(f"{dtype}: {number} publications, {count} alarms, one token up to {worst:.2g}", flush=True)
    finally:
        pool.close()
    made: dict[str, Any] = {"dtype": dtype, "publications": options.publications, "alarms": count}
    made["repeats"] = sum(metrics["canary/repeats"] for metrics in found)
    for name in ("canary/logprob_abs_mean", "canary/logprob_abs_max"):
        values = [metrics[name] for metrics in found]
        made[f"{name}: median and largest"] = [median(values), max(values)]
    print(json.dumps(made), flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "drafts", "alarms"])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--demo", type=Path, help="a trained policy of examples/01_demo.yaml")
    parser.add_argument("--python", type=Path, default=Path(".vllm/bin/python"))
    parser.add_argument("--log", type=Path, default=Path("runs/vllm_benchmark"), help="folder for vLLM's logs")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--weights", nargs="*", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of a completion, at most")
    parser.add_argument("--drafts", type=int, default=2)
    parser.add_argument("--publications", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "train":
        results = [train(options, dtype, kind == "lora") for dtype in options.dtypes for kind in options.weights]
    elif options.what == "alarms":
        results = [alarms(options, dtype) for dtype in options.dtypes]
    else:
        policies = {"latents of 512 + 64": with_long_latents()}
        if options.demo:
            policies["demo"] = Policy.load(options.demo)
        results = [drafts(options, name, policy) for name, policy in policies.items()]
    if options.json:
        options.json.write_text(json.dumps({"environment": describe(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
