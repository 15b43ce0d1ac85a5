"""benchmarks/peers: its page, its counts, and that both sides are given the same. Speeds are no test's business."""

import sys
import time
from dataclasses import asdict

import psutil
import pytest

from benchmarks.peers import __main__ as main_module
from benchmarks.peers import learns, mistakes, process, sizes, step, table
from benchmarks.peers.__main__ import spread


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
    return {
        "form": "full",
        "seconds": 1800.0,
        "environment": {
            "time": "2026-11-27T10:00:00+00:00",
            "hardware": {"cpu": "A", "cores": 2, "memory_gib": 24.0, "gpus": []},
            "cpu_capability": "AVX2",
            "versions": {"python": "3.11", "torch": "2.13", "trl": "1.16"},
        },
        "sizes": {"step": asdict(sizes.FULL.step), "task": asdict(sizes.FULL.task), "repeats": 2},
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
        "mistakes": {"a typo": {"ours": ended, "trl": ended}, "a reward that hangs": {"ours": ended, "trl": hung}},
    }


def test_the_page_has_every_number_and_every_failure():
    page = table.page(report())
    assert "| quartet | 2.50 | 7.50 | – | 10.00 | 5 % | 1.00 | 2.0e-06 | 3.0e-05 |" in page
    assert "quartet, vLLM samples was not measured: it is not there" in page
    assert "| TRL | 3, 5 | 40, 50 | 3.00 | 0.50 | 0.90 |" in page
    assert "| nothing | hangs, ended after 9 s | 2 |" in page
    assert "Error: a\\|b \\[c\\](d) 'e'" in page
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


def test_nothing_is_measured_or_written_over_where_gsm8k_cannot_be_read(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(main_module, "ROOT", tmp_path)
    monkeypatch.setenv("QUARTET_GSM8K", "nowhere")
    monkeypatch.setattr(sys, "argv", ["peers", "--json", str(tmp_path / "peers.json")])
    config = tmp_path / sizes.FULL.step.model / "config.json"
    config.parent.mkdir(parents=True)
    config.touch()
    with pytest.raises(SystemExit, match="2"):
        main_module.main()
    assert "QUARTET_GSM8K=nowhere is no folder" in capsys.readouterr().err
    assert not (tmp_path / "peers.json").exists()
