"""The examples in docstrings of the statistics and of the alarms."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["findings.alarms", "statistics.estimates", "statistics.gain", "statistics.paired"])
def test_examples_of_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"review.{module}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert found.failed == 0
