"""The latent cache against attention written out with loops: one row, one head, one query at a time."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.decoding.latent_cache import LatentCache
from policies.scoring import PLAIN, Scoring, capped

WIDTH, VALUE, HEADS = 5, 3, 2


def make(rows: int, capacity: int = 16, layers: int = 2, first: int = 0) -> LatentCache:
    shape = layers, rows, capacity, WIDTH
    return LatentCache(shape, VALUE, dtype=torch.float32, device=torch.device("cpu"), first=first)


def attend_by_hand(query_HK: torch.Tensor, seen_TE: torch.Tensor, scoring: Scoring = PLAIN) -> torch.Tensor:
    scores = capped(query_HK @ seen_TE[:, -query_HK.shape[-1] :].T, scoring.cap)
    if scoring.sink is not None:
        scores = torch.cat([scores, scoring.sink[0, :, None]], dim=-1)
    return scores.softmax(-1)[:, : len(seen_TE)] @ seen_TE[:, :VALUE]


class Rows:
    """A cache beside plain lists of what every row has kept: one [L, E] tensor a token."""

    def __init__(
        self, cache: LatentCache, seen: list[list[torch.Tensor]], key_width: int = WIDTH, scoring: Scoring = PLAIN
    ) -> None:
        self.cache, self.seen, self.key_width, self.scoring = cache, seen, key_width, scoring

    def step(self, new: int, kept: list[int]) -> None:
        layers, rows = len(self.cache.layers_RTE), len(self.seen)
        queries, vectors = torch.randn(layers, rows, new, HEADS, self.key_width), torch.randn(layers, rows, new, WIDTH)
        self.cache.plan(new)
        for layer in range(layers):
            scoring = self.scoring
            if scoring.sink is not None:
                scoring = scoring._replace(sink=scoring.sink.expand(rows, -1))
            out = self.cache.attend(layer, queries[layer], vectors[layer], scoring)
            for r, s in itertools.product(range(rows), range(new)):
                seen = torch.stack([*(entry[layer] for entry in self.seen[r]), *vectors[layer, r, : s + 1]])
                torch.testing.assert_close(out[r, s], attend_by_hand(queries[layer, r, s], seen, self.scoring))
        for r, count in enumerate(kept):
            self.seen[r] += vectors[:, r, :count].unbind(1)
        self.cache.advance(torch.tensor(kept))

    def select(self, rows: list[int]) -> None:
        self.cache.select(torch.tensor(rows))
        self.seen = [self.seen[r] for r in rows]


@pytest.mark.parametrize("key_width", [WIDTH, 2])  # 2: keys are the rotated part alone
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scoring", [PLAIN, Scoring(cap=0.7), Scoring(sink=torch.tensor([[0.5, -1.5]]))])
def test_attention_equals_loops(shared, key_width, scoring):
    torch.manual_seed(0)
    rows = Rows(make(3), [[], [], []], key_width, scoring)
    rows.step(4, [4, 2, 1])
    if shared:
        seen = [list(row) for row in rows.seen for _ in range(2)]
        rows = Rows(rows.cache.fan_out(2, 12), seen, key_width, scoring)
        assert rows.cache.rows == 6
        rows.step(1, [1] * 6)
        rows.step(3, [0, 3, 1, 2, 0, 1])
        rows.step(2, [2, 1, 0, 2, 1, 0])
        rows.select([0, 1, 5])  # two rows, none, one
        rows.step(3, [1, 2, 3])
        rows.select([2])
    else:
        rows.step(3, [0, 3, 1])
        rows.select([0, 2])
    rows.step(2, [1] * len(rows.seen))
    rows.step(1, [1] * len(rows.seen))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_ragged_history_equals_loops(data):
    """Random prompts, group sizes, numbers of kept tokens, rows that leave, caches that are joined."""
    torch.manual_seed(0)
    group = data.draw(st.integers(1, 3))

    def a_history() -> Rows:
        prompts = data.draw(st.integers(1, 4))
        rows = Rows(make(prompts, 8), [[] for _ in range(prompts)])
        rows.step(4, data.draw(st.lists(st.integers(1, 4), min_size=prompts, max_size=prompts)))
        rows = Rows(rows.cache.fan_out(group, 24), [list(row) for row in rows.seen for _ in range(group)])
        for _ in range(data.draw(st.integers(0, 3))):
            live = len(rows.seen)
            new = data.draw(st.integers(1, 4))
            rows.step(new, data.draw(st.lists(st.integers(0, new), min_size=live, max_size=live)))
            leaving = data.draw(st.sets(st.integers(0, live - 1), max_size=live - 1))
            rows.select([r for r in range(live) if r not in leaving])
        return rows

    rows, others = a_history(), [a_history() for _ in range(data.draw(st.integers(0, 2)))]
    rows = Rows(rows.cache.join([r.cache for r in others]), rows.seen + [row for r in others for row in r.seen])
    rows.step(3, [2] * len(rows.seen))
    rows.step(1, [1] * len(rows.seen))


def test_the_heads_cache_hides_the_first_entry_of_every_prompt():
    """An MTP head has no entry for the first token: later ones do not see it, in the prompt and after it."""
    torch.manual_seed(0)
    cache = make(2, layers=1, first=1)
    cache.plan(3)
    query, vectors = torch.randn(2, 3, HEADS, WIDTH), torch.randn(2, 3, WIDTH)
    out = cache.attend(0, query, vectors)
    torch.testing.assert_close(out[0, 0], attend_by_hand(query[0, 0], vectors[0, :1]))  # only to be finite
    torch.testing.assert_close(out[0, 2], attend_by_hand(query[0, 2], vectors[0, 1:3]))
    cache.advance(torch.tensor([3, 1]))  # the second prompt has one token, and so nothing to see at all
    shared = cache.fan_out(2, 4)
    shared.plan(1)
    query, own = torch.randn(4, 1, HEADS, WIDTH), torch.randn(4, 1, WIDTH)
    out = shared.attend(0, query, own)
    torch.testing.assert_close(out[1, 0], attend_by_hand(query[1, 0], torch.cat([vectors[0, 1:3], own[1]])))
    torch.testing.assert_close(out[3, 0], attend_by_hand(query[3, 0], own[3]))


@pytest.mark.parametrize("full", [0, 1, 2])
def test_a_row_without_room_writes_into_no_other_row(full):
    """Also in the last place of the batch, where it would write outside the cache."""
    torch.manual_seed(0)
    rows = Rows(make(3, capacity=8), [[], [], []])
    others = [r for r in range(3) if r != full]
    rows.step(2, [2, 2, 2])
    rows.step(4, [4 if r == full else 1 for r in range(3)])
    query, vectors = torch.randn(2, 3, 4, HEADS, WIDTH), torch.randn(2, 3, 4, WIDTH)
    rows.cache.plan(4)  # the full row has six entries of eight
    for layer in range(2):
        assert rows.cache.attend(layer, query[layer], vectors[layer]).isfinite().all()
    rows.cache.advance(torch.tensor([0 if r == full else 1 for r in range(3)]))
    for r in others:
        rows.seen[r] += vectors[:, r, :1].unbind(1)
    rows.step(1, [1, 1, 1])  # what each of them had kept is still there


def test_a_prompt_is_stored_once_and_forgotten_with_its_last_row():
    cache = make(3, capacity=9)
    cache.plan(4)
    cache.advance(torch.tensor([4, 2, 3]))
    shared = cache.fan_out(5, 7)
    assert shared.prefix.latents_LPTE.shape == (2, 3, 4, WIDTH)  # three prompts, not fifteen, and no spare capacity
    assert [latents.shape for latents in shared.layers_RTE] == [(15, 7, WIDTH)] * 2
    shared.select(torch.tensor([0, 1, 14]))
    assert shared.prefix.latents_LPTE.shape[1] == 2
    assert shared.prefix.lengths_P.tolist() == [4, 3]
    assert shared.prefix.row_prompt_R.tolist() == [0, 0, 1]
