"""The parts of a step's gradient, against gradients by transformers' own forward and numbers worked out by hand."""

import math

import pytest
import torch
from small_learner import small_learner

from grpo.cli.why.reading import NO_CLIP, Part, Reader, ReadLearner, without
from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.config.loss import LossOptions
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

PROMPTS = [[5, 6, 7], [8, 9], [11, 12, 13, 14]]
IDS = [[[20, 21], [22, 23, 24]], [[30, 31, 32], [33]], [[40, 41], [42, 43]]]
REWARDS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]  # the third group is tied
ADVANTAGES = [[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]]  # scale_rewards none: the reward less the mean
TOKENS = 13


@pytest.fixture
def learner(random_policy):
    def build(updates: int = 1, rate: float = 1e-3, **loss) -> ReadLearner:
        options = LearnerOptions(learning_rate=rate, max_grad_norm=0.1, updates_per_batch=updates)
        loss = LossOptions(scale_rewards="none", **loss)
        return small_learner(random_policy(0), options, MTPOptions(loss_weight=0.0), loss, kind=ReadLearner)

    return build


def groups(logprob: float = -1.0, reasons=("stop", "stop")) -> list[RolloutGroup]:
    return [
        RolloutGroup(
            Prompt(f"p/{g}", "", PROMPTS[g]),
            [Completion(c, [logprob] * len(c), "", reasons[i], 0) for i, c in enumerate(ids)],
        )
        for g, ids in enumerate(IDS)
    ]


def scores() -> list[GroupScore]:
    return [GroupScore(list(row), {"exact": list(row)}) for row in REWARDS]


def read(learner: ReadLearner, made=None, **given) -> Reader:
    """Both passes, each from the first state."""
    tensors, state = learner.state()
    kept = {name: {n: t.detach().clone() for n, t in part.items()} for name, part in tensors.items()}
    batch = learner.prepare(made or groups(), scores())
    whole = learner.read(Reader(), batch)
    learner.optimizer.state.clear()
    learner.load_state(kept, state)
    return learner.read(Reader(whole.wholes, **given), batch)


@torch.no_grad()
def stock_logprobs(policy, g: int) -> torch.Tensor:
    rows = [torch.tensor([PROMPTS[g] + ids]) for ids in IDS[g]]
    all_logprobs = [policy.trunk(input_ids=row).logits[0].log_softmax(-1)[len(PROMPTS[g]) - 1 : -1] for row in rows]
    return torch.cat(
        [found.gather(1, torch.tensor(ids)[:, None])[:, 0] for found, ids in zip(all_logprobs, IDS[g], strict=True)]
    )


def stock_gradient(policy, g: int, token: tuple[int, int] | None = None) -> torch.Tensor:
    """Of -Σ Â log π / M over a group's tokens (or of one of them), by a forward of each row that is not packed."""
    moved = [p for p in policy.trunk.parameters() if p.requires_grad]
    total = torch.zeros(())
    for i, ids in enumerate(IDS[g]):
        row = torch.tensor([PROMPTS[g] + ids])
        logprobs = policy.trunk(input_ids=row).logits[0].log_softmax(-1)
        for t, chosen in enumerate(ids):
            if token in (None, (i, t)):
                total = total - ADVANTAGES[g][i] * logprobs[len(PROMPTS[g]) - 1 + t, chosen] / TOKENS
    found = torch.autograd.grad(total, moved, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if f is None else f.flatten() for p, f in zip(moved, found, strict=True)]
    )


def test_the_parts_are_the_gradients_of_their_groups_and_add_up_to_the_whole(learner):
    stock = [stock_gradient(learner().policy, g) for g in range(3)]
    whole = sum(stock)
    reader = read(learner())
    assert reader.norm == pytest.approx(whole.norm().item(), rel=1e-4)
    assert sum(part.dot for part in reader.groups.values()) == pytest.approx(reader.norm**2, rel=1e-5)
    for g in (0, 1):
        part, rest = reader.groups[g], whole - stock[g]
        assert part.norm == pytest.approx(stock[g].norm().item(), rel=1e-4)
        assert part.cosine(reader.norm) == pytest.approx(torch.cosine_similarity(stock[g], whole, 0).item(), abs=1e-4)
        expected = torch.cosine_similarity(stock[g], rest, 0).item()
        assert part.cosine_with_rest(reader.norm) == pytest.approx(expected, abs=1e-4)
    assert reader.groups[2].square == 0.0
    assert reader.groups[2].cosine(reader.norm) == 0.0


def test_the_tokens_of_a_group_are_its_part(learner):
    reader = read(learner(), tokens_of=1, most=99)
    assert sorted(reader.tokens) == [(2, 0), (2, 1), (2, 2), (3, 0)]  # [group, sample] flattened, and the position
    assert sum(part.dot for part in reader.tokens.values()) == pytest.approx(reader.groups[1].dot, rel=1e-4)
    for (index, t), part in reader.tokens.items():
        stock = stock_gradient(learner().policy, 1, (index - 2, t))
        assert part.norm == pytest.approx(stock.norm().item(), rel=1e-4)
        assert part.weight == pytest.approx(ADVANTAGES[1][index - 2] / TOKENS)  # above 0: raised
    assert len(read(learner(), tokens_of=1, most=2).tokens) == 2


def test_a_step_that_is_read_moves_what_the_step_moves(learner):
    plain, seen = learner(updates=3, rate=1e-5), learner(updates=3, rate=1e-5)
    metrics = plain.step(plain.prepare(groups(), scores()), 1)
    reader = seen.read(Reader(), seen.prepare(groups(), scores()))
    assert len(reader.wholes) == metrics["learner/updates"] == 3
    last = math.sqrt(sum((g * g).sum().item() for g in reader.wholes[-1] if g is not None))
    assert last == pytest.approx(metrics["learner/grad_norm"], rel=1e-4)
    assert last > 0.1
    for (name, a), b in zip(plain.policy.trunk.named_parameters(), seen.policy.trunk.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-7), name
    assert seen.reader is None


def test_what_was_removed_is_said_by_its_cause(learner):
    cut = groups(reasons=("stop", "length"))
    removed = read(learner(mask_truncated_completions=True), cut).groups[0].removed()
    # Without the mask 2 tokens weigh ½ and 3 weigh ½, over the same number of tokens; with it the 3 weigh nothing.
    assert removed == {"clip": 0.0, "truncation": pytest.approx(3 / 5)}
    # π_old / μ is e^(log π + 9), far above 3: the weight is 3 in place of 1, so 2 of 1 was changed.
    weighted = read(learner(importance_correction="token_truncate"), groups(logprob=-20.0)).groups[1].removed()
    assert weighted == {"clip": 0.0, "importance weights": pytest.approx(2.0)}


def test_the_clip_removes_what_it_holds_back_at_the_second_update(learner):
    """A token weighs |Â| at the first update, whose ratio is 1, and r |Â| at the second; there the clip holds some."""
    options = {"rate": 3e-2, "epsilon": 0.01}
    reader, once = read(learner(updates=2, **options)), learner(**options)
    first = [stock_logprobs(once.policy, g) for g in (0, 1)]
    once.step(once.prepare(groups(), scores()), 1)
    for g in (0, 1):
        ratio = (stock_logprobs(once.policy, g) - first[g]).exp()
        advantage = torch.cat([torch.full((len(ids),), ADVANTAGES[g][i]) for i, ids in enumerate(IDS[g])])
        held = ((ratio > 1.01) & (advantage > 0)) | ((ratio < 0.99) & (advantage < 0))
        expected = (0.5 * ratio)[held].sum() / (0.5 + 0.5 * ratio).sum()
        assert reader.groups[g].removed()["clip"] == pytest.approx(expected.item(), rel=1e-3)
        assert held.any()
    assert read(learner(**options)).groups[0].removed()["clip"] == 0.0


def test_cosines_and_what_the_loss_has_by_hand():
    assert list(without(LossOptions(loss_type="reinforce"), None)) == ["as it is"]
    found = without(LossOptions(beta=0.1, top_entropy_quantile=0.2, delta=2.0), "token_mask")
    assert list(found) == ["as it is", "clip", "low entropy", "importance weights"]
    assert (found["clip"][0].delta, found["clip"][0].epsilon) == (None, NO_CLIP)
    assert all(options.beta == 0 for options, _ in found.values())
    # g = (3, 0) and the rest (-1, 1): G = (2, 1).
    part = Part(dot=6.0, square=9.0)
    assert part.cosine(math.sqrt(5)) == pytest.approx(2 / math.sqrt(5))
    assert part.cosine_with_rest(math.sqrt(5)) == pytest.approx(-1 / math.sqrt(2))
    assert Part().cosine(1.0) == Part().cosine_with_rest(1.0) == 0.0
    assert Part(dot=4.0, square=4.0).cosine_with_rest(2.0) == 0.0  # there is no rest
