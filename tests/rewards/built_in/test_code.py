"""The code reward: gold passes, mutants fail, tricks do not pay, and the sandbox holds."""

import time

import pytest

from rewards import RewardError, RewardSpec, Scorer
from rewards.built_in.code import code, program_of
from rewards.isolation import sandbox
from tests.cases.small_tasks import small_tasks
from tests.rewards.isolation.test_sandbox import ATTACKS

pytestmark = pytest.mark.skipif(bool(sandbox.unavailable()), reason=f"no sandbox: {sandbox.unavailable()}")
TEST = "assert double(2) == 4"


def marks(programs, tests=TEST, **options):
    logged = {}
    found = code(None, programs, tests=[tests] * len(programs), log_extra=logged.__setitem__, **options)
    return found, logged["code_result"]


def check(tasks):
    programs = [program for task in tasks for program in (task.gold, task.mutant)]
    found = code(None, programs, tests=[task.tests for task in tasks for _ in range(2)], seconds=20.0)
    wrong = [
        task.name for task, gold, mutant in zip(tasks, found[::2], found[1::2], strict=True) if (gold, mutant) != (1, 0)
    ]
    assert wrong == []


def test_gold_passes_and_a_mutant_fails_on_one_task_of_each_family():
    check(small_tasks()[::8][:6])


@pytest.mark.long
def test_gold_passes_and_mutants_fail_on_164_tasks():
    tasks = small_tasks()
    assert len({task.question for task in tasks}) == 164
    check(tasks)


def test_the_program_is_the_last_block():
    assert program_of("no block") == "no block"
    assert program_of("```py\na\n```\nOutput:\n```\n4\n```") == "a\n"
    assert program_of("```\na\n```\ntext\n```\nb\n```") == "b\n"
    assert program_of("1. So:\n   ```python\n   if x:\n       y = 1\n   ```\n").strip() == "if x:\n    y = 1"
    assert program_of("```python\ncut off") == "cut off"
    assert program_of("```bash\npip install x\n```\nThen:\n```python3\na\n```\n```text\nout\n```\nDone.") == "a\n"
    prints = "print('ready', end='')\ndef double(x):\n    print(x, end=' ')\n    return 2 * x"  # no line break
    found, _ = marks(["Like this:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.", prints])
    assert found == [1.0, 1.0]


FENCES = {  # as models write them: each holds `def double(x): return 2 * x`
    "info string": '```python title="double.py"\n{}\n```',
    "attributes": "```{{.python .numberLines}}\n{}\n```",
    "a version": "```Python3\n{}\n```\n",
    "a file": "```python:double.py\n{}\n```",
    "tildes": "~~~python\n{}\n~~~\nDone.",
    "four marks": "````python\n{}\n````",
    "behind text": "The code: ```python\n{}\n```",
    "closed behind code": "```python\n{}```",
    "blanks behind": "``` python  \n{}\n```  \n",
    "Windows": "```python\r\n{}\r\n```\r\nDone.",
    "in a list": "1. It is:\n\n   ~~~ py\n   {}\n   ~~~\n",
    "not closed": "~~~python\n{}",
    "text and output behind": "```python\n{}\n```\nIt prints:\n```text\n4\n```\nI hope this helps!",
    "an example behind": "```python\n{}\n```\nUse it:\n```python\nprint(double(4))\n```",
    "pip before": "~~~bash\npip install x\n~~~\n~~~python\n{}\n~~~",
    "inline before": "The function ```double(x)``` doubles.\n```\n{}\n```\nDone.",
    "inline behind": "```\n{}\n```\nCall ```double(2)``` to try it.",
    "on one line": "```python {}```",
    "on one line in prose": "It is ```{}```, as ```double(2)``` shows.",
    "on one line with an example behind": "```python {}```\nUse it:\n```python\nprint(double(4))\n```",
    "marks in a docstring": '```python\n{}\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```\nDone.',
    "marks in texts": '```python\nmarks = ["```", "```python"]\nprint("```")\n{}\n```\nDone.',
    "closed far to the right": "```python\n{}\n        ```\nDone.",
    "never closed before": "```python\ndef double(x):\n```python\n{}\n```",
}
GUARDS = [
    "if __name__ == '__main__':\n    print(double(int(input())))",
    "import sys\nif __name__ == '__main__':\n    sys.exit(double(0))",
    "if __name__ == '__main__':\n    while True: pass",
]
DATACLASS = """from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Number:
    value: int
"""


def test_a_program_is_found_in_the_fences_that_models_write():
    program = "def double(x): return 2 * x"
    completions = [fence.format(program) for fence in FENCES.values()]
    found, results = marks(completions)
    assert [name for name, mark in zip(FENCES, found, strict=True) if mark != 1.0] == [], results
    assert program_of("```python\nx = '~~~'\n~~~\n```") == "x = '~~~'\n~~~\n"
    assert program_of("```pycon\n>>> 1\n```\n```\na\n```") == "a\n"


def test_a_main_guard_does_not_keep_the_tests_from_running():
    program = "def double(x): return 2 * x\n"
    found, results = marks([program + guard for guard in GUARDS] + [DATACLASS + program])
    assert found == [1.0] * (len(GUARDS) + 1), results


@pytest.mark.parametrize("unit", ["```", "~~~\n", "```python\n", "`", "def a\n", "a = ", "``` ` ", "( ```\n"])
def test_fences_are_read_in_bounded_time(unit):
    started = time.process_time()
    program_of((unit * 100_000)[:100_000], ["a"])
    assert time.process_time() - started < 2.0  # quadratic time would take minutes


TRICKS = {
    "ends well before the tests": "import sys\nsys.exit(0)",
    "ends at once": "import os\nos._exit(0)",
    "says that it passed": "print('0 passed')\nprint('* 0 passed')\ndef double(x): return 0",
    "reads what the tests are told": "import sys\nprint(sys.stdin.read())\ndef double(x): return 0",
    "reads them again": """
import glob, json, os
for path in [*glob.glob("/proc/*/fd/*"), "/dev/stdin"]:
    try:
        os.lseek(0, 0, 0)
        text = os.read(0, 1 << 20).decode() or open(path).read(1 << 20)
        print(json.loads(text)["word"], 0, "passed", flush=True)
        os._exit(0)
    except (OSError, ValueError):
        pass
""",
    "closes the output": "import os\nos.close(1)\ndef double(x): return 0",
    "loops": "while True: pass",
    "eats memory": "x = bytearray(1 << 33)",
    "is no Python": "def double(x) return",
    "is empty": "",
}


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_does_not_pay(name):
    found, [said] = marks([TRICKS[name]], seconds=1.0)
    assert found == [0.0]
    assert said != "passed"


@pytest.mark.slow
def test_partial_marks_are_the_share_of_tests_and_a_limit_is_named():
    program = "def double(x):\n    while x > 5: pass\n    return 2 * x if x else 1"
    tests = ["assert double(1) == 2", "assert double(0) == 0", "assert double(2) == 4", "assert double(6) == 12"]
    assert marks([program], tests, partial_marks=True, seconds=4.0) == (  # on a busy machine it begins late
        [0.5],
        ["test 1: AssertionError: ; limit: time"],
    )
    assert marks([program], tests, seconds=1.0)[0] == [0.0]


def test_tests_that_are_none_fail_loudly():
    for tests, message in (
        ([], "one test or more"),
        ("", "one test or more"),
        ("assert double(2 == 4", "is no Python"),
        ([1], "one test or more"),
    ):
        with (
            Scorer([RewardSpec("code")], columns=["tests"], isolated=False) as scorer,
            pytest.raises(RewardError, match=message),
        ):
            scorer.score(["q"], [["def double(x): return 2 * x"]], [{"tests": tests}], prompt_ids=["p"])


def test_contract_6_a_machine_without_a_sandbox_is_a_failure_and_no_zero(monkeypatch):
    monkeypatch.setattr("rewards.built_in.code.unavailable", lambda: "bubblewrap is missing")
    with (
        Scorer([RewardSpec("code")], columns=["tests"], isolated=False) as scorer,
        pytest.raises(RewardError, match="bubblewrap is missing"),
    ):
        scorer.dry_run("q", "x = 1", {"tests": TEST})


@pytest.mark.long
def test_the_programs_that_attack_the_sandbox_earn_nothing():
    attacks = [program for program, _ in ATTACKS.values()]
    assert len(attacks) >= 30
    assert code(None, attacks, tests=[TEST] * len(attacks), seconds=1.0) == [0.0] * len(attacks)
