"""Processes of environments: what is repeated has its own time, and what a tool writes has tokens."""

import importlib
import sys
from dataclasses import replace

import pytest

from policies.presets import small_tokenizer
from rollout.environments.format import Call, TurnFormat
from rollout.environments.protocol import open_workers, run, seeds, tools_of
from rollout.sampling import EnvironmentSpec, SamplingParams

SOURCE = '''
import time


class Room:
    def reset(self, **columns): ...

    def wait(self, seconds: float) -> str:
        """Waits.

        Args:
            seconds: how long
        """
        time.sleep(seconds)
        return f"{seconds}"

    @staticmethod
    def search(query: str) -> str:
        """Searches.

        Args:
            query: for what
        """
        return query + "\\ud83d"
'''
BEGIN = {"episode": "a", "environment": "", "columns": {}, "seeds": [1, 2], "ends": False}


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "rooms.py").write_text(SOURCE)
    return EnvironmentSpec(environments=(("", f"{tmp_path}/rooms.py:Room"),), timeout_s=1.0)


@pytest.fixture
def pool(spec):
    pool = open_workers(spec)
    yield pool
    pool.close()


def test_calls_that_are_repeated_have_time_limits_of_their_own(pool):
    """As a worker does that is new, or that has not had this episode."""
    calls = [["wait", {"seconds": 0.6}]] * 3
    [reply] = run(pool, [BEGIN | {"history": calls, "calls": [["wait", {"seconds": 0.1}]]}])
    assert reply["results"] == [["0.1", False]]


def test_a_call_that_hangs_has_one_time_limit_whoever_holds_its_episode(pool):
    calls = [["wait", {"seconds": 0.0}]] * 5
    [reply] = run(pool, [BEGIN | {"history": calls, "calls": [["wait", {"seconds": 60}]]}])
    assert reply["kind"] == "timeout"
    assert "after 1 s" in reply["message"]


def test_a_static_method_is_a_tool_and_half_a_character_is_replaced(spec, pool):
    form = TurnFormat(small_tokenizer(["one two"] * 20), tools_of(spec, ""))
    assert form.checked("search", {"query": "x"}) == Call("search", {"query": "x"})
    [reply] = run(pool, [BEGIN | {"history": [], "calls": [["search", {"query": "x"}]]}])
    assert reply["results"] == [["x?", False]]


def test_contract_4_the_seed_of_an_episode_is_a_function_of_its_key():
    """The first one is the group's, so that its episodes can be compared; the second one is the rollout's."""
    params = SamplingParams(seed=1, step=2)
    group, own = seeds(params, "p/0", 0)
    assert seeds(replace(params, temperature=0.5, group_size=9), "p/0", 0) == (group, own)
    assert [seeds(params, "p/0", sample)[0] for sample in (1, 2)] == [group] * 2
    keys = [(params, "p/0", 1), (params, "p/1", 0)]
    keys += [(replace(params, **{name: 7}), "p/0", 0) for name in ("seed", "step", "draw")]
    assert len({own, *(seeds(*key)[1] for key in keys)}) == 6
    assert len({group, *(seeds(*key)[0] for key in keys[1:])}) == 5


@pytest.mark.parametrize(
    ("kind", "package", "given"),
    [
        ("mcp", "mcp", "any command"),
        ("openenv", "openenv.core.mcp_client", "http://127.0.0.1:1"),
        ("verifiers", "verifiers", "any"),
    ],
)
def test_without_its_package_an_environment_names_the_way_out(monkeypatch, kind, package, given):
    make = getattr(importlib.import_module(f"rollout.environments.{kind}"), kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises((ImportError, ValueError), match=rf"pip install 'quartet-rl\[{kind}\]'"):
        make(given)
