"""How often the host waits for a device in a round of decoding, in a micro-batch and in a training step, by the kind of
layers, and whether the device computes what a CPU does.

The device is the pretend accelerator. `python waits.py PATH` prints the faults of a path as JSON: counts that are too
high, with the lines that wait.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pretend
import pytest
import torch
import zoo
from small_learner import last_work, small_learner, supervised_learner

from grpo.config.balance import BalanceOptions
from grpo.config.learner import LearnerOptions, MTPOptions, SftMTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.batch import TrainingBatch
from grpo.learner.learner import Learner
from grpo.learner.prepare import supervised
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms.draft_head import IDLE_EVERY
from policies.paths import Paths
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.group import Prompt
from rollout.sampling import SamplingParams

PROMPTS = [Prompt(f"p/{i}", "", [5 + i, 7, *range(9, 16 + i)]) for i in range(3)]  # longer than windows of the zoo
REWARDS = [1.0, 0.0, 0.5, 0.2]
STEP = IDLE_EVERY  # the MTP head learns in this step whatever its drafts gain
BALANCED = BalanceOptions(entropy_weight=0.01, sequence_weight=0.01, bias_rate=0.001)
REFERENCE = LossOptions(beta=0.1)


@dataclass(frozen=True)
class Path:
    """A kind of layers: the type of the zoo, the most waits of a micro-batch, and what its learner has beyond the
    defaults. If drafts had a `gain` below what pays, the MTP head does not learn from the first group, which is tied.
    """

    kind: str
    micro_batch: int = 4
    learner: dict[str, Any] = field(default_factory=dict)
    gain: float | None = None


PATHS = {
    "dense": Path("llama"),
    "MLA": Path("deepseek_v3", 5),
    "MLA with balanced experts": Path("deepseek_v3", 5, {"loss": REFERENCE, "balance": BALANCED}),
    "MLA and an MTP head that learns from some groups": Path("deepseek_v3", 6, {"loss": REFERENCE}, gain=1.0),
    "experts": Path("qwen3_moe"),
    "experts with windows and sinks": Path("gpt_oss"),
    "windows": Path("gemma3_text"),
    "windows of layers with other heads than the rest": Path("gemma4_text"),
    "recurrent": Path("qwen3_5_text"),
    "recurrent with a reference": Path("qwen3_5_text", learner={"loss": REFERENCE}),
    "state spaces": Path("nemotron_h"),
    "convolutions": Path("lfm2"),
    "an indexer": Path("glm_moe_dsa/below"),
}
QUICK = (
    "dense",
    "MLA and an MTP head that learns from some groups",
    "experts",
    "windows of layers with other heads than the rest",
    "recurrent",
)  # of these the counts without CUDA's attention are known in seconds
MOST = {"a round": 1, "a round with drafts": 1, "a step": 2}
# transformers looks at positions in each forward of its own.
ALONE = {"a round": 2, "a round with drafts": 2, "a micro-batch": 5, "a step": 5, "an SFT micro-batch": 5}
Waits = dict[str, Counter[str]]  # of a round, a micro-batch and a step: how often, by reason and line


@dataclass
class Trained:
    """A learner after its first step, on the batch from which it has learned."""

    learner: Learner
    batch: TrainingBatch
    token_ids: list[list[int]]  # of the completions
    numbers: torch.Tensor  # log-probabilities of the sampler and of the learner, and norms of gradients


def policy_of(kind: str, paths: Paths | None = None) -> Policy:
    with tempfile.TemporaryDirectory() as where:
        policy = Policy.load(zoo.folder(where, kind), add_mtp=True)
    policy.paths = paths or policy.paths
    return policy


def trained(policy: Policy, path: Path) -> Trained:
    options = LearnerOptions(tokens_per_micro_batch=1024)
    learner = small_learner(policy, options, MTPOptions(depth=2), reward_weights={"r": 1.0}, **path.learner)
    groups = Engine(policy, torch.float32).sample(PROMPTS, SamplingParams(group_size=4, max_completion_tokens=9))
    scores = [GroupScore(REWARDS, {"r": REWARDS})] * len(groups)
    if path.gain is not None:
        scores[0] = GroupScore([1.0] * 4, {"r": [1.0] * 4})
    batch = replace(learner.prepare(groups, scores), draft_gain=path.gain)
    metrics = learner.step(batch, STEP)
    token_ids, numbers = [], [value for name, value in sorted(metrics.items()) if name.endswith("grad_norm")]
    for group in groups:
        for completion in group.completions:
            token_ids.append(completion.token_ids)
            numbers += completion.logprobs
    for _, logprobs in sorted(last_work(learner).logprobs.items()):
        numbers += logprobs
    return Trained(learner, replace(batch, step=STEP), token_ids, torch.tensor(numbers))


def waits_of_round(policy: Policy, drafts: int = 0) -> Counter[str]:
    """The waits of a round in which no row ends."""
    params = SamplingParams(group_size=2, max_completion_tokens=40, draft_tokens=drafts)
    with torch.inference_mode():
        decoding = Decoding(Batch(Engine(policy, torch.float32).decoder, PROMPTS, params))
        for _ in range(2):
            decoding.decode_round()
        alive = decoding.batch.counts.alive
        with pretend.counted() as counts:
            decoding.decode_round()
    assert decoding.batch.counts.alive == alive == 2 * len(PROMPTS)
    return counts.waits


def waits_of_learner(learner: Learner, batch: TrainingBatch) -> Waits:
    """The waits of a micro-batch, and of all that a step does after its micro-batches."""
    with pretend.counted() as micro_batch:
        learner.forward_backward(batch)
    [work] = batch.works
    assert len(work.minis) == 1
    with pretend.counted() as step:
        learner.optim_step()
        learner.finish(batch.works)
    return {"a micro-batch": micro_batch.waits, "a step": step.waits}


def waits_of_sft(policy: Policy, path: Path) -> Counter[str]:
    """The waits of a micro-batch of solutions, after a first step."""
    options = LearnerOptions(tokens_per_micro_batch=1024)
    balance = path.learner.get("balance")
    learner = supervised_learner(policy, options, SftMTPOptions(depth=2), balance=balance)
    rows = [PackedRow(prompt.token_ids, [Sample(0, [5, 9, 11, 6])]) for prompt in PROMPTS]
    learner.step(supervised(rows), 1)
    batch = supervised(rows, 2)
    with pretend.counted() as counts:
        learner.forward_backward(batch)
    return counts.waits


def above(found: Waits, most: dict[str, int]) -> Waits:
    """What waits more often than it may."""
    return {name: counts for name, counts in found.items() if counts.total() > most[name]}


def faults(name: str, paths: Paths | None = None, most: dict[str, int] = MOST) -> dict[str, Any]:
    """What waits too often on a path, and what is computed otherwise than on a CPU."""
    path = PATHS[name]
    policy = policy_of(path.kind, paths).to(pretend.NAME)
    there = trained(policy, path)  # also does what is done once
    waits = {"a round": waits_of_round(policy), "a round with drafts": waits_of_round(policy, 2)}
    waits |= waits_of_learner(there.learner, there.batch)
    waits["an SFT micro-batch"] = waits_of_sft(policy, path)
    print(name, {part: counts.total() for part, counts in waits.items()}, file=sys.stderr)
    here = trained(policy_of(path.kind, paths), path)
    limits = dict.fromkeys(("a micro-batch", "an SFT micro-batch"), path.micro_batch) | most
    return above(waits, limits) | differences(here, there)


def differences(here: Trained, there: Trained) -> dict[str, str]:
    """How a step on the device differs from that on a CPU."""
    if here.token_ids != there.token_ids:
        return {"tokens": f"{there.token_ids} instead of {here.token_ids}"}
    apart = (here.numbers - there.numbers).abs().max().item()
    return {} if apart <= 1e-3 else {"log-probabilities and norms of gradients": f"differ by {apart:.2g}"}


if __name__ == "__main__":
    try:
        pretend.pytest_configure()
    except pytest.exit.Exception as error:
        sys.exit(error.returncode)
    # The engine of a copied process knows the devices from its first backward pass, so it has no thread for this one.
    with torch.autograd.set_multithreading_enabled(False):
        print(json.dumps(faults(sys.argv[1])))
