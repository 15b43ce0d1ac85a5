"""Messages: what a worker gets of a publication, and that it holds the learner's bits afterwards."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from policies.policy import Policy
from rollout.engine import Engine, RolloutError
from rollout.publication.deltas import decode, encode
from rollout.publication.digests import digests, first_difference
from rollout.publication.message import Sender, pack, unpack
from rollout.worker import Receiver

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


def test_weights_survive_their_journey():
    weights = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "transposed": torch.randn(3, 4).T,
        "scalar": torch.tensor(2.5),
        "whole": torch.arange(4),
        "empty": torch.zeros(0, 3),
    }
    arrived = unpack(pack(weights))
    assert digests(arrived) == digests(weights)
    for name, tensor in weights.items():
        assert torch.equal(arrived[name], tensor)
        assert arrived[name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", TARGETS)
def test_with_adapters_a_and_b_alone_give_the_sampler_the_learners_bits(random_policy, targets, dtype):
    policy = random_policy(3).cast(dtype)
    policy.add_lora(2, 4.0, TARGETS[targets])
    sender, worker = Sender(), receiver(policy)
    first = sender.take(policy.publication(), 0)
    worker.take(first)
    for version in (1, 2):
        learn(policy)
        message = sender.take(policy.publication(), version)
        assert set(message.tensors).isdisjoint(first.adapters)
        assert message.bytes < 0.5 * first.bytes
        held = worker.take(message)
        assert held == digests(policy.weights())
        assert sender.difference(held) is None
        for name, tensor in worker.engine.policy.weights().items():
            assert torch.equal(tensor, policy.weights()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [None, ["o_proj"]])
def test_differences_give_the_same_bits_in_fewer_bytes(random_policy, targets, dtype):
    policy = random_policy(3).cast(dtype)
    if targets:
        policy.add_lora(2, 4.0, targets)
    senders, worker = [Sender(deltas=True), Sender()], receiver(policy)
    for sender in senders:
        worker.take(sender.take(policy.publication(), 0))
    for version in (1, 2):
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + 2**-9)
        message, plain = (sender.take(policy.publication(), version) for sender in senders)
        assert message.since == version - 1
        assert message.deltas
        assert message.bytes < plain.bytes
        assert worker.take(message) == digests(policy.weights())


def test_a_worker_that_holds_other_bits_than_a_difference_follows_does_not_confirm_it(random_policy):
    policy = random_policy(3)
    sender, worker = Sender(deltas=True), receiver(policy)
    worker.take(sender.take(policy.weights(), 0))
    with torch.no_grad():
        worker.engine.policy.trunk.model.norm.weight.add_(1)
        policy.trunk.model.norm.weight.mul_(1.001)
    assert sender.difference(worker.take(sender.take(policy.weights(), 1))) == "trunk.model.norm.weight"
    assert worker.take(sender.everything()) == digests(policy.weights())
    worker.engine.policy.trunk.model.norm.to(torch.bfloat16)  # a sampler that holds another type
    assert worker.take(sender.take(policy.weights(), 2)) == {}
    assert sender.difference(worker.take(sender.everything())) is None


def test_a_damaged_difference_is_refused():
    old, new = (np.frombuffer(text, np.uint8) for text in (b"a" * 400, b"b" * 400))
    packed = encode(new, old, 4)
    assert packed.nbytes < 100
    assert decode(packed, old, 4).tobytes() == new.tobytes()
    for wrong in (packed[:-3], np.frombuffer(b"no zstd at all", np.uint8)):
        with pytest.raises(ValueError, match="damaged"):
            decode(wrong, old, 4)
    with pytest.raises(ValueError, match="has 400 bytes, and its tensor 800|damaged"):
        decode(packed, np.zeros(800, np.uint8), 4)
    noise = np.random.default_rng(0).integers(0, 256, 400).astype(np.uint8)
    assert encode(noise, old, 4) is None


def test_a_new_worker_gets_everything_and_one_that_missed_a_version_refuses_the_difference(random_policy):
    policy = random_policy(3)
    policy.add_lora(2, 4.0, TARGETS["attention"])
    sender, worker = Sender(), receiver(policy)
    sender.take(policy.publication(), 0)
    learn(policy)
    message = sender.take(policy.publication(), 1)
    with pytest.raises(RolloutError, match="holds policy version -1, and what it got follows version 0"):
        worker.take(message)
    assert worker.take(sender.everything()) == digests(policy.weights())
    assert sender.everything().bytes > message.bytes


def test_a_sender_keeps_nothing_of_the_learners_memory(random_policy):
    policy = random_policy(3)
    sender = Sender()
    sender.take(policy.publication(), 0)
    before = digests(policy.weights())
    learn(policy)
    assert receiver(policy).take(sender.everything()) == before


def test_the_first_tensor_that_differs_is_named(random_policy):
    policy = random_policy(3)
    sender = Sender()
    sender.take(policy.weights(), 0)
    held = digests(policy.weights())
    assert sender.difference(held) is None
    assert first_difference(policy.weights(), held) is None
    name = "trunk.model.layers.1.mlp.experts.down_proj"
    for wrong in (held | {name: ("float32", "0")}, {n: found for n, found in held.items() if n != name}):
        assert sender.difference(wrong) == first_difference(policy.weights(), wrong) == name
    assert sender.difference(held | {"draft_ids": ("int64", "0")}) == "draft_ids"


def test_a_sampler_may_hold_another_type(random_policy):
    """The transformers backend decodes in bf16 what it got in fp32."""
    policy = random_policy(3)
    sender = Sender()
    sender.take(policy.weights(), 0)
    held = digests({name: tensor.bfloat16() for name, tensor in policy.weights().items()})
    assert sender.difference(held) is None
    moved = {name: tensor.bfloat16() * 2 for name, tensor in policy.weights().items()}
    assert sender.difference(digests(moved)) == next(iter(held))


def test_a_publication_that_is_cut_short_is_followed_by_a_whole_one(random_policy, monkeypatch):
    policy = random_policy(3)
    policy.add_lora(2, 4.0, TARGETS["attention"])
    sender = Sender()
    sender.take(policy.publication(), 0)
    cut = policy.publication()
    cut.adapters["trunk.cut"] = replace(next(iter(cut.adapters.values())), a=None)
    with pytest.raises(AttributeError):
        sender.take(cut, 1)
    assert sender.take(policy.publication(), 2).since is None
