"""examples/03_grpo_from_scratch.py: its loss and gradient are those of the learner, and its reward rises."""

import copy
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_learner import small_learner

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from rewards.data.letter_sorting import letter_sorting
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples/03_grpo_from_scratch.py"
PAGE = ROOT / "docs/grpo-in-200-lines.md"
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])  # the last group has zero variance
QUESTIONS = ["Tom has 3 apples.", "Ada", "How many pens are there now?"]


@pytest.fixture
def scratch():
    """The module, loaded anew, so that a test may change its constants."""
    spec = importlib.util.spec_from_file_location("grpo_from_scratch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampled_batch(scratch, policy):
    """Three groups of three completions, sampled by the file."""
    tokenizer = policy.tokenizer
    rows = [tokenizer(question).input_ids for question in QUESTIONS for _ in range(3)]
    prompts_BT, real_BT = scratch.padded(rows)
    torch.manual_seed(0)
    tokens_BT, real_BT, mask_BT = scratch.sample(policy.trunk, prompts_BT, real_BT, tokenizer.eos_token_id)
    lengths = torch.arange(1, 10)[:, None]  # every completion is cut to another length, as if it had ended there
    cut_BT = mask_BT & (mask_BT.cumsum(dim=1) > lengths)
    return rows, tokens_BT, real_BT & ~cut_BT, mask_BT & ~cut_BT


def groups_of(rows, tokens_BT, mask_BT, logprobs_BS):
    """The same batch as the learner reads it."""
    completions = [
        Completion(tokens[mask].tolist(), logprobs[mask[1:]].tolist(), "", "stop", 0)
        for tokens, mask, logprobs in zip(tokens_BT, mask_BT, logprobs_BS, strict=True)
    ]
    return [
        RolloutGroup(Prompt(f"p/{first}", "", rows[first]), completions[first : first + 3])
        for first in range(0, len(rows), 3)
    ]


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("updates", [1, 2])
def test_the_loss_and_its_gradient_are_those_of_the_learner(scratch, micro_policy, updates):
    """With one update the ratio is 1; with two the weights have moved, and the clip acts."""
    policy = micro_policy(0)
    rows, tokens_BT, real_BT, mask_BT = sampled_batch(scratch, policy)
    with torch.no_grad():
        old_BS = scratch.logprobs_of(policy.trunk, tokens_BT, real_BT)
    options = LearnerOptions(learning_rate=1e-2, max_grad_norm=1e9, updates_per_batch=updates)
    loss_options = LossOptions(loss_type="dapo", scale_rewards="none", epsilon=scratch.EPSILON)
    learner = small_learner(policy, options, MTPOptions(loss_weight=0), loss_options)
    scores = [GroupScore(row, {"reward": row}) for row in REWARDS.tolist()]
    batch = learner.prepare(groups_of(rows, tokens_BT, mask_BT, old_BS), scores, step=1)
    metrics = learner.forward_backward(batch)
    if updates == 2:
        learner.optim_step()
        metrics = learner.forward_backward(batch)
        assert metrics["policy/clip_fraction"] > 0.1
    expected = gradients(learner.policy.trunk)

    trunk = copy.deepcopy(learner.policy.trunk)
    trunk.zero_grad()
    policy_BS = scratch.logprobs_of(trunk, tokens_BT, real_BT)
    loss = scratch.grpo_loss(policy_BS, old_BS, scratch.advantages_of(REWARDS).flatten(), mask_BT[:, 1:])
    loss.backward()

    assert loss.item() == pytest.approx(metrics["loss/policy"], abs=1e-5)
    found = gradients(trunk)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-9, name


def test_sampling_with_a_cache_and_padding_draws_from_the_log_probabilities_that_are_trained(
    scratch, micro_policy, monkeypatch
):
    """With the same noise, sampling row by row without a cache gives the same tokens."""
    policy = micro_policy(0)
    trunk, end = policy.trunk, policy.tokenizer.eos_token_id
    rows = [policy.tokenizer(question).input_ids for question in QUESTIONS]
    most_likely = lambda probabilities, num_samples: probabilities.argmax(dim=-1, keepdim=True)  # noqa: E731
    monkeypatch.setattr(torch, "multinomial", most_likely)
    tokens_BT, _, mask_BT = scratch.sample(trunk, *scratch.padded(rows), end)
    for row, tokens, mask in zip(rows, tokens_BT, mask_BT, strict=True):
        read = list(row)
        for token in tokens[mask].tolist():
            with torch.no_grad():
                assert trunk(torch.tensor([read])).logits[0, -1].argmax() == token
            read.append(token)


def test_nothing_after_the_end_token_is_in_the_mask(scratch, micro_policy, monkeypatch):
    policy = micro_policy(0)
    end = policy.tokenizer.eos_token_id
    drawn = iter([5, end, 6, 7])
    monkeypatch.setattr(scratch, "MAX_COMPLETION_TOKENS", 4)
    monkeypatch.setattr(torch, "multinomial", lambda p, num_samples: torch.full((len(p), 1), next(drawn)))
    tokens_BT, real_BT, mask_BT = scratch.sample(policy.trunk, *scratch.padded([[9, 9], [9]]), end)
    assert tokens_BT[:, 2:].tolist() == [[5, end, 6, 7]] * 2
    assert mask_BT.tolist() == [[False, False, True, True, False, False]] * 2
    assert real_BT.tolist() == [[True, True, True, True, False, False], [False, True, True, True, False, False]]


def test_the_reward_is_that_of_the_demo(scratch):
    [in_order] = [runpy.run_path(str(ROOT / "examples/01_demo.py"))["in_order"]]
    problems = letter_sorting("train", count=20)
    answers = [problem["answer"] for problem in problems]
    shortened = [answer[:-2] for answer in answers]
    turned = [" ".join(reversed(answer.split())) for answer in answers]
    for completions in (answers, shortened, turned, ["so: " + answer for answer in answers], [""] * 20):
        questions = [problem["question"] for problem in problems]
        expected = in_order(prompts=questions, completions=completions, question=questions)
        pairs = zip(questions, completions, strict=True)
        assert [scratch.reward_of(*pair) for pair in pairs] == expected
    assert scratch.reward_of(problems[0]["question"], answers[0]) == 1


def share_of_lower_case(question, completion):
    return sum(letter.islower() for letter in completion) / max(len(completion), 1)


def short_run(scratch, policy, steps):
    torch.manual_seed(0)
    questions = ["Tom has 3 apples."] * (scratch.P * steps)
    return torch.stack(list(scratch.grpo(policy.trunk, policy.tokenizer, questions, share_of_lower_case)))


def test_the_reward_of_a_short_run_rises_and_a_seed_gives_it_again(scratch, micro_policy, monkeypatch):
    monkeypatch.setattr(scratch, "P", 4)
    monkeypatch.setattr(scratch, "LEARNING_RATE", 1e-2)
    rewards_NPG = short_run(scratch, micro_policy(0), 20)
    assert rewards_NPG.shape == (20, 4, scratch.G)
    assert rewards_NPG[-3:].mean() > rewards_NPG[:3].mean() + 0.1
    assert torch.equal(rewards_NPG[:4], short_run(scratch, micro_policy(0), 4))


@pytest.mark.long
@pytest.mark.slow
def test_the_script_learns_to_sort(tmp_path):
    """In its first 20 steps, which do not depend on how many follow."""
    text = FILE.read_text(encoding="utf-8")
    assert text.count("STEPS, LEARNING_RATE = 60,") == 1
    (tmp_path / "short.py").write_text(text.replace("STEPS, LEARNING_RATE = 60,", "STEPS, LEARNING_RATE = 20,"))
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "short.py")]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = r"^step (\d+)  reward ([\d.]+)  zero-variance groups \d+%$"
    found = re.findall(line, done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in found] == [5, 10, 15, 20]
    rewards = [float(reward) for _, reward in found]
    assert rewards[-1] > rewards[0] + 0.05
