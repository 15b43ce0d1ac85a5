"""The cache of transformers while rows join and leave: as wide as its longest row, and each row as if it were alone."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from policies.paths import Paths
from policies.policy import Policy
from rollout.decoding.engine import Engine
from rollout.group import Completion, Prompt
from rollout.request import News, Request
from rollout.requests.serving import Serving
from rollout.sampling import SamplingParams

CONTEXT = 32
BASE = SamplingParams(group_size=1, stop_token_ids=(), seed=3)
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Rotary positions; absolute ones, and with a mask of the context's size; ALiBi; windows that slide; states in some
# layers; states and attention in each layer.
KINDS: dict[str, dict] = {
    "llama": {},
    "gpt2": {"n_positions": CONTEXT},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "bloom": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    # Smaller weights: with those of the others its states pass rounding on, to 2e-4 also without any padding.
    "qwen3_5_text": LINEAR | {"head_dim": 8, "num_hidden_layers": 4, "initializer_range": 0.1},
    "falcon_h1": {"head_dim": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8},
}
ABSOLUTE = ("gpt2", "gpt_neo")
SLOW = ("bloom", "falcon_h1")


def stock(hf_policy, kind: str, sampler: str = "joined") -> Policy:
    policy = hf_policy(kind, 3, **{"num_hidden_layers": 2, "max_position_embeddings": CONTEXT} | KINDS[kind])
    policy.paths = Paths(sampler, "alone")
    return policy


class Client:
    """A request, and the completion that it was told."""

    def __init__(self, number: int, length: int, tokens: int) -> None:
        ids = [3 + (7 * number + 5 * place) % 200 for place in range(length)]
        params = replace(BASE, max_completion_tokens=tokens)
        self.request = Request(Prompt(f"p/{number}", "", ids), params, self.tell)
        self.completion: Completion | None = None

    def tell(self, news: News) -> None:
        self.completion = news.completion


def coming(rng: random.Random) -> Iterator[Client]:
    """Clients without end: short ones, and some that go to the end of the context."""
    number = 0
    while True:
        length = rng.randrange(1, CONTEXT // 2)
        yield Client(number, length, rng.choice([1, 4, 12, CONTEXT - length]))
        number += 1


@torch.inference_mode()
def served(engine: Engine, clients: Iterator[Client], rounds: int) -> tuple[list[Client], list[tuple[int, int]]]:
    """Those who came and were told their completion, and after each round the widest cache and its longest row."""
    serving, asked, widths = Serving(engine.decoder, BASE), [], []
    for number in range(rounds):
        if serving.free and number % 2 == 0:
            asked.append(next(clients))
            serving.add(asked[-1].request)
        serving.round()
        longest = int(serving.batch.reader.cache.lengths_R.max())
        widths.append((max(part.length for part in serving.batch.reader.cache.parts), longest))
    return [client for client in asked if client.completion is not None], widths


def largest_difference(policy: Policy, client: Client) -> float:
    """Of a completion's log-probabilities from those of the model, which reads the row alone and without a cache."""
    prompt, completion = client.request.prompt.token_ids, client.completion
    assert completion is not None
    row = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logits = policy.trunk(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
    logprobs = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return (own - torch.tensor(completion.logprobs)).abs().max().item()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_the_cache_is_as_wide_as_its_longest_row_however_many_join_and_leave(hf_policy, kind):
    """More than a hundred rounds, several times the context. GPT-Neo cannot read past it at all."""
    policy = stock(hf_policy, kind)
    clients, widths = served(Engine(policy, max_rows=5), coming(random.Random(5)), 110)
    assert len(clients) > 20
    assert all(width <= longest for width, longest in widths)
    assert max(longest for _, longest in widths) >= CONTEXT - 2
    wrong = [client for client in clients if largest_difference(policy, client) > 1e-4]
    assert not wrong


@pytest.mark.parametrize("sampler", ["joined", "apart"])
@pytest.mark.parametrize("kind", ABSOLUTE)
def test_a_row_that_ended_at_the_last_position_waits_for_the_others(hf_policy, kind, sampler):
    """It leaves when an eighth has ended, and until then it must not read on: there is no further position."""
    policy = stock(hf_policy, kind, sampler)
    few = [Client(0, CONTEXT - 4, 4), *(Client(number, 2, CONTEXT - 8) for number in range(1, 20))]
    serving = Serving(Engine(policy, max_rows=32).decoder, BASE)
    for client in few:
        serving.add(client.request)
    with torch.inference_mode():
        while serving.busy:
            serving.round()
    assert max(largest_difference(policy, client) for client in few) < 1e-4
