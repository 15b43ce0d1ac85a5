"""The examples in docstrings of algorithms and of the learner."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "module",
    [
        *(f"algorithm.{name}" for name in ("advantages", "values", "losses", "surrogates")),
        *(f"learner.{name}" for name in ("optimizer", "eight_bit", "terms.distill", "terms.policy", "terms.value")),
    ],
)
def test_examples_of_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"grpo.{module}"))
    assert found.attempted
    assert found.failed == 0
