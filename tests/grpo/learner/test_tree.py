"""Contract 10 of trees: what rows begin with alike is read once, and that changes nothing."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
import zoo
from small_learner import small_learner, supervised_learner

from grpo.config.balance import BalanceOptions
from grpo.config.learner import LearnerOptions, MTPOptions, SftMTPOptions
from grpo.config.loss import LossOptions
from grpo.learner import tree
from grpo.learner.batch import TrainingBatch, collate, micro_batches
from grpo.learner.likelihood import Likelihood
from grpo.learner.parallel import Ranks
from grpo.learner.prepare import supervised
from grpo.learner.row import PackedRow, Sample
from grpo.learner.tree import Tree, forest
from policies.attention import Packing
from policies.paths import Paths
from policies.routing.routers import routers

CPU = torch.device("cpu")
ALONE = 10**9  # no beginning has so many tokens


@pytest.fixture(autouse=True)
def shares(monkeypatch):
    """Two tokens are worth sharing, or as many as a test says."""
    monkeypatch.setattr(tree, "SHARED", 2)
    return lambda least: monkeypatch.setattr(tree, "SHARED", least)


def _rows():
    """Two questions after the system prompt 1 2. To the first one both samples say 7 8 before tools answer otherwise.
    After the answer to the second one an agent has asked again."""
    fork = [True, True, False, False, True], [True, True, False, True, True]
    samples = [Sample(0, [7, 8, 5, 5, 9], sampled=fork[0]), Sample(1, [7, 8, 6, 9, 9], sampled=fork[1])]
    return [
        PackedRow([1, 2, 3, 3], samples),
        PackedRow([1, 2, 4, 4], [Sample(2, [7, 7, 7])], group=1),
        PackedRow([1, 2, 4, 4, 7, 7, 7, 6, 6], [Sample(2, [8], start=3)], group=1),
    ]


def test_a_tree_by_hand():
    trees = forest(_rows(), 99)
    mini = collate(trees, CPU)
    found = {
        name: getattr(mini, name)[0].tolist() for name in ("token_ids", "segment", "until", "turn", "position_ids")
    }
    assert found == {
        "token_ids": [1, 2, *[3, 3], *[7, 8], *[5, 5, 9], *[6, 9, 9], *[4, 4], *[7, 7, 7], *[6, 6], 8],
        "segment": [0, 0, *[1, 1], *[2, 2], *[3, 3, 3], *[4, 4, 4], *[5, 5], *[6, 6, 6], *[7, 7], 8],
        "until": [8, 8, *[4, 4], *[4, 4], *[3, 3, 3], *[4, 4, 4], *[8, 8], *[8, 8, 8], *[8, 8], 8],
        "turn": [0, 0, *[0, 0], *[1, 1], *[-1, -1, 2], *[-1, 3, 3], *[0, 0], *[4, 4, 4], *[0, 0], 5],
        "position_ids": [0, 1, *[2, 3], *[4, 5], *[6, 7, 8], *[6, 7, 8], *[2, 3], *[4, 5, 6], *[7, 8], 9],
    }
    assert mini.before.tolist() == [[0, 0, 1, 2, 3, 4, 5, 6, 7, 5, 9, 10, 1, 12, 13, 14, 15, 16, 17, 18]]
    assert mini.numbers.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert mini.by_completion(mini.of_scored(mini.token_ids.float())).tolist() == [
        [7, 8, 0, 0, 9],
        [7, 8, 0, 9, 9],
        [7, 7, 7, 0, 0],
        [8, 0, 0, 0, 0],
    ]
    assert mini.times(torch.tensor([1, 1, 0, 1]))[0].tolist() == [0] * 4 + [2, 2, 0, 0, 1, 0, 1, 1] + [0] * 7 + [1]
    assert (mini.trees, [tree.length for tree in trees]) == ([0, 0, 0], [20])


def test_rows_that_begin_otherwise_or_that_have_no_room_stay_alone(shares):
    rows = [*_rows(), PackedRow([2, 1, 3], [Sample(3, [1])]), replace(_rows()[0], learns=False)]
    held = lambda most, **how: [[rows.index(row) for row in one.rows] for one in forest(rows, most, **how)]  # noqa: E731
    assert held(99) == [[0, 1, 2], [3], [4]]
    assert held(19) == [[0, 1], [2], [3], [4]]
    assert held(99, within_groups=True) == [[0], [1, 2], [3], [4]]
    shares(3)
    assert held(99) == [[0], [1, 2], [3], [4]]
    shares(ALONE)
    assert held(99) == [[0], [1], [2], [3], [4]]


def test_no_turn_is_cut_and_no_branch_that_goes_on_has_a_single_token():
    """The first two say 7 8 9 and 7 8 8 in one turn; the prompts of the others end in the middle of it, and one after
    it."""
    rows = [
        PackedRow([1, 2], [Sample(0, [7, 8, 9]), Sample(1, [7, 8, 8])]),
        PackedRow([1, 2, 7, 8], [Sample(2, [9])]),
        PackedRow([1, 2, 7, 8, 9, 3], [Sample(3, [9])]),
        PackedRow([1, 2, 7, 8, 9, 3, 3], [Sample(4, [9])]),
    ]
    branches = [branch.token_ids for branch in Tree(rows).laid()]
    assert branches == [[1, 2], [7, 8, 9], [3, 3], [9], [7, 8, 8], [7, 8], [9], [9, 3], [9]]


# ---- random trees ---------------------------------------------------------------------------------------------------


def _recorded(ids, routers_and_experts, k):
    """Which experts every router has chosen for each token: a function of all that was read up to it."""
    routers_, experts = routers_and_experts
    of_token = [
        [random.Random(f"{ids[: n + 1]}{r}").sample(range(experts), k) for r in range(routers_)]
        for n in range(len(ids))
    ]
    return torch.tensor(of_token)


def random_rows(seed, recorded=None):
    """Prompts and samples that begin like others or with what others have said, and what tools wrote among it."""
    rng = random.Random(seed)
    ids = lambda most: [rng.randint(2, 5) for _ in range(rng.randint(1, most))]  # noqa: E731
    read, rows, index = [ids(6)], [], itertools.count()
    for group in range(rng.randint(2, 5)):
        known = rng.choice(read)
        prompt, samples = known[: rng.randint(1, len(known))] + rng.choice([[], ids(4)]), []
        for _ in range(rng.randint(1, 3)):
            alike = [
                other[len(prompt) :] for other in read if other[: len(prompt)] == prompt and len(other) > len(prompt)
            ]
            said = rng.choice(alike) if alike and rng.random() < 0.6 else []
            token_ids = said[: rng.randint(0, len(said))] + ids(6)
            turns = itertools.chain.from_iterable([own] * rng.randint(1, 4) for own in itertools.cycle([True, False]))
            sampled = list(itertools.islice(turns, len(token_ids)))
            routing = None if recorded is None else _recorded(prompt + token_ids, *recorded)[len(prompt) :]
            if routing is not None:
                routing[-1] = -1
            logprobs = [-rng.uniform(0.5, 2) for _ in token_ids]
            samples.append(
                Sample(next(index), token_ids, logprobs, rng.uniform(-1, 1), routing=routing, sampled=sampled)
            )
            read.append(prompt + token_ids)
        rows.append(PackedRow(prompt, samples, recorded and _recorded(prompt, *recorded), group))
    return rows


def _batch(rows):
    tokens = sum(row.num_completion_tokens for row in rows)
    return TrainingBatch(rows, torch.zeros(0), sum(len(row.samples) for row in rows), tokens, step=2)


def test_attention_of_random_trees_is_to_all_that_was_read():
    """By mask and by blocks."""
    shared = 0
    for seed in range(30):
        rows = random_rows(seed)
        trees = [Tree(rows[:1]), *forest(rows, 60)]
        assert sorted(id(row) for one in trees[1:] for row in one.rows) == sorted(map(id, rows))
        mini = collate(trees, CPU)
        packing = Packing(mini.segment, until=mini.until)
        expected = torch.eye(mini.segment.shape[1], dtype=torch.bool).repeat(len(trees), 1, 1)
        positions = mini.position_ids.clone()
        for b, one in enumerate(trees):
            for row, (_, ends) in zip(one.rows, one.ends, strict=True):
                for sample, end in zip(row.samples, ends, strict=True):
                    way = end.places()
                    assert mini.token_ids[b, way].tolist() == row.prompt_token_ids + sample.token_ids
                    assert mini.position_ids[b, way].tolist() == list(range(len(way)))
                    assert mini.before[b, way[1:]].tolist() == way[:-1].tolist()
                    for n, place in enumerate(way):
                        expected[b, place, way[: n + 1]] = True
            shared += sum(row.length for row in one.rows) - one.length
        real = (mini.segment >= 0)[..., None]
        assert torch.equal(packing.visible & real, expected & real)
        assert torch.equal(packing.positions.where(real[..., 0], 0), positions)
        by_blocks = torch.zeros_like(expected)
        for block in packing.blocks:
            part = by_blocks[block.row, block.queries, block.keys]
            part |= torch.ones_like(part).tril(block.ahead)
        assert torch.equal(by_blocks, expected & real)
        assert torch.equal(packing.padded.visible[:, : expected.shape[1], : expected.shape[1]], packing.visible)
    assert shared > 300


def _two_readers(learner):
    """One process reads what two would read, each its share."""
    ranks, most = learner.ranks, learner.options.tokens_per_micro_batch
    ranks.share = lambda rows, reader: sorted(rows, key=lambda row: -row.length)[reader::2]

    def shared(rows):
        ranks.readers = 2
        parts = [learner._trees(rows, reader) for reader in (0, 1)]
        ranks.readers = 1
        return itertools.chain.from_iterable(micro_batches(part, most, CPU) for part in parts)

    learner._shared = shared


def _learned(policy, rows, budget, readers=1):
    """Gradients, log-probabilities by sample, and metrics, with every term that reads the states of a tree."""
    learner = small_learner(
        policy,
        LearnerOptions(tokens_per_micro_batch=budget),
        MTPOptions(loss_weight=0.7, depth=3),
        LossOptions(importance_correction="token_truncate", entropy_coef=0.01),
        balance=BalanceOptions(sequence_weight=0.3),
        ranks=Ranks(),
    )
    if readers == 2:
        _two_readers(learner)
    metrics = learner.forward_backward(_batch(rows))
    [work] = learner.waiting
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return gradients, work.logprobs, metrics, sum(mini.token_ids.numel() for mini in work.minis)


MORE = [pytest.param(range(at, at + 50), marks=pytest.mark.long) for at in (0, 50, 100, 150)]


@pytest.mark.parametrize("seeds", [range(6), *MORE])
def test_contract_10_gradients_of_random_trees_are_those_of_padded_rows(random_policy, shares, seeds):
    """MoE, MLA, draft head, balance, in part replayed routing and the shares of two ranks."""
    policy = random_policy(3)
    router = routers(policy.trunk)[1]
    read = read_padded = 0
    for seed in seeds:
        recorded = ((1, router.num_experts), router.top_k) if seed % 2 else None
        rows = random_rows(seed, recorded)
        padded = [replace(row, samples=[sample]) for row in rows for sample in row.samples]
        shares(ALONE)
        expected, logprobs, metrics, tokens = _learned(policy, padded, 10_000)
        shares(2)
        found = _learned(policy, rows, random.Random(seed).choice([30, 60, 10_000]), 1 + seed // 2 % 2)
        assert found[0].keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[0][name] - gradient).norm() <= 1e-5 * max(1.0, gradient.norm()), (seed, name)
        assert found[1].keys() == logprobs.keys()
        for key, values in logprobs.items():
            assert found[1][key] == pytest.approx(values, abs=1e-5), (seed, key)
        for name in (name for name in metrics if not name.startswith(("time/", "moe/"))):
            assert found[2][name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), (seed, name)
        read, read_padded = read + found[3], read_padded + tokens
    assert read < 0.8 * read_padded


@pytest.mark.parametrize("kind", ["qwen3_5_text", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_contract_10_recurrent_layers_go_on_from_the_state_at_their_branch(shares, kind):
    policy = zoo.policy(kind)
    policy.paths = Paths("joined", "packed")
    assert policy.reads_trees
    likelihood = Likelihood(policy)
    for seed in (1, 4):
        rows = random_rows(seed)
        results = []
        for least in (2, ALONE):
            shares(least)
            policy.zero_grad()
            trees = forest(rows, 10_000) if least == 2 else [replace(r, samples=[s]) for r in rows for s in r.samples]
            mini = collate(trees, CPU)
            logprobs = likelihood.forward(mini).logprobs
            (logprobs * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)).sum().backward()
            gradients = {name: p.grad.clone() for name, p in policy.trunk.named_parameters() if p.grad is not None}
            results.append((logprobs.detach(), gradients, sum(one.length for one in trees)))
        (found, gradients, tokens), (expected, wanted, tokens_alone) = results
        assert tokens < 0.7 * tokens_alone
        assert (found - expected).abs().max() < 2e-5
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (gradients[name] - gradient).norm() <= 1e-4 * gradient.norm() + 2e-5, name


def test_gold_solutions_that_begin_alike_teach_trunk_and_draft_head_as_alone(random_policy, shares):
    """The first two are one text: its tokens count twice."""
    prompt = list(range(2, 9))
    solutions = [[5, 6, 7], [5, 6, 7], [8, 9], [5, 6]]
    rows = [
        PackedRow([*prompt, *more], [Sample(0, ids)])
        for ids, more in zip(solutions, ([], [], [3, 3], [4]), strict=True)
    ]
    results = []
    for least in (2, ALONE):
        shares(least)
        policy = random_policy(1)
        learner = supervised_learner(policy, mtp=SftMTPOptions(depth=2, loss_weight=0.3, train_base_model=True))
        metrics = learner.forward_backward(supervised(rows, 1))
        results.append((metrics, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}))
        assert sum(mini.token_ids.numel() for mini in learner.waiting[0].minis) == (19 if least == 2 else 44)
    (found, gradients), (expected, wanted) = results
    assert found["loss/mtp"] == pytest.approx(expected["loss/mtp"], rel=1e-5)
    assert found["loss/sft"] == pytest.approx(expected["loss/sft"], rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_a_policy_or_a_teacher_that_reads_no_trees_gets_rows(random_policy):
    """The prompts of a prefix-LM see what comes after their beginning."""
    policy, rows = random_policy(1), _rows()
    whole = random_policy(2)
    whole.attend_to_prompts("bidirectional")
    alone = random_policy(1)
    alone.paths = Paths("joined", "alone")
    assert [one.rows for one in small_learner(policy)._trees(rows, 0)] == [rows]
    for learner in (small_learner(whole), small_learner(policy, teacher=whole), small_learner(alone)):
        assert learner._trees(rows, 0) is rows
