"""A draft head for a trunk that has none: the fit, and what it is worth before any training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from policies.conversion import head as draft_start
from policies.conversion.head import draft_agreement, self_written, start_head


def test_the_head_is_the_last_layer_behind_the_nearest_linear_map(random_policy, monkeypatch):
    """The map, by least squares over all tokens at once; norms, block and last norm are as they are in the trunk."""
    trunk = random_policy(1, mtp=False).trunk
    windows = list(torch.randint(2, 200, (5, 40)))
    monkeypatch.setattr(draft_start, "RIDGE", 1e-9)
    head = start_head(trunk, windows)
    given, wanted = [], []
    for window in windows:
        with torch.no_grad():
            out = trunk(window[None], output_hidden_states=True)
            final = trunk.model(window[None]).last_hidden_state[0, :-1]
            embedded = trunk.model.embed_tokens(window[1:])
        entered = out.hidden_states[-2][0, 1:]  # what the last layer reads of the next token
        both = [x * x.square().mean(-1, keepdim=True).add(trunk.config.rms_norm_eps).rsqrt() for x in (embedded, final)]
        given.append(torch.cat(both, 1) / entered.norm(dim=1, keepdim=True))
        wanted.append(entered / entered.norm(dim=1, keepdim=True))
    expected = torch.linalg.lstsq(torch.cat(given).double(), torch.cat(wanted).double()).solution.T
    torch.testing.assert_close(head.eh_proj.weight.double(), expected, rtol=0, atol=2e-3)
    last = trunk.model.layers[-1].state_dict()
    assert all(torch.equal(tensor, last[name]) for name, tensor in head.block.state_dict().items())
    assert torch.equal(head.norm.weight, trunk.model.norm.weight)
    again = start_head(trunk, windows).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in head.state_dict().items())


def test_agreement_is_the_share_of_first_drafts_that_are_the_policys_own_choice(random_policy):
    """Worked out token by token, each draft from a head that sees its own past alone."""
    torch.manual_seed(0)
    policy, windows = random_policy(2), list(torch.randint(2, 200, (3, 9)))
    policy.mtp = start_head(policy.trunk, windows)
    agreed = total = 0
    for window in windows:
        length = len(window)
        with torch.no_grad():
            hidden = policy.hidden(window[None], torch.arange(length)[None], torch.zeros_like(window[None]))[0]
            for n in range(1, length):
                # Entries 1 … n: token i and the hidden state before it, at the position of token i.
                part = torch.zeros(1, n, dtype=torch.long)
                (draft,) = policy.unroll(
                    hidden[None, :n], window[None, 1 : n + 1], torch.arange(1, n + 1)[None], part, 1
                )
                agreed += int((draft[0, -1] @ policy.lm_head.T).argmax() == (hidden[n] @ policy.lm_head.T).argmax())
                total += 1
    assert 0 < agreed < total
    assert draft_agreement(policy, windows) == agreed / total


def test_a_model_writes_its_own_text_and_nothing_else_becomes_random(random_policy):
    policy = random_policy(1, mtp=False)
    state = torch.get_rng_state()
    first = self_written(policy.trunk, policy.tokenizer, rows=3, length=7, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.shape for row in first] == [(7,)] * 3
    assert {row[0].item() for row in first} == {policy.tokenizer.eos_token_id}
    again, other = (self_written(policy.trunk, policy.tokenizer, rows=3, length=7, seed=seed) for seed in (1, 2))
    assert torch.equal(torch.stack(again), torch.stack(first))
    assert not torch.equal(torch.stack(other), torch.stack(first))


def test_without_a_token_to_start_from_it_says_what_to_give(random_policy):
    policy = random_policy(1, mtp=False)
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    with pytest.raises(ValueError, match=r"neither a bos nor an eos token.*calibrate=FILE"):
        self_written(policy.trunk, tokenizer)
