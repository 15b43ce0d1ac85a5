"""A reward in a form of another tool is part of a class of theirs, which the garbage collector alone frees."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    yield
    gc.collect()
