"""The same GRPO step of GSM8K in one contender, in a process of its own: seconds of its phases, mismatch, prompts.

    python -m benchmarks.peers.step trl SETTINGS.json OUT.json

Every contender reads the same questions through the chat template of the model and samples exactly so many tokens for
each completion, which stop tokens do not end. The reward is a hash of the text, so that no group is tied and every
group is learned from: SmolLM2 is hardly ever right at this temperature, and a tied group costs ours less.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.sizes import Step


def reward(completions: Sequence[Any], **columns: Any) -> list[float]:
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [zlib.crc32(text.encode()) % 1000 / 1000 for text in texts]


def questions(step: Step) -> list[Any]:
    """Those of every step, the warm-up included; no question comes twice."""
    from rewards.data.examples import load_examples

    return load_examples("gsm8k", "train", purpose="train", limit=step.prompts * (step.steps + 1))


def digest(rows: Sequence[Sequence[int]]) -> str:
    """Of the token ids of a step's prompts, each prompt once; what both sides must agree in."""
    unique = list(dict.fromkeys(tuple(row) for row in rows))
    return hashlib.sha256(json.dumps(unique).encode()).hexdigest()[:16]


def run_ours(name: str, step: Step, warm: Path) -> dict[str, Any]:
    """Sample, score, learn, publish with canaries, as `quartet train` does."""
    import torch

    from grpo.config.learner import LearnerOptions
    from grpo.config.run import TrainConfig
    from grpo.data.prompts import PromptTemplate, encode_prompt
    from grpo.learner.build import make
    from grpo.steps.weight_sync import WeightSync
    from policies.policy import Policy
    from rewards import RewardSpec, Scorer
    from rollout.sampling import SamplingParams

    dtype = getattr(torch, step.dtype)
    policy = Policy.load(step.model, dtype)
    template = PromptTemplate("chat")
    prompts = [encode_prompt(example, policy.tokenizer, template) for example in questions(step)]
    options = LearnerOptions(learning_rate=step.learning_rate)
    learner = make(
        policy,
        TrainConfig(output_dir=".", learner=options),
        reward_weights={"reward": 1.0},
        sampler_differs=name == "ours_vllm",  # which turns the importance correction on
    )
    pool = opened(name, policy, dtype, step)
    params = SamplingParams(group_size=step.group_size, max_completion_tokens=step.tokens, seed=step.seed)
    weight_sync = WeightSync(pool, learner, params)
    found: dict[str, Any] = {"seconds": {"sampling": [], "learning": [], "publishing": [], "step": []}, "prompts": []}
    with Scorer([RewardSpec(f"{__file__}:reward")], columns=list(prompts[0].columns)) as scorer:
        weight_sync.sync_weights()
        for number in range(1, step.steps + 2):
            chosen = prompts[(number - 1) * step.prompts : number * step.prompts]
            if number == 2:
                warm.touch()
            began = time.perf_counter()
            groups = pool.sample(chosen, params.at(number))
            sampled = time.perf_counter()
            scores = scorer.score(
                [prompt.text for prompt in chosen],
                [group.texts for group in groups],
                [prompt.columns for prompt in chosen],
                prompt_ids=[prompt.prompt_id for prompt in chosen],
            )
            scored = time.perf_counter()
            metrics = learner.step(learner.prepare(groups, scores), number)
            learner.update.zero()
            learned = time.perf_counter()
            weight_sync.sync_weights()
            ended = time.perf_counter()
            assert {len(c.token_ids) for group in groups for c in group.completions} == {step.tokens}
            assert metrics["learner/updates"] == 1
            spent = {"sampling": sampled - began, "learning": learned - scored, "publishing": ended - learned}
            for phase, seconds in (spent | {"step": ended - began}).items():
                found["seconds"][phase].append(seconds)
            found["prompts"].append(digest([group.prompt.token_ids for group in groups]))
            far = {part: metrics[f"mismatch/logprob_abs_{part}"] for part in ("mean", "max")}
            found["mismatch"] = far | {"tokens": step.prompts * step.group_size * step.tokens}
    pool.close()
    return found


def opened(name: str, policy: Any, dtype: Any, step: Step) -> Any:
    """Our own engine in this process, or vLLM in a process of its own."""
    from rollout.vllm.settings import VLLMSettings
    from rollout.workers.kinds import PoolOptions, open_pool

    if name == "ours":
        return open_pool(policy, PoolOptions(dtype=dtype))

    log = Path(tempfile.mkdtemp()) / "vllm.log"
    settings = VLLMSettings(python=Path(step.vllm), log=log)
    return open_pool(policy, PoolOptions(dtype=dtype, threads=step.threads, vllm=settings))


def run_trl(name: str, step: Step, warm: Path) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig

    from benchmarks.peers.trainer import ClockedTrainer

    rows = [{"prompt": [{"role": "user", "content": example.question}]} for example in questions(step)]
    named: dict[str, Any] = {}
    if name == "trl_ours":
        from grpo.trl_bridge import rollout_func
        from policies.policy import Policy

        policy = Policy.load(step.model, getattr(torch, step.dtype))
        rollout = rollout_func(policy)
        kept: dict[tuple[int, ...], list[float]] = {}  # what the pool says of its tokens, in the first step

        def sample(prompts: list[Any], trainer: Any) -> dict[str, list]:
            out = rollout(prompts, trainer)
            if not kept:
                kept.update(zip(map(tuple, out["completion_ids"]), out["logprobs"], strict=True))
            return out

        model, tokenizer, named["rollout_func"] = policy.trunk, policy.tokenizer, sample
    else:
        model = AutoModelForCausalLM.from_pretrained(step.model, dtype=getattr(torch, step.dtype))
        tokenizer = AutoTokenizer.from_pretrained(step.model)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, **given_to_trl(name, step))
        trainer = ClockedTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            when_warm=warm.touch,
            **named,
        )
        if name == "trl_ours":
            trainer.eos_token_ids = []  # no token ends a completion here either
        trainer.train()
    if name == "trl_ours":
        trainer.sampled = dict(kept)
        rollout.close()
    assert trainer.lengths == [step.tokens]
    return {
        "seconds": trainer.phases,
        "prompts": [digest(read) for read in trainer.prompts_read],
        "mismatch": trainer.mismatch(),
        "settings": given_to_trl(name, step),
    }


def given_to_trl(name: str, step: Step) -> dict[str, Any]:
    """All that is not a default of GRPOConfig: the sizes, the machine, and nothing written to the disk."""
    given: dict[str, Any] = {
        "per_device_train_batch_size": step.group_size,
        "gradient_accumulation_steps": step.prompts,
        "num_generations": step.group_size,
        "max_completion_length": step.tokens,
        "max_steps": step.steps + 1,
        "learning_rate": step.learning_rate,
        "seed": step.seed,
        "bf16": False,  # weights and arithmetic have the precision that the model is loaded in
        "use_cpu": True,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if name == "trl_no_checkpointing":
        given["gradient_checkpointing"] = False
    if name != "trl_ours":
        given["generation_kwargs"] = {"min_new_tokens": step.tokens}
    return given


def phases(found: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Seconds of the measured steps alone, without the warm-up."""
    for phase, seconds in found["seconds"].items():
        yield phase, seconds[1:]


def main() -> None:
    import torch

    name, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    step = Step(**json.loads(source.read_text()))
    torch.set_num_threads(step.threads)
    torch.manual_seed(step.seed)
    found = (run_ours if name.startswith("ours") else run_trl)(name, step, out.with_suffix(".warm"))
    found["seconds"] = dict(phases(found))
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
