"""The examples in docstrings of the statistics, the alarms and the old names of metrics."""

import doctest
import importlib

import pytest

MODULES = ("findings.alarms", "readers.old_metrics", "statistics.estimates", "statistics.gain", "statistics.paired")


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"review.{module}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert found.failed == 0
