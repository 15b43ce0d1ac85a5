"""Which mistakes `make mutants` makes."""

from mutants import mutants_of

SOURCE = """
def f(x: int = 3) -> int:
    if not x < 2 and ready(x):
        raise ValueError(f"{x + 1}")
    return -x
"""


def test_each_mutant_changes_one_thing_of_one_line_and_no_words():
    lines = SOURCE.splitlines()
    changed = set()
    for line, source in mutants_of(SOURCE).values():
        [(number, new)] = [(i, row) for i, row in enumerate(source.splitlines(), 1) if row != lines[i - 1]]
        assert number == line
        changed.add(new.strip())
    assert changed == {
        "def f(x: int = (4)) -> int:",
        "if (not x < 2 or ready(x)):",
        "if (not (not x < 2 and ready(x))):",
        "if (x < 2) and ready(x):",
        "if not (x <= 2) and ready(x):",
        "if not x < (3) and ready(x):",
        "pass",
        "return (x)",
    }
