"""Worker processes: none remains, none loads torch, and a late or dying one is replaced."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rewards import RewardError, RewardSpec, Scorer
from rewards.isolation.pool import WorkerPool, stuck_at
from rewards.scorer import BATCH
from rewards.spec import RewardFunction

FILE = Path(__file__).parents[2] / "cases/faulty_rewards.py"
FAULTY = RewardSpec(f"{FILE}:faulty")


def score(scorer: Scorer, completions: list[str], prompt: str = "p"):
    return scorer.score([prompt], [completions], [{}], prompt_ids=["a"])[0]


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], within_s: float = 20.0) -> bool:
    end = time.monotonic() + within_s
    while any(map(alive, pids)):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def read_pids(file: Path, count: int, within_s: float = 30.0) -> list[int]:
    end = time.monotonic() + within_s
    while not (file.exists() and file.read_text().count("\n") >= count):
        assert time.monotonic() < end, f"{file} was not written"
        time.sleep(0.02)
    return [int(line) for line in file.read_text().split()]


def test_a_worker_stays_until_close_and_not_longer():
    with Scorer([FAULTY]) as scorer:
        [first] = score(scorer, ["fine"]).extras["pid"]
        assert score(scorer, ["fine"]).extras["pid"] == [first]
        assert first != os.getpid()
        assert alive(first)
    assert gone([first], within_s=0)
    with pytest.raises(RewardError, match="closed"):
        score(scorer, ["fine"])


def test_a_late_worker_is_replaced_and_takes_its_children_along(tmp_path):
    with Scorer([FAULTY], timeout_s=0.7, on_error="drop_sample") as scorer:
        [first] = score(scorer, ["fine"]).extras["pid"]
        result = score(scorer, ["child_and_sleep"], prompt=str(tmp_path / "children"))
        assert result.errors[0].kind == "timeout"
        lost, seconds = scorer.take_lost()
        assert (lost, seconds > 0.7) == (1, True)
        assert scorer.take_lost() == (0, 0.0)
        assert gone([first, *read_pids(tmp_path / "children", 1)])
        [second] = score(scorer, ["fine"]).extras["pid"]
        assert second != first


def test_a_worker_that_died_while_idle_is_replaced_without_a_failure():
    with Scorer([FAULTY]) as scorer:
        [first] = score(scorer, ["fine"]).extras["pid"]
        os.kill(first, signal.SIGKILL)
        result = score(scorer, ["fine"])
        assert result.rewards == [1.0]
        assert result.extras["pid"] != [first]
        lost, seconds = scorer.take_lost()
        assert (lost, seconds > 0) == (1, True)


def test_workers_share_the_work():
    with Scorer([FAULTY], workers=2) as scorer:
        scorer.score(["p"] * 2, [["fine"]] * 2, [{}] * 2, prompt_ids=["a", "b"])  # both are started
        count = BATCH
        scores = scorer.score(["p"] * count, [["fine"] * 4] * count, [{}] * count, prompt_ids=["a"] * count)
        assert len({pid for group in scores for pid in group.extras["pid"]}) == 2
        assert all(group.rewards == [1.0] * 4 for group in scores)


def test_workers_load_neither_torch_nor_ray_and_hash_alike():
    def run():
        with Scorer([RewardSpec("gsm8k"), RewardSpec(f"{FILE}:loaded_modules")]) as scorer:
            return scorer.score(["p"], [["c"]], [{"answer": "1"}], prompt_ids=["a"])[0]

    first, second = run(), run()
    assert first.extras["heavy"] == [[]]
    assert first.rewards == second.rewards


def test_a_file_of_rewards_may_be_called_rewards(tmp_path):
    """Once this process has loaded it, its folder comes first in the path that workers get."""
    (tmp_path / "rewards.py").write_text("def one(completions, **_):\n    return [1.0] * len(completions)\n")
    code = "import sys\nfrom rewards import RewardSpec, Scorer\nsys.path.insert(0, sys.argv[1])\n"
    code += "Scorer([RewardSpec(f'{sys.argv[1]}/rewards.py:one')]).close()\n"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_close_ends_a_call_that_waits_in_another_thread():
    scorer = Scorer([FAULTY], timeout_s=60)
    caught = []

    def wait():
        try:
            score(scorer, ["sleep"])
        except RewardError as error:
            caught.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    scorer.close()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert "closed" in caught[0]


def test_calls_from_several_threads_keep_apart():
    results = {}
    with Scorer([RewardSpec("gsm8k")], workers=2) as scorer:

        def work(number: int) -> None:
            texts = [[f"#### {number}", "#### 0"]] * 20
            scores = scorer.score(["p"] * 20, texts, [{"answer": str(number)}] * 20, prompt_ids=["a"] * 20)
            results[number] = [score.rewards for score in scores]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: [[1.0, 0.0]] * 20 for number in range(1, 6)}


SCRIPT = """
import sys
from rewards import RewardSpec, Scorer
scorer = Scorer([RewardSpec({file!r} + ":faulty")], timeout_s={timeout_s}, workers=1)
pids = scorer.score(["p"], [["fine"]], [{{}}], prompt_ids=["a"])[0].extras["pid"]
with open(sys.argv[1], "w") as file:
    file.write(str(pids[0]) + "\\n")
scorer.score(["p"], [[sys.argv[2]]], [{{}}], prompt_ids=["a"])
"""


@pytest.fixture
def start_parent(tmp_path):
    """Start a program without an `if __name__` guard that scores one hanging completion; give it and its worker."""
    parents = []

    def start(fault: str, timeout_s: float) -> tuple[subprocess.Popen, int]:
        script = tmp_path / "program.py"
        script.write_text(SCRIPT.format(file=str(FILE), timeout_s=timeout_s))
        command = [sys.executable, str(script), str(tmp_path / "pid"), fault]
        parents.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path))
        [worker] = read_pids(tmp_path / "pid", 1)
        return parents[-1], worker

    yield start
    for parent in parents:
        parent.kill()
        parent.communicate()


def test_no_process_is_left_after_ctrl_c(start_parent):
    parent, worker = start_parent("loop", 60)
    time.sleep(0.3)
    assert alive(worker)
    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)  # ends only when no one holds the pipe any more
    assert "KeyboardInterrupt" in errors
    assert gone([worker])


@pytest.mark.parametrize(("fault", "timeout_s"), [("sleep", 60), pytest.param("c_hang", 1.5, marks=pytest.mark.slow)])
def test_no_process_is_left_when_the_parent_is_killed(start_parent, fault, timeout_s):
    parent, worker = start_parent(fault, timeout_s)
    time.sleep(0.3)
    assert alive(worker)
    parent.kill()
    assert gone([worker])


def test_a_program_that_forgets_to_close_leaves_nothing(start_parent):
    parent, worker = start_parent("raise", 60)
    _, errors = parent.communicate(timeout=30)
    assert "ValueError: boom" in errors
    assert gone([worker])


@pytest.mark.slow
def test_an_import_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("rewards.isolation.pool.START_TIMEOUT_S", 6.0)  # a busy machine needs some to begin
    (tmp_path / "mine.py").write_text("import time\ntime.sleep(1000)\n")
    with pytest.raises(RewardError, match=r"no result after 6 s, stuck at mine.py:2 in <module>"):
        Scorer([RewardSpec(f"{tmp_path / 'mine.py'}:grade")])


def test_a_worker_that_always_dies_is_not_restarted_for_ever(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), os._exit(7)), daemon=True).start()\n"
        "def grade(completions, **_):\n    time.sleep(2)\n    return [1.0]\n"
    )
    with Scorer([RewardSpec(f"{tmp_path / 'mine.py'}:grade")]) as scorer:
        time.sleep(1)  # it dies while idle, and its successor at work
        with pytest.raises(RewardError, match=r"died: the process that ran it ended \(exit code 7\)"):
            score(scorer, ["x"])


def test_a_death_while_idle_costs_a_request_only_of_a_worker_that_has_served_none():
    """Then the function may be to blame, and its workers would be started for ever."""
    spec = RewardFunction(RewardSpec(f"{FILE}:faulty"), 0)
    request = {"function": 0, "prompts": ["p"], "columns": {}, "completion_columns": {}, "completions": [["fine"]]}
    before = set(psutil.Process().children())
    pool = WorkerPool([spec.description()], size=1, timeout_s=20.0)
    assert set(psutil.Process().children()) == before  # none is started before it is used

    def run_after_its_death() -> dict:
        process = pool._workers[0]._process
        process.kill()
        process.wait()
        return pool.run([request])[0]

    try:
        pool.signatures()
        assert run_after_its_death()["kind"] == "died"
        assert pool.run([request])[0]["rewards"] == [1.0]
        assert run_after_its_death()["rewards"] == [1.0]
    finally:
        pool.close()


def test_where_a_worker_was_stuck():
    trace = (
        "Timeout (0:00:01)!\nThread 0x01 (most recent call first):\n"
        '  File "/venv/lib/worker.py", line 1 in wait\n\n'
        "Thread 0x02 (most recent call first):\n"
        f'  File "{os.__file__}", line 9 in stdlib\n  File "/home/me/mine.py", line 7 in grade\n'
    )
    assert stuck_at(trace) == ", stuck at mine.py:7 in grade"
    assert stuck_at("") == ""


def test_a_function_that_needs_too_much_memory_gets_an_error(tmp_path):
    path = tmp_path / "greedy.py"
    path.write_text("def greedy(completions, **_):\n    return [len(bytearray(int(c))) for c in completions]\n")
    spec = RewardFunction(RewardSpec(f"{path}:greedy"), 0)
    request = {"function": 0, "prompts": [""], "columns": {}, "completion_columns": {}}
    pool = WorkerPool([spec.description()], size=1, timeout_s=20.0, memory=256 << 20)
    try:
        fits, too_much, after = pool.run(
            [request | {"completions": [[size]]} for size in ("1000", "500000000", "2000")]
        )
    finally:
        pool.close()
    assert (fits["rewards"], after["rewards"]) == ([1000.0], [2000.0])
    assert too_much["kind"] == "raised"
    assert too_much["message"].startswith("MemoryError (greedy.py:2")


@pytest.mark.parametrize("imported", ["import numpy as np\n", ""])
def test_contract_4_the_first_episode_of_a_process_is_seeded_for_numpy_too(tmp_path, imported):
    """Which imports its random functions late."""
    inside = "" if imported else "    import numpy as np\n"
    source = f"{imported}def solve(base_url):\n{inside}    return float(np.random.rand())\n"
    (tmp_path / "agents.py").write_text(source)
    request = {"function": 0, "given": {"base_url": ""}, "seed": 7}
    rewards = set()
    for _ in range(2):
        pool = WorkerPool([{"kind": "agent", "function": f"{tmp_path}/agents.py:solve"}], size=1, timeout_s=60)
        try:
            [reply] = pool.run([request])
        finally:
            pool.close()
        rewards.add(reply["reward"])
    assert len(rewards) == 1
