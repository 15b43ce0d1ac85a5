"""The python environment: programs run in the sandbox, and what goes wrong is told in one line."""

import pytest

from rewards.isolation import sandbox
from rewards.isolation.sandbox import SandboxUnavailable
from rollout.environments import python
from rollout.environments.python import LONGEST_ANSWER, Python

needs_sandbox = pytest.mark.skipif(sandbox.unavailable() is not None, reason=str(sandbox.unavailable()))


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("print(6 * 7)", "42"),
        ("import math\nprint(math.comb(10, 3))\nprint('done')", "120\ndone"),
        ("x = 1", "nothing was printed"),
        ("print(1)\n1 / 0", "1\nerror: ZeroDivisionError: division by zero"),
        ("print((", "error: SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "error: exit code 3"),
        ("print(open('/etc/passwd').read())", "error: it may use no files outside of its folder"),
        ("x = [0] * 10**10", "error: it needs more than 512 MiB of memory"),
        ("import os; os.fork()", "error: it may start no process"),
    ],
)
def test_a_program_is_answered(program, answer):
    environment = Python()
    assert environment.reset(question="?") is None
    assert environment.run(program) == answer


@needs_sandbox
def test_long_answers_are_cut_in_the_middle():
    answer = Python().run("print('a' * 5000 + 'z' * 5000)")
    assert answer == "a" * (LONGEST_ANSWER // 2) + "\n...\n" + "z" * (LONGEST_ANSWER // 2)


@needs_sandbox
def test_nothing_stays_from_call_to_call():
    """Folders that are there are those of a first call: an interpreter below /tmp has one in the sandbox's /tmp too."""
    environment = Python()
    files = "[name for name in os.listdir() if not os.path.isdir(name)]"
    look = f"import os; print({files}, sorted(os.listdir()), 'x' in globals())"
    before = environment.run(look)
    assert before.startswith("['main.py'] [")
    assert before.endswith("] False")
    assert (
        environment.run("import os; open('left', 'w').write('x'); os.mkdir('folder'); x = 1; print('here')") == "here"
    )
    assert environment.run(look) == before


def test_without_a_sandbox_there_is_no_environment(monkeypatch):
    monkeypatch.setattr(python, "unavailable", lambda: "no namespaces here")
    with pytest.raises(SandboxUnavailable, match="no namespaces here"):
        Python()
