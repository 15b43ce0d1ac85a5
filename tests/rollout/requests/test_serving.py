"""A batch that requests join and leave: each gets the tokens that it would get alone, whatever the others are."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engine_cases import PROMPTS, STOPS

from rollout.cost_table import CostTable
from rollout.decoding.engine import Engine
from rollout.drafts.speculative import confident_drafts
from rollout.request import News, Request
from rollout.requests.serving import UNREAD, Serving
from rollout.sampling import Noise, SamplingParams, choose, logprobs_of, pick

BASE = SamplingParams(group_size=1, temperature=1.0, max_completion_tokens=40, stop_token_ids=STOPS)


class Client:
    """What one request was told."""

    def __init__(self, number: int, **own) -> None:
        prompt = replace(PROMPTS[number % len(PROMPTS)], prompt_id=f"p/{number}")
        self.ids, self.logprobs, self.completion, self.error = [], [], None, None
        self.request = Request(prompt, replace(BASE, seed=number, **own), self.tell)

    def tell(self, news: News) -> None:
        assert self.completion is None, "told after its end"
        self.ids += news.token_ids
        self.logprobs += news.logprobs
        self.completion, self.error = news.completion, news.error


def clients(count: int, rng: random.Random) -> list[Client]:
    return [
        Client(
            number,
            temperature=rng.choice([0.0, 0.7, 0.8, 1.3]),
            max_completion_tokens=rng.choice([1, 2, 9, 40]),
            stop_strings=rng.choice([(), ("e",), ("th", "1")]),
        )
        for number in range(count)
    ]


def alone(engine: Engine, client: Client):
    [group] = engine.sample([client.request.prompt], replace(client.request.params, draft_tokens=0))
    return group.completions[0]


@torch.inference_mode()
def served(engine: Engine, asked: list[Client], rng: random.Random, **base) -> Serving:
    """They come one by one, some rounds apart."""
    serving, coming = Serving(engine.decoder, replace(BASE, **base)), list(asked)
    while coming or serving.busy:
        for _ in range(rng.choice([0, 0, 1, 3])):
            if coming:
                serving.add(coming.pop(0).request)
        serving.round(join=rng.random() < 0.8)
    return serving


CHEAP = CostTable(rows=[1, 8], rounds=[[1.0, 1.01, 1.02], [1.0, 1.9, 2.8]])


@pytest.mark.parametrize(("draft_tokens", "costs"), [(0, None), (1, None), (3, None), (None, CHEAP)])
@pytest.mark.parametrize(
    "max_rows", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
def test_contract_4_a_request_gets_its_tokens_whoever_else_is_served(policy, draft_tokens, costs, max_rows):
    engine, rng = Engine(policy, max_rows=max_rows), random.Random(max_rows)
    asked = clients(16, rng)
    expected = [alone(engine, client) for client in asked]
    engine.costs = costs
    serving = served(engine, asked, rng, draft_tokens=draft_tokens)
    assert {client.completion.finish_reason for client in asked} == {"stop", "length"}
    for client, one in zip(asked, expected, strict=True):
        found = client.completion
        assert (found.token_ids, found.text, found.finish_reason) == (one.token_ids, one.text, one.finish_reason)
        assert client.ids == one.token_ids
        assert client.logprobs == found.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    assert not serving.requests
    drafted = sum(sum(client.completion.draft.drafted) for client in asked)
    assert (drafted > 0) == (draft_tokens != 0)


def test_contract_4_a_request_goes_on_from_its_start(policy):
    """Its prompt ends with tokens that it had got before, and its noise goes on after them."""
    engine, whole = Engine(policy, max_rows=4), Client(1, stop_token_ids=(), temperature=1.3)
    expected = alone(engine, whole).token_ids
    later, other = Client(1, stop_token_ids=(), temperature=1.3, start=7, max_completion_tokens=33), Client(2)
    prompt = later.request.prompt
    later.request.prompt = replace(prompt, token_ids=prompt.token_ids + expected[:7])
    served(engine, [other, later], random.Random(0), stop_token_ids=())
    assert later.ids == expected[7:]


@torch.inference_mode()
def test_a_dropped_request_frees_its_row_for_the_next_one(policy):
    engine = Engine(policy, max_rows=2)
    serving = Serving(engine.decoder, replace(BASE, stop_token_ids=()))
    asked = [Client(i, stop_token_ids=()) for i in range(4)]
    for client in asked:
        serving.add(client.request)
    serving.round()
    serving.round()
    assert (serving.free, len(serving.asked)) == (0, 2)
    serving.drop(asked[0].request)  # is decoded
    serving.drop(asked[2].request)  # waits
    assert (serving.free, len(serving.asked)) == (1, 1)
    serving.round()
    assert {id(request) for request in serving.requests.values()} == {id(asked[1].request), id(asked[3].request)}
    while serving.busy:
        serving.round()
    for client in (asked[1], asked[3]):
        assert client.completion.token_ids == alone(engine, client).token_ids
    assert [asked[0].completion, asked[2].completion, asked[2].ids] == [None, None, []]
    serving.drop(asked[1].request)  # has ended already
    late = Client(5, stop_token_ids=())
    serving.add(late.request)  # after a time with nobody
    while serving.busy:
        serving.round()
    assert late.completion.token_ids == alone(engine, late).token_ids


@torch.inference_mode()
def test_a_head_that_does_not_pay_off_still_reads_in_time(policy, monkeypatch):
    """Drafts that are never worth it: the head drafts at once, and then after every UNREAD rounds."""
    engine = Engine(policy, max_rows=4, costs=CostTable(rows=[1], rounds=[[1.0, 99.0]]))
    serving = Serving(engine.decoder, replace(BASE, draft_tokens=None, stop_token_ids=()))
    client, depths = Client(3, max_completion_tokens=2 * UNREAD + 20, stop_token_ids=()), []
    serving.add(client.request)
    while serving.busy:
        serving.round()
        depths.append(serving.batch.drafts.undrafted == 0)
        assert int(serving.batch.live.unread.max()) <= UNREAD + 2
    drafts = [i for i, drafted in enumerate(depths) if drafted]
    assert [b - a for a, b in pairwise(drafts)] == [UNREAD + 1] * (len(drafts) - 1)
    assert len(drafts) == 3
    assert client.ids == alone(engine, client).token_ids


@torch.inference_mode()
def test_everybody_is_told_when_decoding_cannot_go_on(policy):
    serving, asked = Serving(Engine(policy, max_rows=1).decoder, BASE), [Client(0), Client(1)]
    for client in asked:
        serving.add(client.request)
    serving.round()
    assert len(serving.give_up("memory ran out")) == 2
    assert [client.error for client in asked] == ["memory ran out"] * 2
    assert not serving.busy


@pytest.mark.parametrize("vocabulary", [60, 3000])
def test_a_row_of_its_own_temperature_gets_the_bits_of_a_batch_of_it(vocabulary):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, vocabulary, generator=generator) * 3
    keys = torch.randint(-(2**31), 2**31 - 1, (9, 2), generator=generator, dtype=torch.int32)
    noise = Noise(keys, torch.arange(9), vocabulary)
    own = torch.tensor([0.0, 0.7, 1.0, 0.7, 0.0, 1.3, 1.0, 0.7, 0.0], dtype=torch.float64)
    tokens, logprobs = choose(logits, own, noise)
    for i, temperature in enumerate(own.tolist()):
        token, logprob = choose(logits[i : i + 1], temperature, noise.of(slice(i, i + 1)))
        assert (tokens[i], logprobs[i]) == (token[0], logprob[0])
        assert pick(logits, own, noise)[i] == token[0]
        assert logprobs_of(logits, tokens, own)[i] == logprobs_of(logits[i : i + 1], token, temperature)[0]
        sure = confident_drafts(logits[i : i + 1], temperature, 0.5)
        assert confident_drafts(logits, own, 0.5)[i] == sure[0]
