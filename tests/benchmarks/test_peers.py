"""benchmarks/peers: its page, its counts, and that both sides are given the same. Speeds are no test's business."""

import json
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.peers import installs, learns, lines, mistakes, process, sizes, step, table
from benchmarks.peers.__main__ import agreement, spread


def report() -> dict:
    """A run whose numbers can be worked out by hand, with what can go wrong in it."""

    def measured(seconds: float) -> dict:
        phases = {"sampling": seconds / 4, "learning": 3 * seconds / 4, "step": seconds}
        far = {"mean": 2e-6, "max": 3e-5, "tokens": 10}
        taken = {"step": [0.975 * seconds, 1.025 * seconds]}
        more = {"spread": {"step": 0.05}, "peak_rss_gib": seconds / 10, "mismatch": far}
        return {"median": phases, "seconds": taken} | more

    learned = {"steps": [3, 5], "seconds": [10.0, 20.0], "seconds_a_step": 3.0, "first_reward": 0.5, "best_reward": 0.9}
    ended = {"message": "Error: a|b [c](d) `e`", "exit_code": 2, "seconds": 9.0, "steps_done": 0, "steps_lost": 0}
    hung = ended | {"message": "nothing", "exit_code": None, "steps_done": 5, "steps_lost": 2, "resumed": {"code": 0}}
    counted = {"lines": 17, "beyond_the_reward": 6, "ran": True}
    return {
        "form": "full",
        "seconds": 1800.0,
        "environment": {
            "time": "2026-11-27T10:00:00+00:00",
            "hardware": {"cpu": "A", "cores": 2, "memory_gib": 24.0, "gpus": []},
            "cpu_capability": "AVX2",
            "versions": {"python": "3.11", "torch": "2.13", "trl": "1.16"},
        },
        "sizes": {"step": asdict(sizes.FULL.step), "task": asdict(sizes.FULL.task), "repeats": 2, "install_s": 300.0},
        "step": {
            "prompts_equal": True,
            "contenders": {
                "ours": measured(10) | {"settings": None},
                "trl": measured(40) | {"settings": {"use_cpu": True}},
                "trl_no_checkpointing": measured(30),
                "ours_vllm": {"error": "it is not there"},
            },
        },
        "task": {"contenders": {"ours": learned, "trl": learned | {"seconds": [40.0, 50.0]}}},
        "lines": {
            "counted": {"a reward": {"ours": counted, "trl": counted | {"lines": 23}}, "a loss": {"ours": counted}},
            "read_and_not_run": {"verl": {"a loss": "a function"}},
        },
        "mistakes": {"a typo": {"ours": ended, "trl": ended}, "a reward that hangs": {"ours": ended, "trl": hung}},
        "installs": {"verl": {"failed_at": "install", "why": "exit code 1", "advice": "pip", "last_lines": "a\nno"}},
    }


def test_the_page_has_every_number_and_every_failure():
    page = table.page(report())
    assert "| quartet | 2.50 | 7.50 | – | 10.00 | 5 % | 1.00 | 2.0e-06 | 3.0e-05 |" in page
    assert "quartet, vLLM samples was not measured: it is not there" in page
    assert "| TRL | 3, 5 | 40, 50 | 3.00 | 0.50 | 0.90 |" in page
    assert "| a loss | 17 (6 new) | – | a function |" in page
    assert "| nothing | hangs, ended after 9 s | 2 |" in page
    assert "Error: a\\|b \\[c\\](d) 'e'" in page
    assert "| verl | – | pip | install: exit code 1 | no | 0.0 |" in page
    assert "2026-11-27, A, 2 cores, 24 GiB, AVX2" in page
    widths = {}
    for line in page.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.replace("\\|", "").count("|"), []).append(line)
        else:
            assert len(widths) <= 1, widths  # the rows of one table are equally wide
            widths = {}


def test_the_page_says_when_the_sides_did_not_read_the_same():
    told = report()
    told["step"]["prompts_equal"] = False
    assert "THE PROMPTS DIFFER" in table.page(told)
    assert "THE PROMPTS DIFFER" not in table.page(report())


def test_the_three_numbers_of_the_readme():
    first, second, third = table.readme(report())
    assert first.endswith("10.0 s, TRL 40.0 s as it comes (4.0 times) and 30.0 s at its fastest (3.0 times)")
    assert second.endswith("15 s, TRL 45 s")
    assert third.endswith("0 steps lost, TRL 2")
    assert table.readme({}) == []


def test_lines_of_code_are_counted_without_what_explains_them(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""A module.\n\nOf three lines."""\n\n# a comment\nx = 1  # beside code\n\n\ndef f():\n    """Says."""\n'
        '    text = """two\nlines"""\n    return (\n        x\n    )\n'
    )
    assert lines.code_lines(tmp_path / "a.py") == [
        "x = 1  # beside code",
        "def f():",
        '    text = """two',
        'lines"""',
        "    return (",
        "        x",
        "    )",
    ]
    (tmp_path / "a.yaml").write_text("# a comment\na: 1\n\n  # another\nb:\n  - 2\n")
    assert lines.code_lines(tmp_path / "a.yaml") == ["a: 1", "b:", "  - 2"]


def test_every_program_is_counted_with_what_it_adds():
    for task, sides in lines.TASKS.items():
        for side in sides:
            counted = lines.count(task, side)
            assert 10 < counted["lines"] < 50
            assert (counted["beyond_the_reward"] == 0) == (task == "a reward" or (task, side) == ("a resume", "ours"))
    assert lines.count("a resume", "trl")["beyond_the_reward"] == 1


def test_both_sides_are_given_the_same_sizes():
    """TRL's batch is what one of our steps samples, and everything that `Step` and `Task` name reaches it."""
    size = sizes.Step(prompts=3, group_size=5, tokens=7, steps=4, learning_rate=2e-6, seed=9)
    for name in ("trl", "trl_no_checkpointing", "trl_ours"):
        given = step.given_to_trl(name, size)
        assert given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] == 3 * 5
        assert (given["num_generations"], given["max_completion_length"], given["seed"]) == (5, 7, 9)
        assert (given["learning_rate"], given["max_steps"]) == (2e-6, 4 + 1)
        assert given.get("gradient_checkpointing", True) == (name != "trl_no_checkpointing")
    task = sizes.Task(prompts=3, group_size=5, tokens=7, steps=4, learning_rate=2e-3, seed=9)
    given = learns.given_to_trl(task)
    assert given["per_device_train_batch_size"] == 3 * 5
    assert (given["num_generations"], given["max_completion_length"], given["seed"]) == (5, 7, 9)
    assert (given["learning_rate"], given["max_steps"]) == (2e-3, 4)


def test_both_sides_read_the_same_prompts_in_one_step():
    """Ours holds a prompt once, TRL once a completion; one other token, or another order, is another digest."""
    ours = [[1, 2, 3], [4, 5]]
    theirs = [ids for ids in ours for _ in range(4)]
    assert step.digest(ours) == step.digest(theirs)
    assert len({step.digest(rows) for rows in (ours, ours[::-1], [[1, 2, 3], [4, 6]], [[1, 2], [3, 4, 5]])}) == 4


def test_a_reward_gives_texts_and_chats_the_same():
    assert step.reward(["a", "b"]) == step.reward([[{"role": "assistant", "content": text}] for text in "ab"])


def test_every_contender_is_named_and_its_configuration_told():
    assert set(sizes.STEP_CONTENDERS) == set(sizes.NAMES) == set(sizes.CONFIGURED) >= set(sizes.TASK_CONTENDERS)
    assert {field.name for field in fields(sizes.Form)} >= {"repeats", "install_s"}


def test_the_step_at_which_a_reward_is_reached():
    task = sizes.Task(window=2, target=0.8)
    assert learns.reached([0.1, 0.9, 0.7, 0.9], task) == 3
    assert learns.reached([0.9], task) is None
    assert learns.reached([0.7] * 9, task) is None
    found = learns.result({"reward": [0.1, 0.9, 0.7, 0.9], "seconds": [1.0, 2.0, 3.0, 4.0]}, task)
    assert (found["steps"], found["seconds"], found["first_reward"]) == (3, 6.0, 0.5)


def test_the_spread_of_repeats():
    assert spread([9.0, 10.0, 12.0]) == pytest.approx(0.3)
    assert spread([]) == 0.0


def test_two_runs_agree_within_the_larger_of_their_spreads():
    """Seconds, and the relation to ours: a host that is slower for all leaves that as it was."""
    before, now = report(), report()
    for name, seconds in {"ours": [12.0, 12.6], "trl": [46.0, 52.0], "trl_no_checkpointing": [30.5, 31.5]}.items():
        now["step"]["contenders"][name] |= {"seconds": {"step": seconds}}
    found = agreement(before, now)
    assert {name: (told["seconds"]["within"], told["to_ours"]["within"]) for name, told in found.items()} == {
        "ours": (False, True),  # 23 %, and the spread is 5 %
        "trl": (False, True),  # 22 % in seconds, half a percent in relation to ours
        "trl_no_checkpointing": (True, False),
    }
    assert found["ours"]["seconds"]["apart"] == pytest.approx(0.23)
    assert found["trl"]["to_ours"]["apart"] == pytest.approx(abs((46 / 12 + 52 / 12.6) / 2 - 4) / 4)
    page = table.page(now | {"agrees_with_the_run_before": found})
    assert "| quartet | 23 %, spread 5 % | NO | – | – |" in page
    assert "| TRL | 22 %, spread 12 % | NO | 0 %, spread 7 % | yes |" in page
    assert "in another hour" not in table.page(now)


def test_what_a_run_has_said_last(tmp_path):
    def of(said: str, code: int | None = 1, usual: set[str] = frozenset()) -> str:
        return mistakes.message(process.Ended(code, 1.0, said, 0), tmp_path, usual)

    assert of("step 1\nquartet: it is broken\nand more") == "quartet: it is broken"
    assert of("quartet: not usable:\n  steps=x: no") == "quartet: not usable: steps=x: no"
    assert of('Traceback\n  File "x"\nTypeError: no such thing') == "TypeError: no such thing"
    usual = {mistakes.unnumbered("{'loss': '0.1'}"), "a warning"}
    assert of("a warning\n{'loss': '-2.5e-03'}", 0, usual) == "nothing"
    assert of("a warning\n{'loss': 'nan'}\nall were None", 0, usual) == "all were None"
    assert of(f"open {tmp_path}/out failed", -9) == "open …/out failed"


def test_what_is_lost_is_counted_from_what_the_reward_saw():
    assert mistakes.went_on_after([0, 5, 6, 7]) == 5
    assert mistakes.went_on_after([0, 1, 2, 2, 3]) == 0
    assert mistakes.went_on_after([3, 4]) == 3


def test_no_path_and_no_address_gets_into_a_record(tmp_path):
    said = f"ERROR at https://host.example/simple/x: {tmp_path}/a.py, {process.ROOT}/b.py, /opt/c/d.whl"
    assert process.clean(said, tmp_path) == "ERROR at URL …/a.py, …/b.py, .../d.whl"


def test_a_process_that_takes_too_long_is_ended_with_its_children():
    script = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(9)"
    ended = process.run(["python3", "-c", script], 2)
    assert ended.code is None
    assert ended.peak_rss_bytes > 0
    child, limit = int(ended.said), time.monotonic() + 30
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_an_installation_that_fails_is_recorded_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(installs, "FOLDER", tmp_path / "peers")
    codes = iter([0, 1])
    ran = []

    def run(command, seconds, **named):
        ran.append(command)
        return SimpleNamespace(code=next(codes), seconds=1.0, said="Collecting it\nERROR: there is none\n")

    monkeypatch.setattr(installs, "run", run)
    found = installs.attempt(installs.PEERS[1], 9)
    assert (found["failed_at"], found["why"], found["reached"]) == ("install", "exit code 1", "venv")
    assert found["last_lines"].endswith("ERROR: there is none")
    assert not (tmp_path / "peers" / "verl").exists()
    assert len(ran) == 2
    json.dumps(found)


def test_a_peer_that_starts_is_asked_for_a_step(monkeypatch, tmp_path):
    monkeypatch.setattr(installs, "FOLDER", tmp_path / "peers")
    ran = []

    def run(command, seconds, **named):
        ran.append([str(part) for part in command])
        said = "Version: 0.9\nValueError: GPUs 0 is less than 1\n"
        return SimpleNamespace(code=int("verl_step.py" in ran[-1][1]), seconds=1.0, said=said)

    monkeypatch.setattr(installs, "run", run)
    monkeypatch.setattr(installs, "size", lambda folder: 1.8)
    found = installs.attempt(next(peer for peer in installs.PEERS if peer.name == "verl"), 9)
    assert (found["failed_at"], found["reached"], found["version"]) == ("step", "start", "0.9")
    assert ran[-1][2].endswith("models/smollm2-135m-instruct")
    page = table.page(report() | {"installs": {"verl": found}})
    assert "| verl | 0.9 |" in page
    assert "step: exit code 1 | ValueError: GPUs 0 is less than 1 | 1.8 |" in page
