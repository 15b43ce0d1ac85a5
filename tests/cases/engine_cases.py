"""Prompts, a policy whose head has learned something, and what the tests of engine, shard and publications share."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.cli.parse import main
from grpo.learner.batch import collate
from grpo.learner.likelihood import logprobs_of_groups
from grpo.learner.row import PackedRow, Sample
from policies.mtp import draft_loss
from policies.policy import Policy
from rollout.decoding.engine import Engine
from rollout.drafts.head import Drafter
from rollout.group import Completion, Prompt, RolloutGroup
from rollout.sampling import Noise, SamplingParams, choose, row_key

CPU = torch.device("cpu")
STOPS = tuple(range(7, 280, 15))  # about one token in fifteen


def prompts_of(*lengths: int, seed: int = 0) -> list[Prompt]:
    rng = random.Random(seed)
    return [Prompt(f"p/{i}", "", [rng.randrange(2, 250) for _ in range(n)]) for i, n in enumerate(lengths)]


PROMPTS = prompts_of(9, 1, 17, 4, 4, 2, 30, 11)
PARAMS = SamplingParams(group_size=4, temperature=0.8, max_completion_tokens=40, stop_token_ids=STOPS, seed=5, step=2)


def completions(groups: list[RolloutGroup]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def tokens(groups: list[RolloutGroup]) -> list[list[int]]:
    return [completion.token_ids for completion in completions(groups)]


def taught(policy: Policy, temperature: float, steps: int) -> Policy:
    """The policy with an MTP head that learned a little on the policy's own rollouts."""
    optimizer = torch.optim.AdamW(policy.mtp.parameters(), lr=3e-3)
    params = replace(PARAMS, temperature=temperature, max_completion_tokens=24)
    groups = Engine(policy).sample(PROMPTS, params)
    mini = collate(
        [PackedRow(g.prompt.token_ids, [Sample(0, c.token_ids) for c in g.completions]) for g in groups], CPU
    )
    with torch.no_grad():
        hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
        before = hidden.gather(1, mini.before[..., None].expand_as(hidden))
    for _ in range(steps):
        outputs = policy.unroll(before, mini.token_ids, mini.position_ids, mini.head_segment, 4)
        loss = draft_loss(outputs, before, mini.segment, policy.lm_head, temperature) / mini.scored.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def assert_lossless(engine: Engine, prompts: list[Prompt], params: SamplingParams, depths=(1, 2, 3, 4)) -> int:
    """Samples with every number of drafts; returns how many tokens were compared with those of k = 0."""
    plain = engine.sample(prompts, replace(params, draft_tokens=0))
    compared = 0
    for k in depths:
        drafted = engine.sample(prompts, replace(params, draft_tokens=k))
        for with_drafts, without in zip(completions(drafted), completions(plain), strict=True):
            assert with_drafts.token_ids == without.token_ids
            assert with_drafts.finish_reason == without.finish_reason
            assert with_drafts.text == without.text
            # The same tokens are scored the same, to the rounding of another batch shape.
            assert with_drafts.logprobs == pytest.approx(without.logprobs, abs=1e-4)
            assert with_drafts.draft.target_forwards <= without.draft.target_forwards
            compared += len(without.token_ids)
        forwards = [sum(c.draft.target_forwards for c in completions(groups)) for groups in (drafted, plain)]
        assert forwards[0] < forwards[1]
    return compared


@torch.no_grad()
def states(policy: Policy, prompt: list[int], *completions: list[int]) -> torch.Tensor:
    """Final hidden states [T, D] of a packed row."""
    mini = collate([PackedRow(prompt, [Sample(i, ids) for i, ids in enumerate(completions)])], CPU)
    return policy.hidden(mini.token_ids, mini.position_ids, mini.segment)[0]


def assert_packed_as_alone(policy: Policy) -> None:
    """Packed completions are those of rows of their own."""
    prompt, ids = [3, 4, 5, 6, 7], [[8, 9, 10], [11], [12, 13]]
    together, start = states(policy, prompt, *ids), 5
    for own in ids:
        alone = states(policy, prompt, own)[5:]
        torch.testing.assert_close(together[start : start + len(own)], alone, rtol=1e-5, atol=1e-5)
        start += len(own)


def assert_learner_agrees(learning: Policy, groups: list[RolloutGroup], temperature: float) -> None:
    """Contract 2: what the sampler said of its tokens is what the learner says, to 1e-4."""
    learned = [own for rows in logprobs_of_groups(learning, groups, temperature) for own in rows]
    for completion, own in zip(completions(groups), learned, strict=True):
        assert completion.logprobs == pytest.approx(own, abs=1e-4)


def spied_drafts(patch: pytest.MonkeyPatch) -> list[tuple[int, int, list[int]]]:
    """Gets an entry for each live row whenever the head drafts from now on: its index, its count, the drafts."""
    asked, draft = list[tuple[int, int, list[int]]](), Drafter.draft

    def spy(drafter, live, depth, noise, temperature):
        drafts, confident = draft(drafter, live, depth, noise, temperature)
        for r in live.alive.nonzero()[:, 0].tolist():
            asked.append((int(live.index[r]), int(live.count[r]), drafts[r].tolist()))
        return drafts, confident

    patch.setattr(Drafter, "draft", spy)
    return asked


def drafts_in_training(
    policy: Policy, prompt: Prompt, verified: list[int], drafts: list[int], params: SamplingParams, sample: int
) -> list[int]:
    """What the unrolled head drafts behind the verified tokens, with the noise of this completion."""
    logits = unrolled_logits(policy, prompt, verified, drafts)
    key = torch.tensor([row_key(params, prompt.prompt_id, sample)], dtype=torch.int32)
    noise = Noise(key, len(verified) + torch.arange(len(drafts)), logits.shape[1])
    return choose(logits, params.temperature, noise)[0].tolist()


@torch.no_grad()
def unrolled_logits(policy: Policy, prompt: Prompt, verified: list[int], drafts: list[int]) -> torch.Tensor:
    """[k, V]: what the unrolled head, as training sees it, says of each of these drafts after the verified tokens."""
    mini = collate([PackedRow(prompt.token_ids, [Sample(0, verified + drafts)])], CPU)
    hidden = policy.hidden(mini.token_ids, mini.position_ids, mini.segment)
    before = hidden.gather(1, mini.before[..., None].expand_as(hidden))
    outputs = policy.unroll(before, mini.token_ids, mini.position_ids, mini.head_segment, len(drafts))
    entry = len(prompt.token_ids) + len(verified) - 1  # of the newest verified token
    return torch.stack([output[0, entry] for output in outputs]) @ policy.lm_head.T


@torch.no_grad()
def enumerated(
    policy: Policy, prompt_token_ids: list[int], temperature: float, length: int, stop: int
) -> dict[tuple, float]:
    """Probability of every completion of at most `length` tokens, by the stock model."""
    vocabulary, found, open_ends = policy.lm_head.shape[0], {}, {(): 0.0}
    for place in range(length):
        prefixes = list(open_ends)
        rows = torch.tensor([prompt_token_ids + list(prefix) for prefix in prefixes])
        logprobs = (policy.trunk(rows, use_cache=False).logits[:, -1] / temperature).double().log_softmax(-1)
        longer = {
            (*prefix, v): open_ends[prefix] + logprobs[i, v].item()
            for i, prefix in enumerate(prefixes)
            for v in range(vocabulary)
        }
        done = {ids for ids in longer if ids[-1] == stop or place == length - 1}
        found |= {ids: math.exp(longer[ids]) for ids in done}
        open_ends = {ids: score for ids, score in longer.items() if ids not in done}
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def assert_stock_is_refused(model: str, out: Path, what: str, capsys: pytest.CaptureFixture) -> None:
    """What stock transformers or vLLM would read is not written of `model`."""
    for command in (["export", model, str(out)], ["quantize", model, str(out), "--calibrate", "word_problems"]):
        assert main(command) == 1
        assert what in capsys.readouterr().err
    assert not out.exists()
