"""The examples in docstrings of rollout/ and policies/ say what happens."""

import doctest
import importlib
from types import SimpleNamespace

import torch

MODULES = (
    "policies.logprobs",
    "rollout.cost_table",
    "rollout.decoding.costs",
    "rollout.draft_stats",
    "rollout.drafts.depth",
    "rollout.drafts.speculative",
    "rollout.group",
    "rollout.rows",
    "rollout.sampling",
    "rollout.decoding.shared_rows",
)


def test_docstring_examples():
    names = {"SimpleNamespace": SimpleNamespace, "torch": torch}
    for module in MODULES:
        assert doctest.testmod(importlib.import_module(module), extraglobs=names).failed == 0, module
