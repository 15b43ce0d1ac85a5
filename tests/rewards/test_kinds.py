"""The table of kinds: every kind is found somewhere, and nothing is found that the table does not have."""

import re
from pathlib import Path

from rewards.kinds import ERROR, KINDS, NOTE, WARNING, sections

ROOT = Path(__file__).parents[2]
CALLS = re.compile(r'\b(?:found|add)\(\s*"([a-z0-9-]+)"')


def test_the_table_and_the_instruments_have_the_same_kinds():
    files = [file for package in ("rewards", "review", "grpo") for file in (ROOT / package).rglob("*.py")]
    source = "\n".join(file.read_text() for file in files if file.name != "kinds.py")
    called = set(CALLS.findall(source))
    assert called - KINDS.keys() == set()
    of_rows = sections()["Architectures"]  # made of the names of rows: see test_check.py of `quartet check`
    assert {kind for kind in KINDS if f'"{kind}"' not in source} - of_rows.keys() == set()


def test_each_kind_has_all_its_words():
    for name, kind in KINDS.items():
        assert kind.severity in (ERROR, WARNING, NOTE), name
        assert all(kind), name
        assert kind.honest != kind.faulty, name
