"""Keyed noise: uniform, independent, a function of its key; and choices that follow the softmax exactly."""

import math
from dataclasses import replace

import pytest
import torch

import rollout.sampling
from rollout.sampling import (
    BLOCK,
    FULL_ROW,
    DraftVocabulary,
    Noise,
    SamplingParams,
    choose,
    choose_at_once,
    logprobs_of,
    row_key,
)

PARAMS = SamplingParams(seed=3, step=5)


def keys(count: int, params: SamplingParams = PARAMS) -> torch.Tensor:
    """Keys of `count` samples of one prompt."""
    return torch.tensor([row_key(params, "gsm8k/train/7", sample) for sample in range(count)], dtype=torch.int32)


def uniform(keys_N2: torch.Tensor, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return Noise(keys_N2, positions, 1).uniform(ids)


def pick(logits: torch.Tensor, temperature: float, keys_N2: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return choose(logits, temperature, Noise(keys_N2, positions, logits.shape[1]))[0]


def z_score(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square of counts against expectations, as standard deviations from its mean; rare cells count as one."""
    rare = expected < 8
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts.double(), expected.double()))
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def evenness(u: torch.Tensor, bins: int = 256) -> float:
    counts = torch.bincount((u.flatten() * bins).long(), minlength=bins)
    return z_score(counts, torch.full((bins,), u.numel() / bins))


def noise_along(axis: str) -> torch.Tensor:
    """2^18 uniforms as [A, B], in which only `axis` changes along B."""
    if axis == "token":
        return uniform(keys(64), torch.zeros(64), torch.arange(4096))
    if axis == "position":
        return torch.stack(
            [uniform(keys(1).expand(4096, 2), torch.arange(4096), torch.tensor([v]))[:, 0] for v in range(64)]
        )
    if axis == "row":
        return uniform(keys(4096), torch.zeros(4096), torch.arange(64)).T
    steps = torch.cat([keys(1, PARAMS.at(step)) for step in range(4096)])
    return uniform(steps, torch.zeros(4096), torch.arange(64)).T


@pytest.mark.parametrize("axis", ["token", "position", "row", "step"])
def test_noise_is_uniform_and_independent_along(axis):
    u = noise_along(axis)
    assert u.shape == (64, 4096)
    assert abs(evenness(u)) < 4
    for row in (u[0], u[-1]):  # in every single run too
        assert abs(evenness(row, bins=64)) < 4
    for lag in (1, 2, 16, 1024):  # pairs of neighbours fill the unit square evenly
        first, second = u[:, :-lag].flatten(), u[:, lag:].flatten()
        assert abs(evenness(((first * 16).floor() * 16 + (second * 16).floor()) / 256 + 1e-4)) < 4
        assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 4 / math.sqrt(len(first))
    across = ((u[:-1] * 16).floor() * 16 + (u[1:] * 16).floor()) / 256 + 1e-4  # and neighbours on the other axis
    assert abs(evenness(across)) < 4


def test_every_bit_of_a_key_changes_half_of_the_noise():
    ids = torch.arange(512)
    key, place = keys(1), torch.tensor([9])
    base = uniform(key, place, ids) > 0.5
    for word in (0, 1):
        for bit in range(32):
            other = key.clone()
            other[0, word] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            share = ((uniform(other, place, ids) > 0.5) != base).float().mean().item()
            assert share == pytest.approx(0.5, abs=0.12), (word, bit)


def test_noise_never_touches_zero_or_one():
    """At 1 the Gumbel noise is infinite: the token would be chosen whatever its probability."""
    key, place = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([0])
    u = uniform(key, place, torch.tensor([1430323]))  # all 23 bits are set here
    assert u.item() == 1 - 2.0**-24
    everything = uniform(key, place, torch.arange(1 << 22))
    assert everything.min() >= 2.0**-24
    assert everything.max() < 1
    assert torch.isfinite(Noise(key, place, 1).gumbel(torch.arange(1 << 22))).all()


def test_contract_4_the_same_key_gives_the_same_noise_wherever_it_runs():
    ids = torch.arange(100)
    key, places = keys(6), torch.tensor([0, 3, 3, 8, 1, 40])
    together = uniform(key, places, ids)
    for r in range(6):
        assert torch.equal(uniform(key[r : r + 1], places[r : r + 1], ids)[0], together[r])
    order = torch.tensor([4, 0, 5, 2])
    assert torch.equal(uniform(key[order], places[order], ids), together[order])
    assert torch.equal(uniform(key, places, ids[30:60].expand(6, -1)), together[:, 30:60])


def test_contract_4_seed_step_draw_prompt_and_sample_are_in_the_key_and_nothing_else():
    """Above all not the number of drafts; the temperature is divided out of the logits, not out of the noise."""
    known = row_key(PARAMS, "a", 0)
    for change in ({"seed": 4}, {"step": 6}, {"draw": 1}):
        assert row_key(replace(PARAMS, **change), "a", 0) != known
    for draft_tokens in (4, None):
        others = replace(PARAMS, draft_tokens=draft_tokens, group_size=2, max_completion_tokens=7, temperature=0.3)
        assert row_key(others, "a", 0) == known
    found = {row_key(PARAMS, prompt, sample) for prompt in ("a", "b", "a/1", "1/a", "") for sample in range(200)}
    assert len(found) == 5 * 200
    # No two ways to say the same: the numbers come first, and a prompt's name may hold slashes.
    assert row_key(replace(PARAMS, step=1, draw=2), "3/a", 4) != row_key(replace(PARAMS, step=1, draw=2), "a", 4)


def draw(logits: torch.Tensor, temperature: float, count: int) -> torch.Tensor:
    """`count` choices from the same logits, at positions of their own."""
    chunks = []
    for start in range(0, count, 10_000):
        places = torch.arange(start, start + 10_000)
        chunks.append(pick(logits.expand(10_000, -1), temperature, keys(1).expand(10_000, 2), places))
    return torch.cat(chunks)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_choices_follow_the_softmax_in_a_small_vocabulary(temperature):
    torch.manual_seed(0)
    logits = 2 * torch.randn(40)
    chosen = draw(logits, temperature, 100_000)
    expected = 100_000 * (logits / temperature).softmax(-1)
    assert abs(z_score(torch.bincount(chosen, minlength=40), expected)) < 4


@pytest.mark.parametrize("vocabulary", [FULL_ROW + 1, pytest.param(5 * BLOCK, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("scale", "temperature"),
    [*(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.0, 1.0), (2.0, 1.0), (2.0, 1.4))), (2.0, 0.7)],
)
def test_choices_follow_the_softmax_in_a_large_vocabulary(vocabulary, scale, temperature):
    torch.manual_seed(0)
    logits = scale * torch.randn(vocabulary)
    logits[0] = logits.logsumexp(-1) - 1  # one token against all others
    expected = 60_000 * (logits.double() / temperature).softmax(-1)
    chosen = draw(logits, temperature, 60_000)
    assert abs(z_score(torch.bincount(chosen, minlength=vocabulary), expected)) < 4
    blocks = torch.zeros(-(-vocabulary // BLOCK)).double().index_add_(0, torch.arange(vocabulary) // BLOCK, expected)
    assert abs(z_score(torch.bincount(chosen // BLOCK, minlength=len(blocks)), blocks)) < 4


@pytest.mark.parametrize("nothing", [-1e4, float("-inf")])
def test_a_token_without_probability_is_never_chosen(nothing):
    """Whole blocks without mass included, even where their own noise is enormous."""
    torch.manual_seed(0)
    places = torch.arange(1 << 20)
    empty_block = Noise(keys(1).expand(len(places), 2), places, 1).uniform(torch.tensor([-2]))[:, 0]
    lucky = empty_block.argmax().expand(2000)
    logits = torch.full((2000, FULL_ROW + 1), nothing)
    for level in (4.0, 20.0):
        logits[:, :64] = level + torch.randn(2000, 64)
        assert pick(logits, 1.0, keys(1).expand(2000, 2), lucky).max() < 64


@pytest.mark.parametrize("vocabulary", [90, FULL_ROW + 90])
def test_a_draft_vocabulary_draws_from_the_softmax_over_its_tokens(vocabulary):
    torch.manual_seed(0)
    ids = torch.arange(vocabulary)[torch.rand(vocabulary) < 0.4]
    logits = 2 * torch.randn(len(ids))
    trimmed, expected = DraftVocabulary(ids, vocabulary), torch.zeros(vocabulary).double()
    expected[ids] = 50_000 * logits.double().softmax(-1)
    noise = Noise(keys(1).expand(50_000, 2), torch.arange(50_000), vocabulary)
    chosen, logprobs = choose(logits.expand(50_000, -1), 1.0, noise, trimmed)
    counts = torch.bincount(chosen, minlength=vocabulary)
    assert counts[expected == 0].sum() == 0
    assert abs(z_score(counts, expected)) < 4
    torch.testing.assert_close(logprobs, (expected[chosen] / 50_000).log().float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("vocabulary", [90, FULL_ROW + 90])
def test_a_draft_vocabulary_that_holds_what_matters_draws_the_same_tokens(vocabulary):
    """The same noise: where the trimmed tokens have no probability, drafting from the rest changes nothing."""
    torch.manual_seed(0)
    logits = torch.full((3000, vocabulary), -1e4)
    ids = torch.arange(0, vocabulary, 3)
    logits[:, ids] = 3 * torch.randn(3000, len(ids))
    noise = Noise(keys(3000), torch.zeros(3000), vocabulary)
    trimmed = choose(logits[:, ids], 1.0, noise, DraftVocabulary(ids, vocabulary))[0]
    assert torch.equal(trimmed, choose(logits, 1.0, noise)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("vocabulary", [50, FULL_ROW + 50])
def test_contract_2_a_choice_comes_with_its_logprob(vocabulary, temperature):
    torch.manual_seed(0)
    logits = 3 * torch.randn(200, vocabulary)
    chosen, logprobs = choose(logits, temperature, Noise(keys(200), torch.zeros(200), vocabulary))
    expected = (logits.double() / (temperature or 1)).log_softmax(-1)[torch.arange(200), chosen]
    torch.testing.assert_close(logprobs, expected.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs_of(logits, chosen, temperature), expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("vocabulary", "scale"), [(FULL_ROW, 2.0), (FULL_ROW + 1, 4.0)])
def test_close_logits_mostly_draw_the_same_token(vocabulary, scale):
    """What makes drafts work: the same noise on nearly the same logits; P(match) ≥ (1 − TV) / (1 + TV).

    The bound is for noise on every token; blocks first and tokens then keep it within .03 here.
    """
    torch.manual_seed(0)
    logits = scale * torch.randn(4000, vocabulary)
    near = logits + 0.1 * scale * torch.randn_like(logits)
    key = keys(4000)
    agree = (pick(logits, 1.0, key, torch.zeros(4000)) == pick(near, 1.0, key, torch.zeros(4000))).float().mean()
    tv = 0.5 * (logits.softmax(-1) - near.softmax(-1)).abs().sum(-1)
    assert agree > ((1 - tv) / (1 + tv)).mean() - 0.03
    other = pick(near, 1.0, key, torch.ones(4000))  # another position, other noise
    assert (pick(logits, 1.0, key, torch.zeros(4000)) == other).float().mean() < agree - 0.3


@pytest.mark.parametrize("temperature", [0.0, 0.8, "of each row"])
@pytest.mark.parametrize("vocabulary", [30, FULL_ROW + 30])
def test_rows_that_a_cache_does_not_hold_are_chosen_part_by_part(monkeypatch, vocabulary, temperature):
    torch.manual_seed(0)
    logits, noise = 2 * torch.randn(50, vocabulary), Noise(keys(50), torch.arange(50), vocabulary)
    temperature = torch.tensor([0.0, 0.8]).double().repeat(25) if temperature == "of each row" else temperature
    few = DraftVocabulary(torch.arange(0, vocabulary, 2), vocabulary)
    asked = [(logits, temperature, noise), (logits[:, ::2], temperature, noise, few)]
    whole = [choose(*given) for given in asked]
    monkeypatch.setattr(rollout.sampling, "IN_CACHE", 7 * vocabulary)
    for given, expected in zip(asked, whole, strict=True):
        assert all(map(torch.equal, choose(*given), expected))


BAD = [
    ({"group_size": 0}, "rollout.group_size=0.*at least 1"),
    ({"temperature": -0.5}, "rollout.temperature=-0.5.*positive"),
    ({"temperature": 1e-300}, "rollout.temperature=1e-300.*1e-06"),
    ({"temperature": math.nan}, "rollout.temperature=nan"),
    ({"temperature": math.inf}, "rollout.temperature=inf"),
    ({"max_completion_tokens": 0}, "rollout.max_completion_tokens=0.*1 or more"),
    ({"draft_tokens": -1}, "rollout.draft_tokens=-1.*0"),
    ({"accept": "greedy"}, "accept='greedy'.*exact or margin"),
    ({"margin": -1.0}, "margin=-1.0.*0 or more"),
    ({"stop_strings": ("a", "")}, "an empty text would end every completion"),
    ({"stop_strings": "Question:"}, "give a list of texts"),
]


def test_bad_parameters_are_named():
    PARAMS.check()
    for change, named in BAD:
        with pytest.raises(ValueError, match=named):
            replace(PARAMS, **change).check()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("vocabulary", [400, 3000])
def test_noise_and_choice_as_one_operator_choose_the_same(vocabulary, temperature):
    """As an accelerator calls them, but for the compiler."""
    logits, rows, places = torch.randn(40, vocabulary), keys(40), torch.arange(40)
    drafted = DraftVocabulary(torch.arange(0, vocabulary, 3), vocabulary)
    for among, columns in ((None, logits), (drafted, logits[:, ::3].contiguous())):
        expected = choose(columns, temperature, Noise(rows, places, vocabulary), among)
        tensors = [] if among is None else among.tensors
        found = choose_at_once(columns, rows, places, temperature, vocabulary, tensors)
        assert found[0].equal(expected[0])
        assert found[1].equal(expected[1])


class Chooses(torch.nn.Module):
    def forward(self, logits, keys_N2, positions):
        return choose(logits, 0.8, Noise(keys_N2, positions, logits.shape[1]))


def test_a_choice_is_exported_for_any_number_of_rows():
    """As compiled rounds are, see rollout/compiled; 32 rows of this vocabulary are more than a cache holds."""
    rows = torch.export.Dim("rows", min=1, max=32)
    given = torch.randn(6, 49_152), keys(6), torch.arange(6)
    exported = torch.export.export(Chooses(), given, dynamic_shapes=[{0: rows}] * 3, strict=False).module()
    given = torch.randn(30, 49_152), keys(30), torch.arange(30)
    for part, expected in zip(exported(*given), Chooses()(*given), strict=True):
        assert torch.equal(part, expected)
