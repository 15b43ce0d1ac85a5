"""The pytest plugin of quartet-rewards: by its fixture a test fails with everything that a reward does wrong.

from my_rewards import exact

def test_exact(quartet_reward):
    quartet_reward(exact, data="problems.jsonl")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

    from rewards.commands.check import RewardCheck
    from rewards.protocol import Reward


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("quartet", "rewards of reinforcement learning, by the fixture quartet_reward")
    group.addoption("--quartet-data", metavar="NAME", help="the data of tests that name none, as data.name")
    group.addoption("--quartet-limit", type=int, default=50, metavar="N", help="rows where a test names no limit; 50")
    group.addoption("--quartet-timeout", type=float, default=10.0, metavar="S", help="seconds for a batch; 10")


@pytest.fixture
def quartet_reward(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., RewardCheck]:
    """Tries a reward function as `quartet reward test` does, watches what it does besides, and fails the test for every
    problem.

    The reward is a built-in name, `path/to/file.py:function`, or a function that the test's file has at its top. `data`
    is a name as in data.name, options of the data, or rows. `form` is the tool that it is written for, as after --as,
    or `chat`. `allow` has names of habits (`hash_seed`, `changes`, `prints`, `leaks`). Everything else is an option of
    `quartet reward test`, such as `shaping=True`. Returns the check.
    """

    def check(
        reward: str | Reward,
        /,
        data: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        *,
        form: str = "",
        allow: Collection[str] = (),
        **options: Any,
    ) -> RewardCheck:
        from rewards.commands.conduct import check_conduct
        from rewards.commands.options import RewardTestConfig
        from rewards.commands.printer import text_of
        from rewards.config.options import load
        from rewards.protocol import RewardError

        function = reward if isinstance(reward, str) else _name_of(reward, request.module)
        function = f"{form}:{function}" if form else function
        if data is not None and not isinstance(data, str | Path | Mapping):
            rows, data = data, tmp_path / "rows.jsonl"
            data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        data = data or request.config.getoption("quartet_data") or {}
        given = {"data": dict(data) if isinstance(data, Mapping) else {"name": str(data)}, **options}
        given["data"].setdefault("limit", request.config.getoption("quartet_limit"))
        given["reward"] = {"timeout_s": request.config.getoption("quartet_timeout")} | dict(options.get("reward", {}))
        try:
            result = check_conduct(function, load(RewardTestConfig, None, given), allow)
        except (RewardError, ValueError, OSError) as error:
            pytest.fail(f"{function}: {error}", pytrace=False)
        if result.faults:
            pytest.fail(text_of(result), pytrace=False)
        return result

    return check


def _name_of(reward: object, module: ModuleType) -> str:
    """The name by which a process of its own finds a function that the test's file defines or imports."""
    name = next((name for name, value in vars(module).items() if value is reward), None)
    if name is None:
        pytest.fail(f"{reward!r} has no name at the top of {module.__file__}, where a process of its own finds it")
    return f"{module.__file__}:{name}"
