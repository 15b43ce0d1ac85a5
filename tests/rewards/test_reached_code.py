"""What of a user's file belongs to a reward function."""

import pytest

from rewards.reached_code import code_sha256

FILE = """from __future__ import annotations
import os, re
import json as j
from math import sqrt

LIMIT, OTHER = 3, 4
TABLE = {}
TABLE["a"] = 1
UNUSED = [1]
WORDS = ["x"]
WORDS.append("y")
assert len(UNUSED) == 1

try:
    import fast
except ImportError:
    fast = None

class Parser:
    pattern = re.compile("a")

def helper(text, scale=LIMIT):
    if fast:
        return 0
    return Parser().pattern.match(text), TABLE, [w for w in WORDS], scale

def unrelated(x):
    return sqrt(x)

def decorate(f):
    return f

@decorate
def grade(completions, **_):
    unrelated = 1  # a local of this name
    return [bool(helper(c)) for c in completions]

def other(completions):
    return [len(c) for c in completions]

if __name__ == "__main__":
    print(grade(["a"]))
"""


REACHED = [
    ("bool(helper(c))", "not helper(c)"),
    ("return 0", "return 1"),
    ('re.compile("a")', 're.compile("b")'),
    ("LIMIT, OTHER = 3", "LIMIT, OTHER = 5"),
    ('TABLE["a"] = 1', 'TABLE["a"] = 2'),
    ('WORDS.append("y")', 'WORDS.append("z")'),
    ("import os, re", "import os, regex as re"),
    ("    import fast", "    import faster as fast"),
    ("    fast = None", "    fast = True"),
    ("    return f", "    return lambda *a, **b: f(*a, **b)"),
    ("def grade(completions, **_)", "def grade(completions, answer=None, **_)"),
    ("from __future__ import annotations\n", ""),
    ("def helper(text, scale=LIMIT)", "def helper(text, scale=OTHER)"),
    ("\nif __name__", "\nhelper = len\n\nif __name__"),  # bound again, later
    ("\nif __name__", "\ngrade.weight = 2\n\nif __name__"),
    ("\nif __name__", "\nfrom anywhere import *\n\nif __name__"),
]
ELSEWHERE = [
    ("len(c) for c", "2 * len(c) for c"),  # another reward
    ("return sqrt(x)", "return -sqrt(x)"),  # called like a local of grade
    ("  # a local of this name", ""),
    ("import os, re", "import os, re, sys"),
    ("import json as j", "import json as k"),
    ("UNUSED = [1]", "UNUSED = [2]"),
    ("assert len(UNUSED) == 1", ""),  # shares only a built-in function with what is reached
    ('print(grade(["a"]))', 'print(grade(["b"]))'),
    ("class Parser:\n", "class Parser:\n\n\n"),
    ("\ndef other", "\ndef added():\n    return helper\n\ndef other"),
]


@pytest.mark.parametrize(("changes", "is_seen"), [(REACHED, True), (ELSEWHERE, False)])
def test_a_change_of_what_is_reached_is_seen_and_of_nothing_else(changes, is_seen):
    for then, now in changes:
        assert FILE.count(then) == 1
        changed = code_sha256(FILE.replace(then, now).encode(), "grade")
        assert (changed != code_sha256(FILE.encode(), "grade")) == is_seen, (then, now)


@pytest.mark.parametrize(
    "file", ["def grade(:\n", "from own import *\n", "def grade(x):\n    return globals()['f'](x)\n"]
)
def test_where_the_file_does_not_say_what_is_reached_all_of_it_counts(file):
    assert code_sha256(file.encode(), "grade") != code_sha256(f"{file}\nf = 1\n".encode(), "grade")
    assert code_sha256(FILE.encode(), "grade") != code_sha256(FILE.encode(), "other")
