"""Messages: what a worker gets of a publication, and that it holds the learner's bits afterwards."""

import gc
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import rollout.weight_sync.message
from policies.policy import Policy
from rollout.decoding.engine import Engine
from rollout.faults import RolloutError
from rollout.weight_sync.checksums import checksums
from rollout.weight_sync.message import Message, Moved, Sender, pack, unpack
from rollout.workers.worker import Receiver

TARGETS = {"attention": ["o_proj", "kv_b_proj"], "everything": ["o_proj", "experts", "router", "lm_head", "mtp"]}


def learn(policy: Policy) -> None:
    """Move everything that learns, and the expert bias."""
    with torch.no_grad():
        for name, tensor in policy.state_dict(keep_vars=True).items():
            if tensor.requires_grad or "correction_bias" in name:
                tensor.add_(0.05 * torch.randn_like(tensor))


def receiver(policy: Policy) -> Receiver:
    engine = Engine(Policy.from_skeleton(policy.skeleton(), policy.trunk.dtype), policy.trunk.dtype)
    engine.version = -1
    return Receiver(engine)


def take(sender: Sender, weights, version: int) -> Message:
    """A publication that is small enough for one part."""
    [message] = sender.messages(weights, version)
    return message


def given(worker: Receiver, to: Receiver) -> dict:
    """What a worker holds that has got everything from another."""
    for message in worker.messages(20_000):
        held = to.take_message(message)
    return held


def test_weights_survive_their_journey():
    weights = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5),
        "whole": torch.arange(4),
        "empty": torch.zeros(0, 3),
    }
    arrived = unpack(pack(weights))
    assert checksums(arrived) == checksums(weights)
    for name, tensor in weights.items():
        assert torch.equal(arrived[name], tensor)
        assert arrived[name].dtype == tensor.dtype


def test_a_new_worker_gets_everything_and_one_that_missed_a_version_refuses_the_difference(random_policy):
    policy = random_policy(3)
    policy.add_lora(2, 4.0, TARGETS["attention"])
    sender, worker = Sender(), receiver(policy)
    take(sender, policy.synced_weights(), 0)
    learn(policy)
    message = take(sender, policy.synced_weights(), 1)
    with pytest.raises(RolloutError, match="holds policy version -1, and what it got follows version 0"):
        worker.take_message(message)
    [again] = sender.again()
    assert worker.take_message(again) == checksums(policy.weights())
    assert again.bytes > message.bytes


@pytest.mark.parametrize("targets", [None, *TARGETS])
def test_a_worker_gives_another_one_what_it_holds(random_policy, targets):
    """Also the weights under its adapters, so that both can follow the next publication."""
    policy = random_policy(3)
    if targets:
        policy.add_lora(2, 4.0, TARGETS[targets])
    sender, workers = Sender(), [receiver(policy), receiver(policy)]
    for version in range(2):
        workers[0].take_message(take(sender, policy.synced_weights(), version))
        learn(policy) if version == 0 else None
    assert given(*workers) == checksums(policy.weights())
    assert workers[1].engine.version == 1
    learn(policy)
    message = take(sender, policy.synced_weights(), 2)
    for worker in workers:
        assert worker.take_message(message) == checksums(policy.weights())


@pytest.mark.parametrize("targets", [None, *TARGETS])
def test_what_is_kept_is_given_again_after_the_learner_has_moved_on(random_policy, targets):
    policy = random_policy(3)
    if targets:
        policy.add_lora(2, 4.0, TARGETS[targets])
    sender, worker, former = Sender(), receiver(policy), receiver(policy)
    for message in sender.messages(policy.synced_weights(), 0):
        former.take_message(message)
    published = checksums(policy.weights())
    sender.copy_weights()
    learn(policy)
    [again] = sender.again()
    assert worker.take_message(again) == published != checksums(policy.weights())
    change = take(sender, policy.synced_weights(), 1)  # the next publication follows as if nothing had been kept
    assert (change.since == 0) == bool(targets)
    for each in (worker, former):
        assert each.take_message(change) == checksums(policy.weights())
    learn(policy)
    with pytest.raises(Moved):
        list(sender.again())


def test_parts_of_two_publications_are_not_mixed(random_policy):
    policy = random_policy(3)
    sender, worker = Sender(part_bytes=20_000), receiver(policy)
    first, second = (list(sender.messages(policy.weights(), version)) for version in range(2))
    assert [worker.take_message(part) for part in (*first[:2], second[0], *first[2:])][-1] == {}
    assert worker.engine.version == -1
    assert [worker.take_message(part) for part in second][-1] == checksums(policy.weights())
    assert worker.engine.version == 1


def test_a_publication_that_is_cut_short_is_followed_by_a_whole_one(random_policy, monkeypatch):
    policy = random_policy(3)
    policy.add_lora(2, 4.0, TARGETS["attention"])
    sender = Sender()
    take(sender, policy.synced_weights(), 0)
    cut = policy.synced_weights()
    name, adapter = next(iter(cut.adapters.items()))
    cut.adapters[name] = replace(adapter, a=None)
    with pytest.raises(AttributeError):
        take(sender, cut, 1)
    assert take(sender, policy.synced_weights(), 2).since is None


def test_contract_5_a_worker_that_holds_something_else_is_told_by_the_first_tensor():
    """Also where it holds one too few or too many; in the type that samplers have, or in the learner's."""
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.full((2,), 0.1)}
    sender = Sender(cast=torch.bfloat16)
    take(sender, weights, 1)
    for held in (weights, {name: tensor.bfloat16() for name, tensor in weights.items()}):
        assert sender.difference(checksums(held)) is None
    moved = weights | {"b": torch.tensor([0.1, 0.2])}
    for held, name in (
        (moved, "b"),
        ({name: tensor.bfloat16() for name, tensor in moved.items()}, "b"),
        ({"a": weights["a"]}, "b"),
        (weights | {"c": torch.zeros(1)}, "c"),
        ({name: tensor.half() for name, tensor in weights.items()}, "a"),
    ):
        assert sender.difference(checksums(held)) == name


def memory() -> dict[int, int]:
    """Bytes of all tensors of this process by their address; views are counted once."""
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()  # NumPy tells it of its arrays
    yield
    tracemalloc.stop()


@pytest.mark.long
@pytest.mark.parametrize("adapters", [False, True])
def test_a_publication_never_holds_a_second_copy_of_the_weights(random_policy, monkeypatch, traced, adapters):
    """As from a GPU or from shards, where each tensor is copied to the host: a part and a tensor, and nothing after."""
    policy = random_policy(3)
    if adapters:
        policy.add_lora(2, 4.0, ["experts", "o_proj"])
    sizes, sender = [tensor.nbytes for tensor in policy.weights().values()], Sender(part_bytes=20_000)
    gc.collect()
    before, traced_before = memory(), tracemalloc.get_traced_memory()[0]
    monkeypatch.setattr(rollout.weight_sync.message, "_on_host", lambda tensor: tensor.detach().clone())

    def held() -> int:
        tensors = sum(size for address, size in memory().items() if address not in before)
        return tensors + tracemalloc.get_traced_memory()[0] - traced_before

    small = 0.25 * sum(sizes)  # names and digests, and what Python keeps of its own
    limit = sender.part_bytes + 2 * max(sizes) + small  # the tensor that fills a part, and a merged one
    assert limit < 0.75 * sum(sizes)
    for version in range(2):
        sent, most = 0, 0
        for message in sender.messages(policy.synced_weights(), version):
            sent += message.bytes
            most = max(most, held())
            del message
        gc.collect()
        assert most <= limit
        assert held() < small
        assert sent >= (0.02 if version and adapters else 1) * sum(sizes)
