"""The policy that most tests of sampling have, made once a worker."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from engine_cases import taught

from policies.policy import Policy


@pytest.fixture(scope="session")
def taught_policy(random_policy: Callable[..., Any]) -> Callable[[], Policy]:
    """`taught_policy()`: a random policy whose draft head has learned a little, which takes two seconds."""
    policy = taught(random_policy(11, attention_bias=True), 0.8, steps=25)
    return lambda: copy.deepcopy(policy)


@pytest.fixture(scope="module")
def policy(taught_policy: Callable[[], Policy]) -> Policy:
    """The taught policy that the tests of a file share."""
    return taught_policy()
