"""On a CUDA device: what the rest of the suite shows on a CPU. `make gpu` runs these first.

QUARTET_GPU_TESTS=cpu runs them on a CPU, so that they are known to run: `make gpu ARGS=--cpu`. test_pretend.py runs
them on a pretend accelerator.
"""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_learner import small_learner
from start_ranks import meeting

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.learner.learner import Learner
from grpo.run import checkpoint
from grpo.run.memory_errors import OutOfMemory, phase
from grpo.train import train
from policies.decoding import kernels
from policies.policy import Policy
from review.readers.run_folder import read_metrics
from rewards.group_score import GroupScore
from rewards.records import read_rollouts
from rollout.compiled import rounds
from rollout.compiled.recorded import RecordedRound
from rollout.decoding.engine import Engine
from rollout.group import Prompt, RolloutGroup
from rollout.sampling import SamplingParams
from rollout.weight_sync.message import Sender
from rollout.workers.worker import Worker

pytestmark = pytest.mark.gpu
CUDA = torch.cuda.is_available()
DEVICE = torch.device(os.environ.get("QUARTET_GPU_TESTS") or "cuda")
PROMPTS = [Prompt(f"p/{i}", "", [5 + i, 7, 9 + 3 * i, 11][: 2 + i]) for i in range(3)]
PARAMS = SamplingParams(group_size=4, max_completion_tokens=12, draft_tokens=2)


def _learner(policy: Policy, **options) -> Learner:
    given = LearnerOptions(**{"learning_rate": 1e-2, "tokens_per_micro_batch": 64} | options)
    return small_learner(policy, given, MTPOptions(depth=2), max_completion_tokens=12, reward_weights={"r": 1.0})


def _batch(learner: Learner, groups: list[RolloutGroup]):
    scores = [GroupScore(rewards, {"r": rewards}) for rewards in ([1.0, 0.0, 0.5, 0.2],) * len(groups)]
    return learner.prepare(groups, scores)


def _gradients(policy: Policy, groups: list[RolloutGroup]) -> dict[str, torch.Tensor]:
    """Of one step of GRPO, before the optimizer takes them."""
    learner = _learner(policy)
    found: dict[str, torch.Tensor] = {}
    learner.update.optimizer.step = lambda: found.update(
        {name: p.grad.cpu().clone() for name, p in policy.named_parameters() if p.grad is not None}
    )
    learner.step(_batch(learner, groups), 1)
    return found


def test_forward_and_backward_are_those_of_a_cpu(random_policy):
    """Whatever attends to packed rows there: blocks on a CPU, flex attention on a GPU."""
    groups = Engine(random_policy(2), torch.float32).sample(PROMPTS, PARAMS)
    expected = _gradients(random_policy(2), groups)
    found = _gradients(random_policy(2).to(DEVICE), groups)
    assert found.keys() == expected.keys()
    assert len(expected) > 30
    for name, gradient in expected.items():
        far = torch.linalg.vector_norm(found[name] - gradient)
        assert far <= 1e-3 * torch.linalg.vector_norm(gradient) + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_says_of_its_tokens_what_the_learner_says(random_policy, dtype):
    """In float32 the same log-probabilities; in bfloat16 they differ by roundings, and the learner still steps."""
    policy = random_policy(2).cast(dtype).to(DEVICE)
    learner = _learner(policy)
    groups = Engine(policy, dtype).sample(PROMPTS, PARAMS)
    metrics = learner.step(_batch(learner, groups), 1)
    assert metrics["learner/updates"] == 1
    assert metrics["mismatch/logprob_abs_max"] <= (1e-4 if dtype == torch.float32 else 0.7)
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(144, 144, 128), (20, 20, 12), (16, 144, 128), (64, 128, 64)])
def test_torch_has_a_kernel_for_attention_to_latents(widths, dtype):
    """Of keys, vectors and values as the policies of this repository have them."""
    assert not CUDA or kernels.cuda_attention_agrees(DEVICE, dtype, widths)
    torch.manual_seed(0)
    query, cached = torch.randn(2, 12, widths[0]) / widths[0] ** 0.5, torch.randn(2, 33, widths[1])
    mask = torch.zeros(2, 1, 33)
    mask[1, :, 20:] = -torch.inf
    given = (query.to(DEVICE, dtype), cached.to(DEVICE, dtype), widths[2], mask.to(DEVICE, dtype))
    for found, expected in zip(kernels.attention(*given), kernels.plain_attention(*given), strict=True):
        torch.testing.assert_close(found, expected.to(found.dtype), atol=kernels.CLOSE[dtype], rtol=0.02)


def test_recorded_rounds_change_no_token(random_policy, monkeypatch):
    """CUDA graphs, with drafts and without, before and after a publication. A CPU calls what a GPU replays."""
    monkeypatch.setattr(rounds, "find", lambda *_: RecordedRound())
    engine = Engine(random_policy(2).to(DEVICE), torch.float32)
    for version in (0, 1):
        for params in (
            PARAMS,
            replace(PARAMS, draft_tokens=0),
            replace(PARAMS, step=2),
            replace(PARAMS, draft_tokens=0),
        ):
            eager = [c.token_ids for group in engine.sample(PROMPTS[:2], params) for c in group.completions]
            replayed = engine.sample(PROMPTS[:2], replace(params, compiled=True))
            assert [c.token_ids for group in replayed for c in group.completions] == eager
        assert {bucket.drafts for bucket, _ in engine.graphs[0].loaded} == {0, 2}
        engine.sync_weights({n: w.to(DEVICE) for n, w in random_policy(3).synced_weights().items()}, version + 1)


def test_drafts_change_no_token(random_policy):
    engine = Engine(random_policy(2).to(DEVICE), torch.float32)

    def tokens(drafts: int) -> list[list[int]]:
        groups = engine.sample(PROMPTS, replace(PARAMS, draft_tokens=drafts))
        return [completion.token_ids for group in groups for completion in group.completions]

    assert tokens(0) == tokens(2) == tokens(2)


def test_what_was_learned_is_sampled_from_once_it_is_published(random_policy):
    policy = random_policy(2).to(DEVICE)
    engine, learner = Engine(random_policy(2).to(DEVICE), torch.float32), _learner(policy)
    before = engine.sample(PROMPTS, PARAMS)
    learner.step(_batch(learner, before), 1)
    stale = learner.step(_batch(learner, engine.sample(PROMPTS, PARAMS.at(2))), 2)
    engine.sync_weights(learner.weights(), learner.policy_version)
    fresh = learner.step(_batch(learner, engine.sample(PROMPTS, PARAMS.at(3))), 3)
    assert stale["mismatch/logprob_abs_max"] > 1e-2
    assert fresh["mismatch/logprob_abs_max"] <= 1e-4


def test_bf16_weights_move_with_their_masters(random_policy):
    """A step of 4e-5 is lost in bfloat16 alone. The masters keep it, and five of them are seen."""
    policy = random_policy(2).cast(torch.bfloat16).to(DEVICE)
    learner = _learner(policy, learning_rate=4e-5, tokens_per_micro_batch=1024)
    batch = _batch(learner, Engine(policy, torch.bfloat16).sample(PROMPTS, PARAMS))
    name, weight = next((n, p) for n, p in policy.named_parameters() if n.endswith("kv_b_proj.weight"))
    first = weight.detach().clone()
    for step in range(1, 6):
        learner.step(batch, step)
    master = learner.masters.of(dict(policy.named_parameters())[name])
    assert master.dtype == torch.float32
    assert master.device.type == weight.device.type == DEVICE.type
    assert not torch.equal(weight, first)
    torch.testing.assert_close(weight.float(), master.float(), rtol=1e-2, atol=1e-3)


def test_a_run_trains_on_the_device(micro_config, tmp_path):
    result = train(micro_config(tmp_path / "run", device=DEVICE.type))
    assert result.policy.device.type == DEVICE.type
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ("memory/device_gib" in lines[-1]) == (DEVICE.type != "cpu")


FULL = {
    "loss.advantage": "gae", "loss.beta": 0.1, "learner.routing_replay": True, "learner.updates_per_batch": 2,
    "eval.limit": 4, "steps": 2, "sft.steps": 0,
}  # fmt: skip
ADAPTERS = {"lora.rank": 2, "loss.beta": 0.1, "steps": 2, "sft.steps": 1}


@pytest.mark.parametrize("options", [FULL, ADAPTERS], ids=["full", "adapters"])
def test_a_run_on_the_device_samples_what_a_cpu_samples_and_is_resumed(micro_config, tmp_path, options):
    """Full weights with a value head, a reference, replayed routers, two updates and evaluations; and adapters."""
    config = options | {"dtype": "float32"}
    train(micro_config(tmp_path / "cpu", device="cpu", **config))
    train(micro_config(tmp_path / "device", device=DEVICE.type, **config | {"steps": 1}))
    result = train(micro_config(tmp_path / "device", device=DEVICE.type, **config), resume="auto")
    assert result.policy.device.type == DEVICE.type
    for step in (1, 2):
        expected, found = (read_rollouts(tmp_path / name, step) for name in ("cpu", "device"))
        assert [c["token_ids"] for c in found] == [c["token_ids"] for c in expected]


def test_a_worker_takes_a_publication_sleeps_and_samples_on_the_device(random_policy):
    policy = random_policy(2)
    worker = Worker(policy.skeleton(), "float32", "float32", DEVICE.type, 1)
    for version in (0, 1):
        for message in Sender().messages(policy.synced_weights(), version):
            held = worker.sync_weights(message)
        assert held
        found = worker.sample(PROMPTS, PARAMS, version)
        expected = Engine(policy, torch.float32).sample(PROMPTS, PARAMS)
        tokens = ([c.token_ids for group in groups for c in group.completions] for groups in (found, expected))
        assert next(tokens) == next(tokens)
        worker.sleep()
        policy = random_policy(3)


def test_full_memory_of_the_device_names_the_option_and_leaves_the_run_usable(random_policy):
    """A real one, by asking the allocator for more than there can be."""
    config = SimpleNamespace(learner=LearnerOptions(tokens_per_micro_batch=64))
    said = "lower learner.tokens_per_micro_batch=64"
    with pytest.raises(OutOfMemory, match=said), phase("learning", config):
        torch.empty(10**15, device=DEVICE)
    policy = random_policy(2).to(DEVICE)
    assert len(Engine(policy, torch.float32).sample(PROMPTS, PARAMS)) == len(PROMPTS)


def test_a_run_of_fsdp_is_that_of_one_process(micro_policy, letters, tmp_path):
    """One process on each GPU, or two on a CPU: the same first step, by FSDP2."""
    size = 2 if DEVICE.type == "cpu" else torch.accelerator.device_count()
    if size < 2:
        pytest.skip("FSDP needs two GPUs")
    micro_policy(0).save(tmp_path / "micro")
    options = {
        "model": tmp_path / "micro", "device": DEVICE.type, "threads": 1, "steps": 1, "prompts_per_step": 2 * size,
        "data.task_options.levels": "[1]", "data.limit": 4 * size, "rollout.group_size": 3,
        "rollout.max_completion_tokens": 6,
        "rewards": f"[{{function: '{letters}'}}]", "mtp.depth": 2, "log.trackers": "[]", "learner.learning_rate": 1e-4,
    }  # fmt: skip
    words = ["-m", "grpo", "train", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
    shared = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if CUDA else {"ACCELERATE_USE_CPU": "true"})
    store, group = meeting(size)
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    started = []
    for name, environments in (("one", [{}]), ("several", ranks)):
        started += [
            subprocess.Popen([sys.executable, *words, "--output_dir", str(tmp_path / name)], env=shared | environment)
            for environment in environments
        ]
    try:
        assert [process.wait(240) for process in started] == [0] * (1 + size)
    finally:
        for process in started:
            process.kill()
        del store
    one, several = (checkpoint.load(tmp_path / name / "checkpoints/step_000001") for name in ("one", "several"))
    for name, tensor in one.tensors["policy"].items():
        torch.testing.assert_close(several.tensors["policy"][name].cpu(), tensor.cpu(), rtol=1e-3, atol=2e-5)
