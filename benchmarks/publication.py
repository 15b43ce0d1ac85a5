"""What a publication costs, and how far a sampler's log-probabilities are from the learner's after an honest one.

    python -m benchmarks.publication alarms --model runs/warm/policy  # 200 publications of each backend, precision
    python -m benchmarks.publication bytes --model runs/warm/policy   # of adapters, after optimizer steps
    python -m benchmarks.publication seconds --workers 1 2 4 8        # Ray workers on this machine, which is quiet

`--json FILE` adds the result to FILE, with hardware, versions and command.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.publisher import Publisher
from grpo.run import hardware
from policies.policy import Policy
from policies.presets import PRESETS, build
from rewards.group_score import GroupScore
from rollout.engine import RolloutError
from rollout.group import Prompt, RolloutGroup
from rollout.pool import LocalPool, Pool, open_pool
from rollout.publication.canaries import canary_params, compare
from rollout.publication.message import Sender
from rollout.sampling import SamplingParams

SAMPLING = SamplingParams(group_size=4, max_completion_tokens=16, draft_tokens=4)
TARGETS = ["q_proj", "kv_b_proj", "o_proj", "experts"]


def policy_of(model: str | None, backend: str, dtype: torch.dtype, width: int = 192) -> Policy:
    """The checkpoint; a random policy of the demo's form; or for transformers a random Llama with its tokenizer."""
    if model and backend == "native":
        return Policy.load(model, dtype)
    PRESETS["benchmark"] = PRESETS["tiny"] | {"hidden_size": width, "moe_intermediate_size": width // 2}
    policy = build("benchmark", [f"{i} plus {i + 1} is {2 * i + 1}\n" for i in range(300)])
    if backend == "native":
        return policy.cast(dtype)
    config = LlamaConfig(
        vocab_size=policy.config.vocab_size,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=policy.config.eos_token_id,
    )
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(config).to(dtype).eval(), None, policy.tokenizer)


def learner_of(policy: Policy, rate: float = 5e-4) -> Learner:
    options = LearnerOptions(learning_rate=rate)
    return Learner(policy, options, MTPOptions(depth=4, every=1), LossOptions(), temperature=SAMPLING.temperature)


def sampling_of(policy: Policy) -> SamplingParams:
    return SAMPLING if policy.mtp else replace(SAMPLING, draft_tokens=0)


def step(learner: Learner, pool: Pool, number: int, params: SamplingParams | None = None) -> None:
    """A step of GRPO on what the pool samples, with the share of even tokens as reward."""
    params = params or sampling_of(learner.policy)
    vocabulary = learner.policy.config.vocab_size
    prompts = [Prompt(f"p/{i}", "", [(37 * (i + number) + 11 * t) % vocabulary for t in range(10)]) for i in range(4)]
    groups: list[RolloutGroup] = pool.sample(prompts, params.at(number))
    marks = [[sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids) for c in group.completions] for group in groups]
    learner.step(learner.prepare(groups, [GroupScore(row, {"even": row}) for row in marks]), number)


def alarms(options: argparse.Namespace) -> dict[str, Any]:
    """By backend and precision: quantiles of what the canaries of honest publications give, and how many alarms."""
    found = {}
    for backend in ("native", "transformers"):
        for dtype in (torch.float32, torch.bfloat16):
            learner = learner_of(policy_of(options.model, backend, dtype))
            pool = open_pool(learner.policy, dtype=dtype)
            publisher, means, mosts, repeats, count = (
                Publisher(pool, learner, sampling_of(learner.policy)),
                [],
                [],
                0,
                0,
            )
            first = wrong(publisher, pool, dtype)
            for number in range(1, options.publications + 1):
                try:
                    metrics = publisher.publish()
                    means.append(metrics["canary/logprob_abs_mean"])
                    mosts.append(metrics["canary/logprob_abs_max"])
                    repeats += int(metrics["canary/repeats"])
                except RolloutError as error:
                    count += 1
                    print(error, flush=True)
                step(learner, pool, number)
            pool.publish(learner.weights(), learner.policy_version)
            name = f"{backend}, {str(dtype).removeprefix('torch.')}"
            found[name] = {
                "publications": options.publications,
                "alarms": count,
                "repeats": repeats,
                "mean: median and largest": [median(means), max(means)],
                "one token: median and largest": [median(mosts), max(mosts)],
            }
            found[name] |= {
                "wrong, before the first step": first,
                "wrong, after the last": wrong(publisher, pool, dtype),
            }
            print(name, found[name], flush=True)
    return found


def wrong(publisher: Publisher, pool: LocalPool, dtype: torch.dtype) -> dict[str, list[float]]:
    """Mean and largest difference, median of three, where the temperature is wrong, and where rope turns backwards."""
    found: dict[str, list[float]] = {}

    def measure(name: str, factor: float) -> None:
        means, mosts = [], []
        for number in range(3):
            params = canary_params(publisher.params.at(number), publisher.context)
            sampled = pool.sample_on_each(publisher.prompts, replace(params, temperature=params.temperature * factor))
            agreement = compare(sampled, publisher.scores(sampled, params.temperature), 0, dtype)
            means.append(agreement.mean)
            mosts.append(agreement.most)
        found[name] = [median(means), median(mosts)]

    for factor in (0.8, 1.1, 1.25):
        measure(f"temperature x {factor}", factor)
    if pool.engine.policy.backend == "native":
        rope = pool.engine.trunk.rope
        rope.sin = -rope.sin
        measure("wrong rope", 1.0)
        rope.sin = -rope.sin
    return found


def bytes_sent(options: argparse.Namespace) -> dict[str, Any]:
    """MB of the last of five publications, between which the optimizer steps: everything, adapters."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rate in (5e-4, 1e-6):
            for adapters in (False, True):
                policy = policy_of(options.model, "native", dtype)
                if adapters:
                    policy.add_lora(8, 16.0, TARGETS)
                learner = learner_of(policy, rate)
                pool, sender = open_pool(policy, dtype=dtype), Sender()
                for number in range(5):
                    pool.publish(learner.weights(), number)
                    sent = sum(part.bytes for part in sender.messages(learner.weights(), number))
                    step(learner, pool, number + 1)
                name = (
                    f"{str(dtype).removeprefix('torch.')}, rate {rate:g}, {'adapters' if adapters else 'all weights'}"
                )
                whole = sum(part.bytes for part in sender.again())
                found[name] = {"everything_mb": round(whole / 1e6, 3), "sent_mb": round(sent / 1e6, 3)}
                print(name, found[name], flush=True)
    return found


def seconds_taken(options: argparse.Namespace) -> dict[str, Any]:
    """By policy, by what is sent and by number of workers: seconds of a publication, of its canaries, and MB."""
    found: dict[str, Any] = {}
    for width in options.widths:
        for adapters in (True, False):
            policy = policy_of(None, "native", torch.float32, width)
            numbers = sum(parameter.numel() for parameter in policy.parameters())
            if adapters:
                policy.mtp.requires_grad_(False)
                policy.add_lora(8, 16.0, TARGETS)
            learner = learner_of(policy, 5e-4)
            for workers in options.workers:
                pool = open_pool(policy, workers)
                publisher = Publisher(pool, learner, SAMPLING)
                taken, canaries, sent = [], [], []
                try:
                    for _ in range(options.repeats + 1):
                        with torch.no_grad():
                            for parameter in policy.parameters():
                                if parameter.requires_grad:
                                    parameter.add_(1e-5)
                        pool.metrics()
                        started = time.perf_counter()
                        pool.publish(learner.weights(), learner.policy_version)
                        taken.append(time.perf_counter() - started)
                        sent.append(pool.metrics()["publish/bytes"])
                        canaries.append(publisher.publish()["time/canaries"])
                finally:
                    pool.close()
                name = f"{numbers / 1e6:.1f} M, {'adapters' if adapters else 'all weights'}"
                found.setdefault(name, {})[f"{workers} workers"] = {
                    "seconds": [round(value, 4) for value in sorted(taken[1:])],
                    "median_s": round(median(taken[1:]), 4),
                    "canaries_s": round(median(canaries[1:]), 4),
                    "mb": round(sent[-1] / 1e6, 3),
                }
                print(name, workers, found[name][f"{workers} workers"], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["alarms", "bytes", "seconds"])
    parser.add_argument("--model")
    parser.add_argument("--publications", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 640], help="of the policies that are published")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"alarms": alarms, "bytes": bytes_sent, "seconds": seconds_taken}[options.what](options)
    if options.json:
        former = json.loads(options.json.read_text()) if options.json.exists() else {}
        record = {"environment": hardware.describe(), "result": result}
        options.json.write_text(json.dumps(former | {options.what: record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
