"""The device tests on an accelerator that every machine has, see cases/pretend.py, and how often it is waited for.

Contract 19: copies between host and device are counted, and the counts only fall.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pretend
import pytest
import torch
import waits
import zoo
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.source.agreement import check_agreement
from policies import attention, devices
from policies.paths import Paths
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.decoding.batch import Batch
from rollout.decoding.engine import Engine
from rollout.decoding.shard import Decoding
from rollout.group import Prompt
from rollout.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get("QUARTET_GPU_TESTS")
on_pretend = pytest.mark.skipif(DEVICE != pretend.NAME, reason="needs the pretend accelerator")
# The most synchronisations and operators. What has fallen is written here; nothing rises.
MOST = {
    "waits of a round": 1,
    "waits of a round with two drafts": 1,
    "fixed operators of a round": 59,
    "other operators of a round with two drafts": 272,
    "operators of a dense layer": 35,
    "operators of an MoE layer": 58,
    "waits of a micro-batch": 5,
    "operators of a micro-batch": 2495,  # 51 are of trees, 20 of tiles of the LM head; ten pad rows for flex
}
SIZES = {"vocab_size": 2048, "num_hidden_layers": 3, "first_k_dense_replace": 1}
PROMPTS = [Prompt(f"p/{i}", "", [5 + i, 7, 9 + 3 * i, 11][: 2 + i]) for i in range(3)]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == pretend.NAME, reason="is what runs this")
def test_the_device_tests_pass_and_no_count_has_risen():
    """In processes of their own, since a device that is registered stays."""
    environment = os.environ | {"QUARTET_GPU_TESTS": pretend.NAME, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pytest", "-p", "pretend", "-p", "no:cacheprovider", "--tb=short"]
    parts = ["-k", "a_run", "tests/grpo/test_gpu.py"], ["-k", "not a_run", "tests/grpo/test_gpu.py", __file__]
    pipes: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = [subprocess.Popen([*command, *part], text=True, **pipes) for part in parts]
    said = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if pretend.NOT_HERE in codes:
        pytest.skip(said[0].strip().splitlines()[-1])
    assert codes == [0, 0], "\n".join(said)


def count(policy: Policy, drafts: int) -> tuple[int, int]:
    """The synchronisations and operators of a round in which no row ends."""
    params = SamplingParams(group_size=2, max_completion_tokens=40, draft_tokens=drafts)
    decoding = Decoding(Batch(Engine(policy.to(pretend.NAME), torch.float32).decoder, PROMPTS, params))
    for _ in range(2):
        decoding.decode_round()
    with pretend.counted() as counts:
        decoding.decode_round()
    print(counts.waits, counts.operators)
    return counts.waits.total(), counts.operators.total()


def fits(counts: dict[str, int]) -> None:
    risen = {name: (number, MOST[name]) for name, number in counts.items() if number > MOST[name]}
    assert not risen, f"these counts are above what they may be: {risen}"


@on_pretend
@torch.inference_mode()
def test_rounds(random_policy):
    def of(dense: int, layers: int, drafts: int) -> tuple[int, int]:
        policy = random_policy(2, **SIZES | {"first_k_dense_replace": dense, "num_hidden_layers": layers})
        return count(policy, drafts)

    plain, drafted, one_dense, one_moe = of(1, 3, 0), of(1, 3, 2), of(2, 4, 0), of(1, 4, 0)
    dense, moe = one_dense[1] - plain[1], one_moe[1] - plain[1]
    fits(
        {
            "waits of a round": plain[0],
            "waits of a round with two drafts": drafted[0],
            "fixed operators of a round": plain[1] - dense - 2 * moe,
            "other operators of a round with two drafts": drafted[1] - dense - 2 * moe,
            "operators of a dense layer": dense,
            "operators of an MoE layer": moe,
        }
    )


@on_pretend
def test_micro_batch(random_policy, monkeypatch):
    """Of four MoE layers, with the draft head, by the attention that CUDA has; the last of a step, after what a step
    does once."""
    monkeypatch.setattr(devices, "has_cuda", lambda device: device.type == pretend.NAME)
    monkeypatch.setattr(attention, "kernel_options", lambda *_: {})  # which would be tried by compiled kernels
    policy = random_policy(2, **SIZES | {"num_hidden_layers": 5}).to(pretend.NAME)
    options = LearnerOptions(tokens_per_micro_batch=1024)
    learner = small_learner(policy, options, MTPOptions(depth=2), reward_weights={"r": 1.0})
    params = SamplingParams(group_size=4, max_completion_tokens=9)
    groups = Engine(policy, torch.float32).sample(PROMPTS, params)
    rewards = [1.0, 0.0, 0.5, 0.2]
    batch = learner.prepare(groups, [GroupScore(rewards, {"r": rewards})] * len(groups))
    learner.step(batch, 1)
    with pretend.counted() as counts:
        learner.forward_backward(batch)
    print(counts.waits, counts.operators)
    fits({"waits of a micro-batch": counts.waits.total(), "operators of a micro-batch": counts.operators.total()})


@on_pretend
@pytest.mark.parametrize(  # without CUDA's attention the quick paths are in test_device_code.py
    ("path", "cuda"),
    [(path, True) for path in waits.PATHS] + [(path, False) for path in waits.PATHS if path not in waits.QUICK],
)
def test_contract_19_every_kind_of_layers_waits_seldom_and_computes_what_a_cpu_does(path, cuda, monkeypatch):
    if cuda:
        monkeypatch.setattr(devices, "has_cuda", lambda device: device.type == pretend.NAME)
        monkeypatch.setattr(attention, "kernel_options", lambda *_: {})
    assert waits.faults(path) == {}


@on_pretend
@pytest.mark.parametrize("sampler", ["joined", "apart"])
def test_contract_19_rows_that_are_read_alone_wait_no_more_than_transformers_does(sampler):
    assert waits.faults("dense", Paths(sampler, "alone"), waits.ALONE) == {}


@on_pretend
def test_a_mask_of_booleans_hides_there_what_it_hides_on_a_cpu():
    """Windows of transformers are such masks."""
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().triu(-1)
    mask[2] = False  # a query that sees nothing, as in padding
    attend = torch.nn.functional.scaled_dot_product_attention
    there = attend(*(x.to(pretend.NAME) for x in (query, key, value)), attn_mask=mask.to(pretend.NAME)).cpu()
    torch.testing.assert_close(there, attend(query, key, value, attn_mask=mask))


@on_pretend
@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3_text", "mistral"])
def test_the_load_check_takes_the_fastest_paths_for_windows(kind):
    policy = zoo.policy(kind, **({"sliding_window": 8} if kind == "mistral" else {})).to(pretend.NAME)
    check_agreement(policy)
    assert policy.paths == Paths()
