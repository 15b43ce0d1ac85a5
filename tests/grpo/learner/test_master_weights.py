"""bf16 policies learn with small learning rates: fp32 masters, gradients that add up in fp32, contract 8 by default."""

import copy

import pytest
import torch
from resumed import whole_and_parts
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.learner.master_weights import MasterWeights
from grpo.run import checkpoint
from review.readers.run_folder import read_metrics
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

GROUPS = [
    RolloutGroup(
        Prompt("p", "", [5, 6, 7]), [Completion([8 + i, 9, 10 + i], [-1.0] * 3, "", "stop", 0) for i in range(3)]
    )
]
SCORES = [GroupScore([1.0, 0.0, 0.5], {"exact": [1.0, 0.0, 0.5]})]


def _learner(policy, **given) -> Learner:
    loss = {name: given.pop(name) for name in list(given) if name in LossOptions.model_fields}
    return small_learner(policy, LearnerOptions(**given), MTPOptions(loss_weight=0), LossOptions(**loss))


def test_small_steps_move_the_masters_by_hand():
    """Next to 1, bf16 has 1 + 2^-7. Fifty steps of 1e-4 make 0.005: the masters hold it, the weight rounds it."""
    linear = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(linear.weight)
    naive = copy.deepcopy(linear)
    masters = MasterWeights(linear)
    for module, moved in ((linear, masters.of(linear.weight)), (naive, naive.weight)):
        optimizer = torch.optim.SGD([moved], lr=1e-4)
        for _ in range(50):
            optimizer.zero_grad()
            loss = -module.weight.sum()
            masters.backward(loss) if module is linear else loss.backward()
            optimizer.step()
            masters.write_back()
    assert naive.weight.item() == 1.0  # every update was rounded away
    assert masters.of(linear.weight).item() == pytest.approx(1.005, abs=1e-6)
    assert linear.weight.item() == 1 + 2**-7


def test_gradients_add_up_in_fp32():
    """1 + 2^-9 twice over is 2 + 2^-8 exactly, but bf16 would keep 2."""
    linear = torch.nn.Linear(1, 1, bias=False).bfloat16()
    masters = MasterWeights(linear)
    for gradient in (1.0, 2**-8, 2**-8):
        masters.backward(linear.weight.sum() * gradient)
    assert masters.of(linear.weight).grad.item() == 1 + 2**-7
    assert linear.weight.grad is None


def test_fp32_needs_no_masters(micro_policy):
    learner = _learner(micro_policy(0))
    assert learner.masters.pairs == []
    assert all(learner.masters.of(p) is p for p in learner.policy.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_a_bf16_policy_learns_at_a_learning_rate_that_bf16_would_round_away(micro_policy, lora):
    def policy(dtype):
        made = micro_policy(0).to(torch.bfloat16).to(dtype)  # the same rounded start
        if lora:
            torch.manual_seed(0)
            made.add_lora(4, 8.0)
        return made

    learner, exact = _learner(policy(torch.bfloat16), learning_rate=2e-5), _learner(policy(torch.float32))
    exact.optimizer.param_groups[0]["peak"] = 2e-5
    start = {n: p.detach().float().clone() for n, p in learner.policy.named_parameters()}
    for step in range(1, 21):
        learner.step(learner.prepare(GROUPS, SCORES), step)
        exact.step(exact.prepare(GROUPS, SCORES), step)
    big = [n for n, p in exact.policy.trunk.named_parameters() if p.requires_grad and p.dim() > 1]
    cosines = []
    own, other = dict(learner.policy.trunk.named_parameters()), dict(exact.policy.trunk.named_parameters())
    for name in big:
        moved = own[name].float() - start[f"trunk.{name}"]
        wanted = other[name] - start[f"trunk.{name}"]
        if wanted.norm() > 1e-6:
            master = learner.masters.of(own[name]) - start[f"trunk.{name}"]
            cosines.append(torch.cosine_similarity(master.flatten(), wanted.flatten(), dim=0).item())
            assert torch.equal(own[name], learner.masters.of(own[name]).to(torch.bfloat16))
            assert moved.any(), name
    assert len(cosines) > 5
    assert sum(cosines) / len(cosines) > 0.7  # the direction is that of fp32
    assert all(t.dtype == torch.bfloat16 for n, t in learner.weights().items() if n.endswith("_proj.weight"))


def test_contract_9_bf16_goes_on_from_its_state_with_the_same_bits(micro_policy):
    def fresh() -> Learner:
        return _learner(micro_policy(0).to(torch.bfloat16), learning_rate=1e-4, beta=0.1)

    whole, resumed = fresh(), fresh()
    whole.step(whole.prepare(GROUPS, SCORES), 1)
    tensors, state = copy.deepcopy(whole.state())
    resumed.load_state(tensors, state)
    for learner in (whole, resumed):
        learner.step(learner.prepare(GROUPS, SCORES), 2)
    for part, mapping in whole.state()[0].items():
        for name, tensor in mapping.items():
            assert torch.equal(tensor, resumed.state()[0][part][name]), name
    assert all(torch.equal(p, q) for p, q in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True))
    assert tensors["policy"]["trunk.lm_head.weight"].dtype == torch.float32


def test_the_largest_mismatch_is_that_of_the_step_not_a_sum(micro_policy):
    policy = micro_policy(0)
    found = []
    for budget in (10_000, 1):
        learner = _learner(policy, tokens_per_micro_batch=budget, learning_rate=1e-12)
        batch = learner.prepare(GROUPS, SCORES)
        metrics = learner.step(batch, 1)
        found.append(metrics["mismatch/logprob_abs_max"])
        assert found[-1] > metrics["mismatch/logprob_abs_mean"]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_contract_9_a_bf16_run_resumes_to_the_same_bits(micro_config, tmp_path):
    """SFT stage, masters, correction and publication, end to end."""
    given = {"dtype": "bfloat16", "learner.learning_rate": 1e-4, "sft.steps": 1, "seed": 1}
    whole, _ = whole_and_parts(lambda folder: micro_config(folder, **given), tmp_path)
    learned = [line for line in read_metrics(whole) if line.get("learner/updates")]
    assert len(learned) == 3
    for line in learned:
        assert 0 < line["mismatch/logprob_abs_mean"] <= line["mismatch/logprob_abs_max"] < 0.5
        assert line["mismatch/weight_mean"] == pytest.approx(1.0, abs=0.05)
    before, after = (checkpoint.load(whole / f"checkpoints/step_{step:06d}").tensors["policy"] for step in (1, 3))
    moved = [name for name, t in after.items() if not torch.equal(t, before[name])]
    assert {"trunk.model.embed_tokens.weight", "trunk.lm_head.weight"} <= set(moved)
