"""benchmarks/rollout.py: its contenders take turns, and one that ends is named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/rollout.py"
CONTENDER = """
import json, os, sys
name, log, most, source, answers = sys.argv[1:]
def answer(value): os.write(int(answers), f"{json.dumps(value)}\\n".encode())
answer("ready")
calls = [prompts for job in json.load(open(source)) for prompts in job["prompts"]]
for prompts, _ in zip(calls[: int(most)], sys.stdin):
    with open(log, "a") as file:
        print(name, prompts[0][0], file=file)
    answer(float(prompts[0][0]))
if int(most) >= len(calls):
    answer({"peak_rss_bytes": 7})
"""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_rollout", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path, sys.modules[spec.name] = [*sys.path], module
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_a_contender_alone_leaves_a_file(bench, tmp_path):
    """As `make gpu` asks for it."""
    jobs, seen = [bench.Job(1, 1, 4, [[[10]], [[11]], [[12]]]), bench.Job(2, 1, 4, [[[20]], [[21]]])], []
    bench.alone(lambda prompts, job: seen.append(prompts[0][0]), jobs, "cpu", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    assert seen == [10, 11, 12, 20, 21]
    assert [len(result["seconds"][job.name]) for job in jobs] == [2, 1]  # without the warm-up
    assert result["peak_rss_bytes"] > 0


def test_contenders_take_turns_at_every_call_and_warm_ups_do_not_count(bench, tmp_path):
    def command(name: str, most: int = 99) -> list[str]:
        return [sys.executable, "-c", CONTENDER, name, str(tmp_path / "log"), str(most)]

    jobs = [bench.Job(1, 1, 4, [[[10]], [[11]], [[12]]]), bench.Job(2, 1, 4, [[[20]], [[21]]])]
    results = bench.in_turns({name: command(name) for name in "ab"}, jobs)
    assert (tmp_path / "log").read_text().split("\n")[:-1] == [
        f"{name} {number}" for number in (10, 11, 12, 20, 21) for name in "ab"
    ]
    expected = {"seconds": {"1 rows, 4 tokens": [11.0, 12.0], "2 rows, 4 tokens": [21.0]}, "peak_rss_bytes": 7}
    assert results == {"a": expected, "b": expected}
    with pytest.raises(SystemExit, match=r"log 2 .*jobs.json \d+ ended with 0"):
        bench.in_turns({"a": command("a", 2)}, jobs)
