"""vLLM beside our own engine, as samplers of one learner: the same weights, prompts and numbers, in turn, in one run.

    make vllm && make smollm2
    python -m benchmarks.vllm train --json vllm.json              # GRPO on GSM8K: fp32 and bf16, all weights and LoRA
    quartet sft examples/01_demo.yaml --output_dir runs/demo --warm_start.steps 400
    python -m benchmarks.vllm drafts --demo runs/demo/policy --json drafts.json

`train`: every step publishes to both samplers and samples with both; the learner learns from vLLM's groups. `mismatch`
is |learner's - sampler's log-probability|. `stale` is the same between vLLM's tokens and the weights of the step after:
what a sampler would show that had not taken the new weights. The reward is the share of digits, so that no group ties.

`drafts`: log-probabilities and accepted drafts of the demo policy and of a random one with latents of 512 + 64.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from grpo.config.options import load
from grpo.config.run import TrainConfig
from grpo.data.word_problems import word_problems
from grpo.learner.build import grpo_learner
from grpo.learner.likelihood import logprobs_of_groups
from grpo.policy_source import load_policy
from grpo.run.hardware import describe
from grpo.sampling import sampling_params
from grpo.task import Task
from policies.mtp import MTPHead
from policies.policy import Policy
from policies.presets import small_tokenizer
from rewards.group_score import GroupScore
from rollout.backends.vllm.pool import VLLMPool, VLLMSettings
from rollout.group import Prompt, RolloutGroup
from rollout.pool import LocalPool, Pool
from rollout.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
LATENTS = {  # the sizes of DeepSeek-V3's latents, in a small model
    **{"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 96, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 8, "n_group": 4},
    **{"topk_group": 2, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"routed_scaling_factor": 1.0, "max_position_embeddings": 512, "initializer_range": 0.08},
}


def gaps(policy: Policy, groups: Sequence[RolloutGroup], temperature: float) -> list[float]:
    """|learner's - sampler's log-probability| of every token."""
    found = []
    for group in groups:
        [scores] = logprobs_of_groups(policy, [group], temperature)
        for completion, own in zip(group.completions, scores, strict=True):
            found += [abs(a - b) for a, b in zip(completion.logprobs, own, strict=True)]
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def scored(group: RolloutGroup) -> GroupScore:
    marks = [sum(map(str.isdigit, text)) / (len(text) or 1) + 1e-4 * i for i, text in enumerate(group.texts)]
    return GroupScore(marks, {"digits": marks})


def train(options: argparse.Namespace, dtype: str, lora: bool) -> dict[str, Any]:
    given: dict[str, Any] = {
        "model": str(options.model),
        "output_dir": options.log,
        "dtype": dtype,
        "threads": options.threads,
        "data.few_shot": 0,
        "data.limit": 200,
        "prompts_per_step": options.prompts,
        "rollout.backend": "vllm",
        "rollout.group_size": options.group_size,
        "rollout.max_completion_tokens": options.tokens,
        "learner.learning_rate": 1e-4 if lora else 1e-5,
        "learner.warmup_steps": 0,
    }
    name = "lora" if lora else "full"
    config = load(TrainConfig, ROOT / f"examples/02_gsm8k_smollm2_{name}.yaml", given)
    with Task.of(config) as task:
        policy = load_policy(config)
        learner = grpo_learner(policy, config, {"digits": 1.0})
        prompts = [task.prompt(example, policy.tokenizer) for example in task.train[: options.prompts * options.steps]]
    params = sampling_params(policy, config.rollout, options.group_size, 0)
    kind = getattr(torch, dtype)
    settings = VLLMSettings(python=options.python, log=options.log / f"{dtype}_{name}.log")
    vllm, seconds_to_start = timed(lambda: VLLMPool(policy, settings, kind, options.threads))
    pools: dict[str, Pool] = {"vllm": vllm, "ours": LocalPool(policy, kind, options.prompts)}
    steps = []
    try:
        for step in range(1, options.steps + 1):
            drawn = prompts[(step - 1) * options.prompts : step * options.prompts]
            line: dict[str, Any] = {"step": step}
            made: dict[str, list[RolloutGroup]] = {}
            for sampler, pool in list(pools.items())[:: 1 if step % 2 else -1]:
                _, publishing = timed(lambda pool=pool, step=step: pool.publish(learner.weights(), step))
                groups, sampling = timed(lambda pool=pool, step=step, drawn=drawn: pool.sample(drawn, params.at(step)))
                far = gaps(policy, groups, params.temperature)
                line[sampler] = {
                    "mismatch_mean": fmean(far),
                    "mismatch_max": max(far),
                    "tokens": len(far),
                    "tokens_per_second": len(far) / sampling,
                    "seconds_sampling": sampling,
                    "seconds_publishing": publishing,
                }
                made[sampler] = groups
            groups = made["vllm"]
            started = time.perf_counter()
            metrics = learner.step(learner.prepare(groups, [scored(group) for group in groups]), step)
            learning = time.perf_counter() - started
            assert metrics["learner/updates"] == 1
            line["stale_mean"] = fmean(gaps(policy, groups, params.temperature))
            line["seconds_learning"] = learning
            for sampler in pools:
                line[sampler]["seconds_step"] = learning + sum(
                    line[sampler][f"seconds_{part}"] for part in ("sampling", "publishing")
                )
            steps.append(line)
    finally:
        vllm.close()
    summary = {
        sampler: {
            "mismatch_mean": fmean(line[sampler]["mismatch_mean"] for line in steps),
            "mismatch_max": max(line[sampler]["mismatch_max"] for line in steps),
            **{
                f"{name}_median": median(line[sampler][name] for line in steps[1:] or steps)
                for name in ("tokens_per_second", "seconds_publishing", "seconds_step")
            },
        }
        for sampler in pools
    }
    summary |= {"stale_mean_least": min(line["stale_mean"] for line in steps), "seconds_to_start": seconds_to_start}
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
            far = gaps(policy, groups, 1.0)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "drafts"])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--demo", type=Path, help="a trained policy of examples/01_demo.yaml")
    parser.add_argument("--python", type=Path, default=Path(".vllm/bin/python"))
    parser.add_argument("--log", type=Path, default=Path("runs/vllm_benchmark"), help="folder for vLLM's logs")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of a completion, at most")
    parser.add_argument("--drafts", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "train":
        results = [train(options, dtype, lora) for dtype in options.dtypes for lora in (False, True)]
    else:
        policies = {"latents of 512 + 64": with_long_latents()}
        if options.demo:
            policies["demo"] = Policy.load(options.demo)
        results = [drafts(options, name, policy) for name, policy in policies.items()]
    if options.json:
        options.json.write_text(json.dumps({"environment": describe(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
