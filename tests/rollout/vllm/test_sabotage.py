"""Contract 13 with a live vLLM: whatever it keeps or computes otherwise is found at its next publication, by name."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from small_learner import small_learner
from vllm_cases import HEADS, PYTHON, needs_vllm

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.steps.weight_sync import WeightSync
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.faults import RolloutError
from rollout.group import Prompt
from rollout.pool import PoolOptions
from rollout.sampling import SamplingParams
from rollout.vllm.pool import VLLMPool
from rollout.vllm.process import VLLMProcess
from rollout.vllm.settings import VLLMSettings

pytestmark = needs_vllm
PROMPTS = [Prompt(f"p/{i}", "", [3 + i, *range(9, 14 + i)]) for i in range(3)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STALE = {
    "embedding": "model.embed_tokens.weight",
    "output head": "lm_head.weight",
    "expert": "model.layers.1.mlp.experts.2.up_proj.weight",
    "expert bias": "model.layers.1.mlp.gate.e_score_correction_bias",
    "norm": "model.layers.0.input_layernorm.weight",
    "draft head": "model.layers.2.eh_proj.weight",
}
HOLDS = "vLLM does not hold what was published as version 1: the first tensor that differs is "
COMPUTES = "vLLM computes other log-probabilities than the learner with version 1"


@dataclass
class Server:
    """A vLLM that is sabotaged by what is written into `file`."""

    process: VLLMProcess
    file: Path

    def settings(self, drafts: int) -> VLLMSettings:
        return VLLMSettings(url=self.process.url, token=self.process.token, draft_tokens=drafts)


def start(folder: Path) -> Server:
    file, python = folder / "fault", folder / "python"
    file.write_text("")
    script = Path(__file__).parents[2] / "cases/vllm_sabotage.py"
    python.write_text(f'#!/bin/sh\nexec {shlex.join([str(PYTHON), str(script), str(file)])} "$@"\n')
    python.chmod(0o755)
    return Server(VLLMProcess(python, folder / "vllm.log", 1, lambda: None), file)


@pytest.fixture(scope="module", params=DTYPES)
def server(request, tmp_path_factory) -> Iterator[tuple[Server, torch.dtype]]:
    server = start(tmp_path_factory.mktemp("vllm"))
    yield server, DTYPES[request.param]
    server.process.close()


def learner_of(policy: Policy) -> Learner:
    options = LearnerOptions(learning_rate=1e-3)
    return small_learner(policy, options, MTPOptions(depth=2), LossOptions(), temperature=0.8)


def learn(learner: Learner, pool: VLLMPool, params: SamplingParams) -> None:
    """A step of GRPO, in which the expert bias moves too."""
    groups = pool.sample(PROMPTS, params)
    marks = [[float(i % 2) for i, _ in enumerate(group.completions)] for group in groups]
    learner.step(learner.prepare(groups, [GroupScore(row, {"marks": row}) for row in marks]), 1)
    for name, buffer in learner.policy.named_buffers():
        if "correction_bias" in name:
            buffer.add_(1e-3)


def refused(policy: Policy, server: Server, dtype: torch.dtype, fault: str) -> str:
    """An honest publication passes, the one after a step and a fault is refused, and the next honest one passes."""
    params = SamplingParams(4, 0.8, 12, draft_tokens=2 if policy.mtp else 0)
    server.file.write_text("")
    pool = VLLMPool(policy, PoolOptions(vllm=server.settings(params.draft_tokens or 0), dtype=dtype))
    learner = learner_of(policy)
    weight_sync = WeightSync(pool, learner, params)
    assert weight_sync.sync_weights()["sync_check/logprob_abs_mean"] > 0
    learn(learner, pool, params)
    server.file.write_text(fault)
    with pytest.raises(RolloutError) as error:
        weight_sync.sync_weights()
    server.file.write_text("")
    weight_sync.sync_weights()
    return str(error.value)


@pytest.mark.parametrize("kind", STALE)
def test_a_stale_tensor_is_named(random_policy, server, kind):
    said = refused(random_policy(5, **HEADS).cast(server[1]), *server, f"skip {STALE[kind]}")
    assert said.startswith(HOLDS + STALE[kind]), said


def test_a_stale_adapter_is_named(random_policy, server):
    policy = random_policy(5, **HEADS).cast(server[1])
    policy.add_lora(2, 4.0, ["o_proj", "experts"])
    stale = "model.layers.0.self_attn.o_proj.weight.lora_B"
    said = refused(policy, *server, f"old {stale}")
    assert said.startswith(HOLDS + stale), said


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("frozen", HOLDS + STALE["embedding"]),
        ("rope", COMPUTES),
        ("hotter", r"(vLLM samples version 1 at another temperature|vLLM computes other log-probabilities)"),
    ],
)
def test_a_sampler_that_is_not_the_learner_is_refused(random_policy, server, fault, words):
    said = refused(random_policy(5, **HEADS).cast(server[1]), *server, fault)
    assert re.match(words, said), said


def test_a_stale_head_that_is_tied_is_refused(random_policy, tmp_path):
    """vLLM has two copies where the policy has one; only what it computes shows that it kept the packed one."""
    server = start(tmp_path)
    try:
        policy = random_policy(5, mtp=False, tie_word_embeddings=True, **HEADS)
        assert refused(policy, server, torch.float32, "untie").startswith(COMPUTES)
    finally:
        server.process.close()
