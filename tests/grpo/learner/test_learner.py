"""The learner against transformers' own forward on plain padded rows, and against numbers worked out by hand."""

import copy
import math
import random
import statistics
from collections import defaultdict
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from small_learner import assert_close, gradients_of, last_work, learner_of, same, snapshot, supervised_learner, term_of
from torch.utils._python_dispatch import TorchDispatchMode

from grpo.config.learner import LearnerOptions, MTPOptions
from grpo.learner.batch import collate, micro_batches
from grpo.learner.learner import Learner
from grpo.learner.optimizer import at_once, norm_of, schedule
from grpo.learner.prepare import supervised, tokens_in_loss
from grpo.learner.row import PackedRow, Sample
from grpo.learner.terms import draft_head
from grpo.learner.terms.draft_head import teaching
from grpo.learner.update import NonFiniteStep
from policies.conversion.dense import convert_dense
from policies.layout import frozen_parameter_names
from policies.policy import Policy
from rewards.group_score import GroupScore
from rollout.group import Completion, Prompt, RolloutGroup

CPU = torch.device("cpu")
REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]  # the third group is tied


def _groups(policy: Policy, seed: int = 0, lengths=((4, 2, 6), (1, 5, 3), (2, 2, 3))) -> list[RolloutGroup]:
    """Random tokens, with the log-probabilities that transformers' own forward gives them."""
    rng = random.Random(seed)
    groups = []
    for g, group_lengths in enumerate(lengths):
        prompt = Prompt(f"p/{g}", "", [rng.randrange(2, 300) for _ in range(1 + 3 * g)])
        ids = [[rng.randrange(2, 300) for _ in range(length)] for length in group_lengths]
        with torch.no_grad():
            logprobs = _stock_logprobs(policy, prompt.token_ids, ids)
        completions = [
            Completion(tokens, scores.tolist(), "", "stop", 0) for tokens, scores in zip(ids, logprobs, strict=True)
        ]
        groups.append(RolloutGroup(prompt, completions))
    return groups


def _scores(rewards=REWARDS) -> list[GroupScore]:
    return [GroupScore(list(row), {"exact": list(row)}) for row in rewards]


def _stock_logprobs(policy: Policy, prompt: list[int], completions: list[list[int]], temperature: float = 1.0):
    """log π of every completion token by the stock model: one padded row per completion, shifted by one here."""
    rows = [prompt + ids for ids in completions]
    longest = max(map(len, rows))
    padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logprobs = (policy.trunk(input_ids=padded, attention_mask=mask).logits / temperature).log_softmax(-1)
    return [
        logprobs[i, len(prompt) - 1 : len(row) - 1].gather(1, torch.tensor(completions[i])[:, None])[:, 0]
        for i, row in enumerate(rows)
    ]


def _rows(policy: Policy, **given) -> list[PackedRow]:
    return learner_of(policy).prepare(_groups(policy, **given), _scores()).rows


@torch.no_grad()
def _all_logprobs(learner: Learner, rows: list[PackedRow], budget: int) -> dict[int, list[float]]:
    """The learner's log-probabilities of every sample, by its index."""
    found = {}
    for mini in micro_batches(rows, budget, CPU):
        scored = learner.likelihood.forward(mini).logprobs
        found |= {s.index: scored[c, : len(s.token_ids)].tolist() for c, s in enumerate(mini.samples)}
    return found


# ---- contract 10: a packed group computes what padded rows compute --------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_contract_10_packed_logprobs_are_those_of_padded_rows(micro_policy, budget, temperature):
    policy = micro_policy(0)
    learner = learner_of(policy, temperature=temperature)
    groups = _groups(policy)
    with torch.no_grad():
        packed = _all_logprobs(learner, learner.prepare(groups, _scores()).rows, budget)
        for g, group in enumerate(groups):
            ids = [completion.token_ids for completion in group.completions]
            padded = _stock_logprobs(policy, group.prompt.token_ids, ids, temperature)
            for i, expected in enumerate(padded):
                got = torch.tensor(packed[3 * g + i])
                assert (got - expected).abs().max() < 1e-4
                assert abs(got[0] - expected[0]) < 1e-4  # the first token, which the shared prompt predicts


@pytest.mark.parametrize("budget", [8, 10_000])
def test_a_step_tells_how_far_it_has_moved_the_policy(micro_policy, budget):
    """On one completion of each group, also where it is cut into several rows. The advantage of the first group's first
    one is zero, so it is the second; the third group is tied."""
    policy = micro_policy(0)
    learner = learner_of(policy, learning_rate=1e-2, tokens_per_micro_batch=budget)
    groups, scores = _groups(policy), _scores([[0.5, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])

    @torch.no_grad()
    def logprobs():
        telling = [(groups[0], 1), (groups[1], 0)]
        return torch.cat(
            [_stock_logprobs(policy, g.prompt.token_ids, [g.completions[i].token_ids])[0] for g, i in telling]
        )

    before, metrics = logprobs(), learner.step(learner.prepare(groups, scores), 1)
    log_ratio = logprobs() - before
    expected = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert expected > 1e-3
    assert metrics["policy/approx_kl"] == pytest.approx(expected, rel=1e-3)


def _head_outputs(policy: Policy, ids: list[int], hidden: torch.Tensor, start: int, depth: int):
    """{(d, n): output [D]}: a causal sequence through transformers' own decoder layer for every chain on its own."""
    head, model = policy.mtp, policy.trunk.get_decoder()
    embeddings = model.embed_tokens(torch.tensor(ids))
    outputs = {}
    for n in range(start, len(ids)):
        x = head.enter(embeddings[1 : n + 1], hidden[:n])
        for d in range(1, depth + 1):
            mask = torch.full((len(x), len(x)), -torch.inf).triu(1)[None, None]
            rope = model.rotary_emb(x[None], torch.arange(1, len(x) + 1)[None])
            out = head.norm(head.block(x[None], attention_mask=mask, position_embeddings=rope))[0, -1]
            outputs[d, n] = out
            if n + d == len(ids):
                break
            x = torch.cat([x, head.enter(embeddings[n + d], out)[None]])
    return outputs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_contract_10_every_mtp_depth_is_that_of_padded_rows(micro_policy, temperature):
    policy, depth = micro_policy(1), 4
    learner = learner_of(policy, mtp=2.0, depth=depth, temperature=temperature)
    batch = learner.prepare(_groups(policy, seed=1), _scores(), step=1)
    rows, tokens = batch.rows, batch.num_completion_tokens
    weights = [1.0, 0.6, 0.36, 0.216]
    expected_loss = torch.zeros(())
    with torch.no_grad():
        mini = collate(rows, CPU)
        out = learner.likelihood.forward(mini)
        packed = policy.unroll(out.preceding, mini.token_ids, mini.position_ids, mini.head_segment, depth)
        for b, row in enumerate(rows):
            start = first = len(row.prompt_token_ids)
            for sample in row.samples:
                ids = row.prompt_token_ids + sample.token_ids
                hidden = policy.trunk.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
                for (d, n), output in _head_outputs(policy, ids, hidden, first, depth).items():
                    assert (packed[d - 1][b, start + n - first] - output).abs().max() < 1e-4
                    if n + d < len(ids):  # the drafted token belongs to the completion, and has a teacher
                        teacher = (policy.trunk.lm_head(hidden[n + d - 1]) / temperature).log_softmax(-1)
                        draft = (policy.trunk.lm_head(output) / temperature).log_softmax(-1)
                        expected_loss += weights[d - 1] / sum(weights) * (teacher.exp() * (teacher - draft)).sum()
                start += len(sample.token_ids)
        loss = term_of(learner, "draft_head").scalar(mini, out, learner._begin_work(batch, None))
    torch.testing.assert_close(loss, 2.0 * expected_loss / tokens, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "given", [{}, {"loss_type": "grpo"}, {"loss_type": "dr_grpo"}, {"beta": 0.1}, {"top_entropy_quantile": 0.3}]
)
def test_contract_10_micro_batches_and_split_rows_change_nothing(micro_policy, given):
    """One forward for all; a row each; and rows that are cut, so that a group meets its prompt twice."""
    results, groups = [], _groups(micro_policy(2), seed=2)
    for budget in (10_000, 20, 9):
        policy = micro_policy(2)
        learner = learner_of(
            policy,
            mtp=1.0,
            tokens_per_micro_batch=budget,
            entropy_coef=0.01,
            max_completion_tokens=6,
            learning_rate=1e-9,
            **given,
        )
        batch = learner.prepare(groups, _scores())
        metrics = learner.step(batch, 1)
        results.append((len(batch.rows), metrics, gradients_of(policy)))
    assert results[0][0] == 3 < results[2][0]
    for _, metrics, gradients in results[1:]:
        assert_close(gradients, results[0][2])
        for name, value in results[0][1].items():
            if not name.startswith("time/"):
                assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_contract_10_a_tied_group_adds_nothing_and_stays_in_the_denominator(micro_policy):
    whole, part = learner_of(micro_policy(0)), learner_of(micro_policy(0))
    groups = _groups(whole.policy)
    batch = whole.prepare(groups, _scores())
    assert (batch.tied_groups, batch.num_samples, batch.num_completion_tokens) == (1, 9, 28)
    whole.step(batch, 1)
    part.step(part.prepare(groups[:2], _scores(REWARDS[:2])), 1)
    assert tokens_in_loss(last_work(whole).rows) == 21  # its forward was spared
    assert_close(gradients_of(whole.policy), {n: g * 21 / 28 for n, g in gradients_of(part.policy).items()})


@pytest.mark.parametrize("updates", [1, 2])
def test_contract_10_a_tied_group_that_teaches_the_head_needs_no_gradient_of_the_trunk(micro_policy, updates):
    states, metrics, gradients = [], [], []
    for spared in (True, False):
        policy = micro_policy(2)
        learner = learner_of(policy, mtp=1.0, updates_per_batch=updates, learning_rate=1e-3)
        kept, preceding, differentiable = learner._rows_that_count, learner.likelihood.preceding, []
        if not spared:
            learner._rows_that_count = lambda *given, kept=kept: [replace(r, learns=True) for r in kept(*given)]

        def noted(mini, *given, preceding=preceding, differentiable=differentiable):
            hidden = preceding(mini, *given)
            differentiable.append(hidden.requires_grad)
            return hidden

        learner.likelihood.preceding = noted
        metrics.append(learner.step(learner.prepare(_groups(policy, seed=2), _scores()), 1))
        assert (
            differentiable.count(True) == updates
        )  # one micro-batch, and another one of the tied group if it is spared
        assert differentiable.count(False) - 2 == (updates if spared else 0)  # two see how far the step has moved
        states.append({name: p.detach() for name, p in policy.named_parameters()})
        gradients.append(gradients_of(policy))
    assert_close(*states)
    assert_close(*gradients)
    assert metrics[0]["loss/mtp"] > 0
    for name in metrics[0].keys() - {"time/learn", "time/mtp_head"}:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("mtp", [1.0, 0.0])  # the head learns from the tied group too, or it learns nothing
def test_contract_10_a_tied_group_counts_for_bnpo_whatever_the_head_does(micro_policy, mtp):
    """In one micro-batch, its local mean over tokens is the global one of dapo."""
    local, whole = (learner_of(micro_policy(0), loss_type=kind, mtp=mtp) for kind in ("bnpo", "dapo"))
    for learner in (local, whole):
        learner.step(learner.prepare(_groups(learner.policy), _scores()), 1)
    assert_close(gradients_of(local.policy.trunk), gradients_of(whole.policy.trunk))


def _stock_entropies(policy: Policy, groups: list[RolloutGroup], temperature: float = 1.0) -> list[torch.Tensor]:
    """Of every completion's tokens, by transformers' own forward."""
    entropies = []
    for group in groups:
        for completion in group.completions:
            ids = group.prompt.token_ids + completion.token_ids
            logits = policy.trunk(input_ids=torch.tensor([ids])).logits[0, len(group.prompt.token_ids) - 1 : -1]
            entropies.append(torch.distributions.Categorical(logits=logits / temperature).entropy())
    return entropies


@pytest.mark.parametrize("budget", [10_000, 9])
@pytest.mark.parametrize("masking", [False, True])
def test_top_entropy_is_the_top_of_the_whole_step(micro_policy, budget, masking):
    """By hand: the tied group's tokens are in the quantile, though its advantages are zero; masked completions not."""
    policy = micro_policy(3)
    groups = _groups(policy, seed=3)
    groups[0].completions[2].finish_reason = "length"
    counted = [not masking or c.finish_reason == "stop" for group in groups for c in group.completions]
    by_hand = copy.deepcopy(policy)
    learner = learner_of(
        policy, top_entropy_quantile=0.5, tokens_per_micro_batch=budget, mask_truncated_completions=masking
    )
    metrics = learner.step(learner.prepare(groups, _scores()), 1)
    with torch.no_grad():
        entropies = _stock_entropies(by_hand, groups)
    pool = torch.cat([e for e, kept in zip(entropies, counted, strict=True) if kept])
    highest = pool.sort(descending=True).values[: math.ceil(0.5 * len(pool))]
    untied = torch.cat([e for e, kept in zip(entropies[:6], counted[:6], strict=True) if kept])
    alone = untied.sort(descending=True).values[: math.ceil(0.5 * len(untied))]
    assert len(alone) != (untied >= highest[-1]).sum()  # without the tied group, others would be the top
    loss = torch.zeros(())
    for g, (group, rewards) in enumerate(zip(groups[:2], REWARDS[:2], strict=True)):
        ids = [completion.token_ids for completion in group.completions]
        scored = _stock_logprobs(by_hand, group.prompt.token_ids, ids)
        for i, (logprobs, advantage) in enumerate(zip(scored, _advantages(rewards), strict=True)):
            chosen = (entropies[3 * g + i] >= highest[-1] - 1e-6) * counted[3 * g + i]
            loss = loss - (advantage * (logprobs - logprobs.detach()).exp() * chosen).sum() / len(pool)
    loss.backward()
    assert metrics["loss/policy"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    expected = {name: g for name, g in gradients_of(by_hand.trunk).items() if g.norm() > 1e-6}
    assert_close({name: policy.trunk.get_parameter(name).grad for name in expected}, expected, relative=1e-3)


def test_the_highest_entropies_are_those_from_before_the_first_update(micro_policy):
    """As log π_old is: the threshold stays with the batch, and one look ahead is enough."""
    policy = micro_policy(3)
    learner = learner_of(policy, top_entropy_quantile=0.3, updates_per_batch=3, learning_rate=1e-2, epsilon=0.05)
    [thresholds, anchors], term = ([], []), term_of(learner, "policy")
    look_ahead = term.before_update

    def noted(work):
        look_ahead(work)
        thresholds.append(work.fixed["policy"].top.threshold.item())
        anchors.append(work.fixed["policy"].old)

    term.before_update = noted
    metrics = learner.step(learner.prepare(_groups(policy, seed=3), _scores()), 1)
    assert anchors[0] is anchors[1] is anchors[2] is not None  # the ratio's anchor stays
    assert len(set(thresholds)) == 1
    assert metrics["policy/clip_fraction"] > 0


# ---- contracts 1, 7 and 8 -------------------------------------------------------------------------------------------


def test_contract_1_the_stop_token_is_learned_even_where_it_is_the_padding(micro_policy):
    """Raising a completion that ends with the stop token (id 0, what rows are padded with) raises stopping."""
    policy = micro_policy(0)
    stop = policy.stop_token_ids[0]
    assert stop == 0
    groups = _groups(policy)
    for completion in groups[0].completions:
        completion.token_ids[-1] = stop
    learner = learner_of(policy, learning_rate=1e-2)
    rows = learner.prepare(groups, _scores([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])).rows
    before = _all_logprobs(learner, rows, 1000)[0]
    learner.step(learner.prepare(groups, _scores([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])), 1)
    after = _all_logprobs(learner, rows, 1000)[0]
    assert len(before) == len(groups[0].completions[0].token_ids)
    assert after[-1] > before[-1]


@pytest.mark.parametrize("lora", [False, True])
def test_contract_7_the_draft_head_never_touches_the_trunks_gradient(micro_policy, lora):
    gradients = []
    for weight in (0.0, 1.0):
        policy = micro_policy(3)
        if lora:
            torch.manual_seed(0)
            policy.add_lora(4, 8.0)
        learner = learner_of(policy, mtp=weight)
        groups = _groups(policy, seed=3)[:2]  # no tied group: its forward would be spared without the head
        learner.step(learner.prepare(groups, _scores(REWARDS[:2])), 1)
        gradients.append(gradients_of(policy.trunk))
        assert bool(gradients_of(policy.mtp)) == bool(weight)
    assert gradients[0]
    assert same(*gradients)


def _shift(groups: list[RolloutGroup], nats: float) -> None:
    for completion in (completion for group in groups for completion in group.completions):
        completion.logprobs = [logprob - nats for logprob in completion.logprobs]


def test_contract_8_the_samplers_floats_stay_out_of_the_loss_and_are_compared(micro_policy):
    gradients, metrics = [], []
    for shift in (0.0, 0.5):
        policy = micro_policy(4)
        learner = learner_of(policy)
        groups = _groups(policy, seed=4)
        _shift(groups, shift)
        metrics.append(learner.step(learner.prepare(groups, _scores()), 1))
        gradients.append(gradients_of(policy))
    assert same(*gradients)
    assert metrics[0]["policy/ratio_mean"] == metrics[1]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics[0]["policy/clip_fraction"] == 0
    assert metrics[0]["mismatch/logprob_abs_mean"] < 1e-5
    assert metrics[0]["mismatch/kl"] < 1e-6
    assert metrics[1]["mismatch/logprob_abs_mean"] == pytest.approx(0.5, abs=1e-4)
    assert metrics[1]["mismatch/kl"] == pytest.approx(math.exp(0.5) - 1.5, abs=1e-4)


def test_contract_8_the_correction_is_on_where_it_was_asked_for(micro_policy):
    policy = micro_policy(4)
    groups = _groups(policy, seed=4)
    _shift(groups, 0.5)
    plain, corrected = learner_of(micro_policy(4)), learner_of(policy, importance_correction="token_truncate")
    plain.step(plain.prepare(groups, _scores()), 1)
    metrics = corrected.step(corrected.prepare(groups, _scores()), 1)
    assert metrics["mismatch/weight_mean"] == pytest.approx(math.exp(0.5), rel=1e-3)
    scaled = {name: g * math.exp(0.5) for name, g in gradients_of(plain.policy).items()}
    assert_close(gradients_of(policy), scaled, relative=1e-3)


# ---- one step by hand -----------------------------------------------------------------------------------------------


def _advantages(rewards: list[float]) -> list[float]:
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(reward - mean) / (spread + 1e-4) for reward in rewards]


def test_one_step_of_grpo_against_hand_worked_numbers(micro_policy):
    policy = micro_policy(5)
    groups = _groups(policy, seed=5)
    by_hand = copy.deepcopy(policy)
    learner = learner_of(policy, betas=(0.9, 0.95), weight_decay=0.1, learning_rate=1e-2)
    before = {name: p.detach().clone() for name, p in policy.trunk.named_parameters()}
    metrics = learner.step(learner.prepare(groups, _scores()), 1)

    # Advantages by the formula, log-probabilities by transformers, the loss as one reads it in the paper (DAPO):
    # minus the mean over all tokens of ratio · advantage, where the ratio is 1 and its gradient that of log π.
    tokens = sum(len(completion.token_ids) for group in groups for completion in group.completions)
    loss = torch.zeros(())
    value = 0.0
    for group, rewards in zip(groups, REWARDS, strict=True):
        advantages = [0.0] * 3 if len(set(rewards)) == 1 else _advantages(rewards)
        ids = [completion.token_ids for completion in group.completions]
        for logprobs, advantage in zip(_stock_logprobs(by_hand, group.prompt.token_ids, ids), advantages, strict=True):
            loss = loss - advantage * logprobs.sum() / tokens
            value -= advantage * len(logprobs) / tokens
    loss.backward()
    assert metrics["loss/policy"] == pytest.approx(value, abs=1e-6)
    expected = {name: g for name, g in gradients_of(by_hand.trunk).items() if g.abs().sum() > 0}
    got = {name: g for name, g in gradients_of(policy.trunk).items() if name in expected}
    assert_close(got, expected, relative=1e-4)
    norm = sum(g.double().square().sum() for g in gradients_of(policy.trunk).values()).sqrt()
    assert metrics["learner/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert metrics["learner/learning_rate"] == 1e-2

    # AdamW's first step: m̂ = g and v̂ = g², so a parameter moves by lr · g / (|g| + ε), and a matrix decays.
    for name, parameter in policy.trunk.named_parameters():
        g, decay = parameter.grad, 0.1 if parameter.dim() > 1 else 0.0
        moved = before[name] * (1 - 1e-2 * decay) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), moved, rtol=1e-5, atol=1e-6)


def test_contract_15_the_norm_of_a_large_matrix_does_not_depend_on_how_many_hold_it():
    """torch's own is off by 1e-4 of four million numbers, and less of an eighth of them."""
    normal = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)) * 1e-5
    for matrix in (normal, normal.sign() * 1e-4, torch.full_like(normal, 0.7)):
        exact = matrix.double().norm().item()
        found = [norm_of([matrix]), norm_of(matrix.chunk(8)), norm_of([matrix.T, torch.zeros(3)])]
        assert [norm.item() for norm in found] == pytest.approx([exact] * 3, rel=1e-6)


def test_the_norm_of_many_tensors_is_a_few_kernels_on_an_accelerator():
    """The same to 2e-7, where the pieces would be two kernels for each 2^18 numbers."""

    class Counted(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(64 * i, 33, generator=generator) * 10.0 ** -(i % 5) for i in range(1, 41)] + [torch.zeros(0)]
    expected = norm_of(parts)  # which are on a CPU
    with Counted():
        norm = at_once(parts).sqrt()
    assert norm.item() == pytest.approx(expected.item(), rel=2e-7)
    assert len(Counted.names) < 20
    assert at_once([part.bfloat16() for part in parts]).dtype == torch.float32


def test_later_steps_are_those_of_torchs_own_adamw_with_clipped_gradients(micro_policy):
    policy = micro_policy(5)
    learner = learner_of(policy, mtp=1.0, max_grad_norm=0.05, learning_rate=1e-3)
    twin = copy.deepcopy(policy)
    pairs = list(zip(policy.named_parameters(), twin.named_parameters(), strict=True))
    oracle = torch.optim.AdamW(
        [
            {"params": [q for (n, _), (_, q) in pairs if n.startswith("trunk.")], "lr": 1e-3},
            {"params": [q for (n, _), (_, q) in pairs if n.startswith("mtp.")], "lr": MTPOptions().learning_rate},
        ],
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    for step in (1, 2, 3):
        metrics = learner.step(learner.prepare(_groups(policy, seed=step), _scores()), step)
        assert metrics["learner/grad_norm"] > 0.05
        for module in (policy.trunk, policy.mtp):
            clipped = sum(g.double().square().sum() for g in gradients_of(module).values()).sqrt()
            assert clipped == pytest.approx(0.05, rel=1e-3)
        for (_, p), (_, q) in pairs:
            q.grad = None if p.grad is None else p.grad.clone()
        oracle.step()
        for (_, p), (_, q) in pairs:  # the fused kernel rounds its own way: by less than 1e-4 of a step
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


# ---- what a step leaves alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "rewards", "moves"),
    [
        ({"mtp": 1.0, "weight_decay": 0.1}, [[1.0] * 3, [0.0] * 3, [0.5, None, None]], False),
        ({"entropy_coef": 0.1}, [[None] * 3] * 3, False),
        ({"mask_truncated_completions": True}, REWARDS, False),
        ({"beta": 0.1}, [[1.0] * 3] * 3, True),
        ({"entropy_coef": 0.01}, [[1.0] * 3] * 3, True),
    ],
)
def test_a_tied_batch_moves_nothing_but_by_the_kl_and_the_entropy_bonus(micro_policy, given, rewards, moves):
    """Nor does the momentum of the step before. Where no completion has a reward, nothing does, and where all were
    truncated and are masked."""
    learner = learner_of(micro_policy(0), **given)
    learner.step(learner.prepare(_groups(learner.policy), _scores()), 1)
    before, groups = snapshot(learner), _groups(learner.policy, seed=1)
    if rewards is REWARDS:
        for completion in (completion for group in groups for completion in group.completions):
            completion.finish_reason = "length"
    metrics = learner.step(learner.prepare(groups, _scores(rewards)), 2)
    assert metrics.get("learner/updates", 0) == moves
    assert ("learner/grad_norm" in metrics) == moves
    assert same(before, snapshot(learner)) != moves


def test_contract_2_the_old_policy_is_scored_at_the_temperature_of_the_new_one(micro_policy):
    """Where nothing moves between two updates, their ratio is 1."""
    policy = micro_policy(0)
    learner = learner_of(policy, temperature=0.7, updates_per_batch=2)
    for group in learner.optimizer.param_groups:
        group["peak"] = 0.0
    metrics = learner.step(learner.prepare(_groups(policy), _scores()), 1)
    assert metrics["learner/updates"] == 2
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["policy/clip_fraction"] == 0.0


def test_the_entropy_bonus_has_the_gradient_of_the_mean_entropy(micro_policy):
    """By transformers' own forward. All groups are tied, so that nothing else has a gradient."""
    policy, temperature = micro_policy(0), 0.7
    by_hand, groups = copy.deepcopy(policy), _groups(policy)
    learner = learner_of(policy, entropy_coef=0.3, temperature=temperature, learning_rate=1e-9)
    learner.step(learner.prepare(groups, _scores([[1.0] * 3] * 3)), 1)
    entropies = _stock_entropies(by_hand, groups, temperature)
    (-0.3 * torch.cat(entropies).mean()).backward()
    expected = {name: g for name, g in gradients_of(by_hand.trunk).items() if g.norm() > 1e-7}
    assert len(expected) > 10
    got = gradients_of(policy.trunk)
    assert_close({name: got[name] for name in expected}, expected, relative=1e-4)


@pytest.mark.parametrize("part", ["the loss", "trunk.lm_head.weight", "mtp.eh_proj.weight"])
def test_a_loss_or_a_gradient_that_is_not_finite_changes_nothing(micro_policy, part):
    policy = micro_policy(0)
    learner = learner_of(policy, mtp=1.0)
    learner.step(learner.prepare(_groups(policy), _scores()), 1)
    before, batch = snapshot(learner), learner.prepare(_groups(policy), _scores())
    if part == "the loss":
        rows = [replace(row, samples=[replace(s, advantage=math.nan) for s in row.samples]) for row in batch.rows]
        with pytest.raises(NonFiniteStep, match="step 2: the loss is nan"):
            learner.step(replace(batch, rows=rows), 2)
    else:
        hook = policy.get_parameter(part).register_hook(lambda gradient: gradient * math.inf)
        with pytest.raises(NonFiniteStep, match="step 2: the gradient norm is"):
            learner.step(batch, 2)
        hook.remove()
    assert same(before, snapshot(learner))
    assert not gradients_of(policy)
    learner.step(batch, 2)
    assert not same(before, snapshot(learner))


def test_updates_before_one_that_is_not_finite_are_counted_as_a_new_version(micro_policy):
    """Nobody may go on sampling with weights that carry the version of others (contract 5)."""
    policy = micro_policy(0)
    learner = learner_of(policy, updates_per_batch=2)
    calls = []

    def second_time(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * (math.inf if len(calls) > 1 else 1.0)

    policy.get_parameter("trunk.lm_head.weight").register_hook(second_time)
    before = snapshot(learner)
    with pytest.raises(NonFiniteStep):
        learner.step(learner.prepare(_groups(policy), _scores()), 1)
    assert not torch.equal(before["policy/trunk.lm_head.weight"], policy.lm_head)
    assert learner.policy_version == 1


# ---- the reference policy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "unbiased"])
@pytest.mark.parametrize("lora", [False, True])
def test_contract_2_the_kl_is_zero_at_the_first_step_and_only_there(micro_policy, lora, estimator):
    """At a temperature other than 1: the reference is scored with the policy's."""
    policy = micro_policy(9)
    if lora:
        policy.add_lora(4, 8.0)
    learner = learner_of(policy, beta=0.1, kl_estimator=estimator, learning_rate=1e-2, temperature=0.7)
    assert (learner.likelihood.reference is None) == lora  # adapters off need no copy
    batch = learner.prepare(_groups(policy, seed=9), _scores())
    reference = {} if lora else dict(learner.likelihood.reference.named_parameters())
    before = {name: parameter.clone() for name, parameter in reference.items()}
    first, second = learner.step(batch, 1), learner.step(batch, 2)
    assert first["loss/kl"] == 0.0
    assert abs(second["loss/kl"]) > 1e-6
    optimised = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    for name, parameter in reference.items():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert id(parameter) not in optimised


def test_lora_trains_the_adapters_and_the_head_alone(micro_policy):
    policy = micro_policy(9)
    policy.add_lora(4, 8.0)
    learner = learner_of(policy, mtp=1.0)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    published = {name: t.clone() for name, t in learner.weights().items()}
    learner.step(learner.prepare(_groups(policy, seed=9), _scores()), 1)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert any(".lora_B." in name for name in moved)
    assert all(".lora_" in name or name.startswith("mtp.") for name in moved)
    # What is published is the merged trunk, under the names of a plain policy.
    changed = {name for name, t in learner.weights().items() if not torch.equal(t, published[name])}
    assert "trunk.model.layers.0.self_attn.o_proj.weight" in changed
    assert not any("lora" in name for name in learner.weights())


@pytest.mark.parametrize("lora", [False, True])
def test_what_makes_a_converted_policy_exact_stays_as_it_is(hf_policy, lora):
    torch.manual_seed(0)
    dense = hf_policy("llama", 0, vocab_size=320, num_hidden_layers=2, tie_word_embeddings=True)
    policy = Policy(convert_dense(dense.trunk), None, dense.tokenizer)
    if lora:
        policy.add_lora(4, 8.0)
    learner = learner_of(policy, weight_decay=0.1, learning_rate=1e-2)
    names = frozen_parameter_names(policy.config)
    frozen = {n: p for n, p in policy.trunk.named_parameters() if n.endswith(tuple(names))}
    assert len(frozen) == 4
    before = {name: p.detach().clone() for name, p in policy.trunk.named_parameters()}
    groups = _groups(policy)
    learner.step(learner.prepare(groups, _scores()), 1)
    optimised = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    for name, parameter in frozen.items():
        assert id(parameter) not in optimised
        assert torch.equal(parameter, before[name])
    moved = [name for name, p in policy.trunk.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 10
    # It is still the function that the stock model computes.
    assert learner.step(learner.prepare(_groups(policy), _scores()), 2)["mismatch/logprob_abs_mean"] < 1e-4


# ---- preparing a batch ----------------------------------------------------------------------------------------------


def test_several_rewards_can_be_normalised_each_before_they_are_summed(micro_policy):
    parts = {"right": [1.0, 1.0, 0.0], "short": [0.1, 0.3, 0.2]}
    score = GroupScore([1.1, 1.3, 0.2], parts)
    learner = learner_of(
        micro_policy(0), multi_objective_aggregation="normalize_then_sum", reward_weights={"right": 1.0, "short": 1.0}
    )
    groups = _groups(learner.policy)[:1]
    # The docstring of advantages.multi_objective works these out.
    expected = torch.tensor([[-0.2984, 1.1152, -0.8168]])
    torch.testing.assert_close(learner.prepare(groups, [score]).advantages, expected, rtol=0, atol=1e-4)
    summed = learner_of(micro_policy(0)).prepare(groups, [score]).advantages
    torch.testing.assert_close(summed, torch.tensor([[0.3981, 0.7394, -1.1376]]), rtol=0, atol=1e-4)


def test_truncated_completions_leave_the_loss_and_its_denominator(micro_policy):
    policy = micro_policy(0)
    groups = _groups(policy)
    groups[0].completions[2].finish_reason = "length"  # 6 of the 28 tokens
    groups[0].completions[2].logprobs = [-99.0] * 6
    learner = learner_of(policy, mask_truncated_completions=True)
    batch = learner.prepare(groups, _scores())
    assert batch.num_completion_tokens == 22
    assert batch.num_samples == 9
    metrics = learner.step(batch, 1)
    assert metrics["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-6)  # a mean over the tokens that are in the loss
    assert metrics["mismatch/logprob_abs_max"] < 1e-4
    masked = gradients_of(policy)
    plain = learner_of(micro_policy(0))
    scores = _scores()
    rows = [
        PackedRow(row.prompt_token_ids, [s for s in row.samples if s.finish_reason == "stop"])
        for row in plain.prepare(groups, scores).rows
    ]
    plain.step(replace(batch, rows=rows), 1)
    assert_close(masked, gradients_of(plain.policy))


# ---- the MTP head's rest, supervised steps, schedules, state -------------------------------------------------------


@pytest.mark.slow
def test_the_head_rests_while_drafts_gain_nothing(micro_policy, monkeypatch):
    """By what drafts gained in the rollouts that are learned from, which the record has."""
    policy = micro_policy(0)
    monkeypatch.setattr(draft_head, "IDLE_EVERY", 3)
    learner = learner_of(policy, mtp=1.0)
    taught = {}
    for gain in (0.9, 1.09, 1.1, 2.0):
        groups = _groups(policy)
        for completion in (completion for group in groups for completion in group.completions):
            completion.draft.cost, completion.draft.plain_cost = 10.0, 10.0 * gain
        batch = learner.prepare(groups, _scores())
        taught[gain] = [step for step in range(1, 7) if "loss/mtp" in learner.step(batch, step)]
    assert taught == {0.9: [3, 6], 1.09: [3, 6], 1.1: [1, 2, 3, 4, 5, 6], 2.0: [1, 2, 3, 4, 5, 6]}
    assert learner.prepare(_groups(policy), _scores()).draft_gain is None, "depth was not chosen by costs"
    rows, options = batch.rows, term_of(learner, "draft_head").options
    assert [row.tied for row in rows] == [False, False, True]
    assert list(teaching(policy, options, rows, 3, gain=1.0)) == [0, 1], "the trunk reads the tied group for nothing"
    assert list(teaching(policy, options, rows, 3, gain=1.2)) == [0, 1, 2]
    assert teaching(policy, options, rows[2:], 3, gain=1.0) == {}
    assert all(list(teaching(policy, options, rows, step, gain=None)) == [0, 1, 2] for step in range(1, 7))
    assert learner.step(learner.prepare(_groups(policy), _scores()), 1)["time/mtp_head"] > 0


@pytest.mark.slow
def test_a_supervised_step_is_the_mean_cross_entropy_of_the_solutions(micro_policy):
    policy = micro_policy(0)
    options = LearnerOptions(learning_rate=1e-3, max_grad_norm=1e9, tokens_per_micro_batch=16)
    learner = supervised_learner(policy, options, MTPOptions(loss_weight=1.0, depth=3))
    solutions = [([5, 6, 7], [8, 9, 0]), ([10], [11, 12, 13, 14, 0])]
    rows = [PackedRow(prompt, [Sample(0, ids)]) for prompt, ids in solutions]
    with torch.no_grad():
        logprobs = [_stock_logprobs(policy, prompt, [ids])[0] for prompt, ids in solutions]
    metrics = learner.step(supervised(rows, 1))
    assert metrics["loss/sft"] == pytest.approx(-torch.cat(logprobs).mean().item(), rel=1e-5)
    assert metrics["loss/mtp"] > 0
    for step in range(2, 30):
        last = learner.step(supervised(rows, step))
    assert last["loss/sft"] < 0.5 * metrics["loss/sft"]
    assert last["loss/mtp"] < metrics["loss/mtp"]


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(micro_policy):
    """Policies come from checkpoints in eval mode, in which transformers ignores it without a word."""
    gradients, forwards = [], []
    for checkpointing in (False, True):
        policy = micro_policy(0)
        policy.trunk.eval()
        learner = learner_of(policy, mtp=1.0, gradient_checkpointing=checkpointing)
        batch, calls = learner.prepare(_groups(policy), _scores()), []
        policy.trunk.model.layers[1].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        metrics = learner.step(batch, 1)
        gradients.append(gradients_of(policy))
        forwards.append((len(calls), metrics["moe/load_max"]))
    assert_close(*gradients)
    # Two groups learn, and one teaches the head alone. The last two tell how far the step has moved the policy.
    assert [count for count, _ in forwards] == [4, 5]
    assert forwards[1][1] == forwards[0][1]


def test_load_statistics_count_the_tokens_of_the_completions_once(micro_policy):
    policy = micro_policy(0)
    policy.add_lora(4, 8.0)
    learner = learner_of(policy, beta=0.1)
    batch = learner.prepare(_groups(policy), _scores())
    metrics = learner.step(batch, 1)
    counts = last_work(learner).fixed["balance"][0].chosen
    assert counts.shape == (1, 4)
    assert counts.sum() == 2 * 28  # two experts a token; the reference's forward is not counted
    load = counts[0] / 14
    assert metrics["moe/load_max"] == pytest.approx(load.max().item())
    assert metrics["moe/max_violation"] == pytest.approx(load.max().item() - 1)


def test_the_schedule_scales_both_learning_rates(micro_policy):
    learner = learner_of(micro_policy(0), mtp=1.0, learning_rate=1e-3, schedule=schedule("linear", 4, 0))
    for step, factor in ((1, 1.0), (2, 0.75), (4, 0.25)):
        metrics = learner.step(learner.prepare(_groups(learner.policy, seed=step), _scores()), step)
        assert metrics["learner/learning_rate"] == pytest.approx(factor * 1e-3)
        rates = {group["lr"] for group in learner.optimizer.param_groups}
        assert rates == {factor * 1e-3, factor * MTPOptions().learning_rate}


@pytest.mark.parametrize("lora", [False, True])
def test_contract_9_a_learner_goes_on_from_its_state_with_the_same_bits(micro_policy, lora):
    def fresh() -> Learner:
        policy = micro_policy(0)
        if lora:
            torch.manual_seed(1)
            policy.add_lora(4, 8.0)
        return learner_of(policy, mtp=1.0, beta=0.1, learning_rate=1e-2)

    whole = fresh()
    groups = [_groups(micro_policy(0), seed=step) for step in range(4)]
    for step in (1, 2):
        whole.step(whole.prepare(groups[step], _scores()), step)
    tensors, state = copy.deepcopy(whole.state())
    assert state == {"policy_version": 2}
    resumed = fresh()
    assert not same(snapshot(whole), snapshot(resumed))
    resumed.load_state(tensors, state)
    assert same(snapshot(whole), snapshot(resumed))
    for learner in (whole, resumed):
        learner.step(learner.prepare(groups[3], _scores()), 3)
    assert same(snapshot(whole), snapshot(resumed))


def test_moments_come_back_on_the_device_of_their_parameter(micro_policy):
    """A checkpoint is read on the CPU. `meta` stands for any other device: it only knows where a tensor is."""
    learner = learner_of(micro_policy(0), mtp=1.0, advantage="gae")
    learner.step(learner.prepare(_groups(learner.policy), _scores()), 1)
    tensors, state = learner.state()
    assert len(tensors["optimizer"]) > 100
    learner.policy.to("meta")
    term_of(learner, "value").head.to("meta")
    learner.optimizer.state = defaultdict(dict)
    learner.load_state(tensors, state)
    for parameter, moments in learner.optimizer.state.items():
        assert {value.device.type for value in moments.values()} == {parameter.device.type} == {"meta"}
    assert sum(map(len, learner.optimizer.state.values())) == len(tensors["optimizer"])


def test_the_state_of_another_policy_is_refused_by_name(micro_policy):
    learner, adapted = learner_of(micro_policy(0)), micro_policy(0)
    adapted.add_lora(4, 8.0)
    tensors, state = learner_of(adapted).state()
    with pytest.raises(ValueError, match=r"another policy: .*lora.*check model and lora"):
        learner.load_state(tensors, state)
    few, all_ = micro_policy(0), micro_policy(0)
    few.add_lora(4, 8.0, ["q_proj"])
    all_.add_lora(4, 8.0)
    tensors, state = learner_of(few).state()
    with pytest.raises(ValueError, match=r"another policy: it lacks .*lora_A.*check model and lora"):
        learner_of(all_).load_state(tensors, state)
