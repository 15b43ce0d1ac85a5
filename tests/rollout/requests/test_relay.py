"""Requests that are decoded elsewhere: the same tokens, told once, also where what decodes them is lost."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from talks import BASE, TURNS, talked

from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.group import Completion, Prompt
from rollout.relay import Relay
from rollout.request import Request
from rollout.requests.desk import Answering, Desk
from rollout.requests.serving import Serving
from rollout.sampling import SamplingParams
from rollout.workers.actors import Call, Workers
from rollout.workers.ray_relay import CALLS, RayRelay

KEPT = 10_000


class Beside(Relay):
    """Its desk is in this process. With `dies` it is lost every now and then, with all that it has."""

    def __init__(self, engine: Engine, answering: Answering, dies: bool = False) -> None:
        super().__init__(engine.policy, 0, answering.max_rows)
        self.engine, self.answering, self.chance = engine, answering, random.Random(1)
        self.dies, self.losses = dies, 0
        self.begin()

    def begin(self) -> None:
        self.desk, self.held = Desk(self.engine), set[int]()

    def exchange(self):
        new = {number: request for number, request in self.requests.items() if number not in self.held}
        self.held |= set(new)
        ended = self.desk.answer(self.answering, {n: (r.prompt, r.params) for n, r in new.items()}, [*self.gone])
        self.gone.clear()
        if self.dies and self.chance.random() < 0.2:
            self.losses += 1
            self.begin()
            return {}
        return ended


LONG = replace(BASE, stop_token_ids=(), max_completion_tokens=200, draft_tokens=0)  # more than one exchange


def answering(params: SamplingParams = LONG) -> Answering:
    return Answering(next(CALLS), 0, params, KEPT, 4)


@pytest.mark.parametrize("dies", [False, True])
def test_contract_4_a_relay_gives_the_tokens_of_the_engine_and_each_once(taught_policy, dies):
    engine = Engine(taught_policy())
    expected = talked(Serving(engine.decoder, replace(BASE, draft_tokens=0)))
    relay = Beside(engine, answering(replace(BASE, draft_tokens=2)), dies)
    found = talked(relay)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert (relay.losses > 3) == dies
    assert sum(one.cached > 0 for one in found) > (3 if dies else len(found) * (TURNS - 1) // TURNS - 1)
    assert not relay.desk.requests


def test_a_request_that_nobody_waits_for_is_given_up_everywhere(taught_policy):
    engine = Engine(taught_policy())
    relay, news = Beside(engine, answering()), []
    request = Request(Prompt("p", "", [5, 6, 7]), LONG, news.append)
    other = replace(request, tell=lambda _: None)
    relay.add(request)
    relay.add(other)
    relay.round()
    assert len(relay.desk.requests) == 2
    assert (relay.alive, relay.free) == (2, 2)
    relay.drop(request)
    while relay.busy:
        relay.round()
    assert news == []
    assert not relay.desk.requests
    waits = replace(request, tell=news.append)
    relay.add(waits)
    relay.drop(waits)
    assert not relay.busy


def test_when_decoding_cannot_go_on_everybody_is_told_why(taught_policy):
    relay, news = Beside(Engine(taught_policy()), answering()), []
    for _ in range(2):
        relay.add(Request(Prompt("p", "", [5, 6, 7]), LONG, news.append))
    relay.round()
    relay.add(Request(Prompt("p", "", [5, 6, 7]), LONG, news.append))
    assert len(relay.give_up("out of memory")) == 3
    assert [each.error for each in news[-3:]] == ["out of memory"] * 3
    assert not relay.busy
    assert len(relay.desk.requests) == 2
    relay.add(Request(Prompt("p", "", [5, 6, 7]), LONG, news.append))
    relay.round()
    assert len(relay.desk.requests) == 1  # nobody decodes what was given up


def test_another_call_begins_a_batch_of_its_own(taught_policy):
    """What was kept is of the weights of an earlier call."""
    desk, first, second = Desk(Engine(taught_policy())), answering(), answering()
    request = {0: (Prompt("p", "", [5] * 30), replace(BASE, stop_token_ids=(), max_completion_tokens=1))}
    desk.answer(first, request, [])
    before = desk.serving
    desk.answer(first, {}, [])
    assert desk.serving is before
    desk.answer(second, request, [])
    assert desk.serving is not before
    assert desk.serving.batch.conversations.held == []
    desk.close()
    assert desk.serving is None


class Pool:
    """Two workers that answer when they are told to. One that has lost an actor outside of a relay's calls has another
    since then."""

    def __init__(self, policy) -> None:
        self.policy, self.costs, self.timeout_s, self.ready = policy, None, 60.0, {0, 1}
        self.faults = SimpleNamespace(done=lambda work: None)
        self.workers = SimpleNamespace(actors=["zero", "one"], call=self.call, ended=self.ended)
        self.asked, self.answers, self.replaced = [], {}, []
        self._all_in, self._settle_workers = (lambda: True), (lambda: None)

    def call(self, i, method, answering, new, gone):
        self.asked.append((self.workers.actors[i], sorted(new), gone))
        return len(self.asked)

    def ended(self, calls, wait_s):
        return [(calls.pop(number), *self.answers.pop(number)) for number in sorted(calls) if number in self.answers]

    def _replace(self, call, lost, work) -> None:
        self.replaced.append(call.worker)
        self.workers.actors[call.worker] += "'s successor"


def test_what_no_sampler_can_continue_is_refused_at_once():
    """The vocabulary of a model that reads pictures is its text part's."""
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=300))
    relay = Relay(SimpleNamespace(config=config, max_length=240), 0, 4)
    relay.check([Prompt("p", "", [5, 299])], BASE)
    for ids, said in (([], "has no tokens"), ([300], "outside the vocabulary of 300"), ([5] * 250, "the context")):
        with pytest.raises(RolloutError, match=said):
            relay.check([Prompt("p", "", ids)], BASE)


@pytest.mark.parametrize("called", [False, True])
def test_requests_of_a_worker_that_was_replaced_elsewhere_are_asked_of_its_successor(taught_policy, called):
    pool, news = Pool(taught_policy()), []
    relay = RayRelay(pool, 0, LONG, KEPT, 4)
    for home in (0, 1):
        relay.add(Request(Prompt("p", "", [5, 6, 7]), LONG, news.append, home=home))
    relay.round()
    assert pool.asked == [("zero", [0], []), ("one", [1], [])]
    if called:
        pool.answers[2] = None, ("worker", "it was killed")  # comes after its successor
    else:
        relay._ask, ask = (lambda ready: None), relay._ask
        pool.answers[2] = {}, None
        relay.round()
        relay._ask = ask
    pool.workers.actors[1] = "another"
    relay.round()
    assert pool.replaced == []
    assert pool.asked[2:] == [("another", [1], [])]
    pool.answers[3] = {1: Completion([8], [-1.0], "", "stop", 0)}, None
    pool.answers[1] = None, ("worker", "it died")  # in a call of the relay, which replaces it
    relay.round()
    assert [each.token_ids for each in news] == [[8]]
    relay.round()
    assert pool.replaced == [0]
    assert pool.asked[3:] == [("zero's successor", [0], [])]


def test_a_worker_that_is_replaced_before_it_is_ready_is_no_longer_waited_for():
    workers = object.__new__(Workers)
    workers.actors, workers.ray = ["zero", "one"], SimpleNamespace(kill=None)
    workers.cluster = SimpleNamespace(ask=lambda *given: None)
    workers._starting = {f"{i} is ready": Call(i, None, 600.0, "it did not start") for i in (0, 1)}
    workers._start = lambda i: workers._starting.update({"its successor is": Call(i, None, 600.0, "")})
    workers.restart(1)
    assert [*workers._starting] == ["0 is ready", "its successor is"]
