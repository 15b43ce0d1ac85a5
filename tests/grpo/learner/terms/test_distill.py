"""On-policy distillation: hand-worked numbers, the gradient of the KL by autograd, transformers' own forward, a run."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from recorded import groups_of
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from grpo.learner.learner import Learner
from grpo.learner.terms.distill import distill, top_logprobs
from grpo.run.stop import Stopped
from grpo.task.check import check_plan
from grpo.task.reward_models import check_teacher
from grpo.train import train
from review.readers.run_folder import read_metrics
from rewards.records import read_rollouts


def test_the_likeliest_tokens_of_a_position_are_those_of_log_softmax():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 4, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    best = (hidden @ head.T / 0.7).log_softmax(-1).topk(3)
    for elements in (1, 14, 700):
        ids, logprobs = top_logprobs(hidden, head, 3, 0.7, elements=elements)
        assert torch.equal(ids, best.indices)
        assert torch.allclose(logprobs, best.values)
        assert not logprobs.requires_grad
    assert top_logprobs(hidden, head, 99)[0].shape == (5, 7)


def learner_of(policy, teacher, temperature, top_k, **options) -> Learner:
    options = LearnerOptions(**{"learning_rate": 1e-3, "max_grad_norm": 1e9} | options)
    given = {"teacher": teacher, "temperature": temperature, "top_k": top_k}
    return small_learner(policy, options, MTPOptions(loss_weight=0.0), LossOptions(advantage="distill"), **given)


def test_an_advantage_is_the_log_ratio_of_the_teacher_to_the_policy():
    old, teacher = torch.tensor([[0.5, 0.25, 0.5]]).log(), torch.tensor([[0.25, 0.5, 0.1]]).log()
    log2 = torch.tensor(2.0).log()
    found = distill(old, teacher, torch.tensor([[True, True, False]]))
    assert torch.allclose(found, torch.stack([-log2, log2, torch.tensor(0.0)])[None])


def test_its_policy_gradient_is_in_expectation_that_of_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    advantages = distill(logprobs.detach()[None], teacher[None], torch.ones(1, 7, dtype=torch.bool))[0]
    [found] = torch.autograd.grad((logprobs.exp().detach() * advantages * logprobs).sum(), logits, retain_graph=True)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=teacher)
    )
    [expected] = torch.autograd.grad(-kl, logits)
    assert torch.allclose(found, expected, atol=1e-12)


def by_hand(policy, teacher, groups, temperature, k):
    """The gradient and the KL by one forward of transformers for each completion; with k over the teacher's k likeliest
    tokens and the rest, from whole distributions."""
    total, kl = torch.zeros(()), 0.0
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    prompts = [group.prompt for group in groups for _ in group.completions]
    for prompt, completion in zip(prompts, (c for group in groups for c in group.completions), strict=True):
        ids, start = torch.tensor([prompt.token_ids + completion.token_ids]), len(prompt.token_ids)
        own, other = (
            (one.trunk(input_ids=ids, use_cache=False).logits[0, start - 1 : -1] / temperature).log_softmax(-1)
            for one in (policy, teacher)
        )
        if k is None:
            own, other = (x.gather(-1, ids[0, start:, None])[:, 0] for x in (own, other.detach()))
            total = total - ((other - own.detach()) * own).sum() / tokens
            kl += (own.detach() - other).sum().item() / tokens
        else:
            order = other.detach().argsort(-1, descending=True)
            p, q = (x.exp().gather(-1, order) for x in (own, other.detach()))
            p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) for x in (p, q))
            divergence = (p * (p / q).log()).sum() / tokens
            total, kl = total + divergence, kl + divergence.item()
    total.backward()
    return {name: p.grad for name, p in policy.trunk.named_parameters() if p.grad is not None}, kl


@pytest.mark.parametrize("kind", ["deepseek", "llama"])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize(("budget", "temperature"), [(10_000, 1.0), (12, 0.7)])
def test_the_learners_gradient_is_that_of_transformers_own_forward(
    random_policy, hf_policy, kind, budget, temperature, top_k
):
    policy = random_policy(1)
    teacher = random_policy(2) if kind == "deepseek" else hf_policy("llama", 2)
    groups, scores = groups_of(3)
    scores[1].rewards[:] = [0.5] * 3  # tied: the teacher teaches all the same
    copies = copy.deepcopy(policy)
    before = copy.deepcopy(teacher.trunk.state_dict())
    learner = learner_of(policy, teacher, temperature, top_k, tokens_per_micro_batch=budget)
    metrics = learner.step(learner.prepare(groups, scores), 1)
    expected, kl = by_hand(copies, teacher, groups, temperature, top_k)
    assert metrics["loss/teacher_kl"] == pytest.approx(kl, abs=1e-4)
    assert len(expected) > 10
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6:
            found = policy.trunk.get_parameter(name).grad
            assert torch.allclose(found, gradient, atol=1e-3 * gradient.norm().item() + 1e-7), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.trunk.state_dict().items())


@pytest.mark.parametrize("top_k", [None, 3])
def test_truncated_completions_that_are_masked_teach_nothing(random_policy, top_k):
    """The teacher adds nothing for them either: gradient and KL are those of a batch whose others are the same."""
    gradients, kl = [], []
    for reason, tokens in (("length", [5, 6, 7, 8]), ("length", [9, 10, 11, 12]), ("stop", [5, 6, 7, 8])):
        policy = random_policy(1)
        loss = LossOptions(advantage="distill", mask_truncated_completions=True)
        given = {"teacher": random_policy(2), "top_k": top_k}
        learner = small_learner(policy, LearnerOptions(max_grad_norm=1e9), MTPOptions(loss_weight=0.0), loss, **given)
        groups, scores = groups_of(2)
        groups[0].completions[1] = replace(
            groups[0].completions[1], token_ids=tokens, logprobs=[-2.0] * 4, finish_reason=reason
        )
        kl.append(learner.forward_backward(learner.prepare(groups, scores))["loss/teacher_kl"])
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trunk.parameters() if p.grad is not None]))
    assert kl[0] == pytest.approx(kl[1], rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert kl[2] != pytest.approx(kl[0], rel=1e-3)
    assert (gradients[2] - gradients[0]).abs().max() > 1e-3


def options_of(folders, micro_config, output, **given):
    options = {
        "model": str(folders / "student"),
        "loss.advantage": "distill",
        "sft.steps": 0,
        "rollout.draft_tokens": 0,
    }
    return micro_config(output, **options | {"distill.teacher": str(folders / "teacher")} | given)


def test_advantages_of_each_token_are_added_token_by_token(random_policy):
    policy, teacher = random_policy(1), random_policy(2)
    groups, scores = groups_of(3)
    gradients = []
    for advantages in ([[0.5] * 3] * len(groups), [[[0.5] * len(c.token_ids) for c in g.completions] for g in groups]):
        copies = copy.deepcopy(policy)
        learner = learner_of(copies, teacher, 1.0, None, tokens_per_micro_batch=4096)
        learner.step(learner.prepare(groups, scores, advantages), 1)
        gradients.append([p.grad for p in copies.trunk.parameters() if p.grad is not None])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*gradients, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("top_k", [None, 4])
def test_a_run_comes_nearer_to_its_teacher_and_goes_on_to_the_same_bits(folders, micro_config, tmp_path, top_k):
    options = {"steps": 12, "prompts_per_step": 8, "learner.learning_rate": 2e-2, "checkpoint.every": 6}
    options["distill.top_k"] = top_k
    whole = train(options_of(folders, micro_config, tmp_path / "whole", **options))
    kl = [line["loss/teacher_kl"] for line in read_metrics(tmp_path / "whole") if "loss/teacher_kl" in line]
    assert len(kl) == 12
    assert sum(kl[-3:]) < 0.8 * sum(kl[:3])
    assert {line["advantage"] for line in read_rollouts(tmp_path / "whole", 1)} == {0.0}  # the score has no part in it
    config = options_of(folders, micro_config, tmp_path / "cut", **options)
    with pytest.raises(Stopped, match="stopped after step 6"):
        train(config, stop_after=6)
    cut = train(config, resume="auto")
    tensors = cut.policy.trunk.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in whole.policy.trunk.state_dict().items())


def test_another_tokenizer_is_refused_before_anything_is_loaded(folders, micro_config, tmp_path, monkeypatch):
    monkeypatch.setattr("grpo.source.policy_source.load_found", lambda *_, **__: pytest.fail("a policy was loaded"))
    check_teacher(options_of(folders, micro_config, tmp_path / "run"))
    file = tmp_path / "other/tokenizer.json"
    shutil.copytree(folders / "teacher", file.parent)
    original = json.loads(file.read_text())

    def refused(message):
        with pytest.raises(ValueError, match=message):
            train(options_of(folders, micro_config, tmp_path / "run", **{"distill.teacher": str(file.parent)}))

    vocabulary = original["model"]["vocab"]
    swapped = vocabulary | {"1": vocabulary["2"], "2": vocabulary["1"]}
    file.write_text(json.dumps(original | {"model": original["model"] | {"vocab": swapped}}))
    refused(r"2 of \d+ tokens have another id or are not there, the first of them '1' \(\d+ and \d+\)")
    spaced = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    file.write_text(json.dumps(original | {"pre_tokenizer": spaced}))
    refused(r"is \[.*\] for one and \[.*\] for the other")
    for given, message in (
        ({"model": "tiny"}, r"model='tiny' .a preset.: a preset learns a tokenizer"),
        ({"distill.teacher": "tiny"}, "distill.teacher=tiny .a preset. .*: it has learned nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            check_plan(options_of(folders, micro_config, tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()
