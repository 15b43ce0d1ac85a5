"""How processes of rewards begin matters to no test of this folder: those of tests/rewards/isolation are about it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from copies import OF_REWARDS

from rewards.isolation import pool


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not item.path.is_relative_to(Path(__file__).parent):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool, "subprocess", OF_REWARDS)
        return (yield)
