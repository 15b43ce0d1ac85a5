"""Digests of weights: a sampler that holds anything but what was published is named by its tensor (contract 5)."""

import torch

from rollout.weight_sync.checksums import checksums, first_difference

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([0.1, 0.2])}


def test_contract_5_what_a_sampler_holds_is_what_was_published():
    assert first_difference(WEIGHTS, checksums(WEIGHTS)) is None
    rounded = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    assert first_difference(WEIGHTS, checksums(rounded)) is None  # the same values in the sampler's type


def test_contract_5_a_tensor_that_differs_lacks_or_is_too_much_is_named():
    moved = WEIGHTS | {"b": torch.tensor([0.1, 0.3])}
    assert first_difference(WEIGHTS, checksums(moved)) == "b"
    assert first_difference(WEIGHTS, checksums(WEIGHTS | {"a": WEIGHTS["a"].reshape(3, 2)})) == "a"
    assert first_difference(WEIGHTS, checksums({"a": WEIGHTS["a"]})) == "b"
    assert first_difference({"a": WEIGHTS["a"]}, checksums(WEIGHTS)) == "b"
