"""What conftest.py promises: signals, seeds and the limit of time."""

import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

CONFTEST = Path(__file__).parent / "conftest.py"
SUITE = """
import subprocess, sys, time

CODE = "import signal as s; print(s.getsignal(s.SIGINT) is s.default_int_handler, *map(s.getsignal, [3, 1]))"
CHILD = subprocess.check_output([sys.executable, "-c", CODE], text=True)

def test_a_child_has_default_signals():
    assert CHILD == "True 0 0\\n"

def test_hangs():
    time.sleep(100)
"""


@pytest.mark.slow
def test_contract_21_children_of_nohup_have_default_signals_and_a_test_that_hangs_ends_by_name(tmp_path):
    text = CONFTEST.read_text()
    (tmp_path / "conftest.py").write_text(text.replace("LIMIT_S, SLOW_LIMIT_S = 300,", "LIMIT_S, SLOW_LIMIT_S = 3,"))
    (tmp_path / "test_it.py").write_text(SUITE)
    pytest_of_nohup = "trap '' INT QUIT HUP; exec \"$0\" -m pytest -p no:cacheprovider -v test_it.py"
    command = ["sh", "-c", pytest_of_nohup, sys.executable]
    variables = os.environ | {"PYTHONPATH": str(CONFTEST.parent / "cases")}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
    assert "test_a_child_has_default_signals PASSED" in done.stdout
    assert done.returncode == 1
    assert f'File "{tmp_path / "test_it.py"}", line 11 in test_hangs' in done.stderr


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def draws_of(name: str) -> list[float]:
    number = zlib.crc32(name.encode())
    own = torch.rand((), generator=torch.Generator().manual_seed(number))
    return [random.Random(number).random(), np.random.RandomState(number).rand(), own.item()]


@pytest.fixture(scope="module")
def shared() -> list[float]:
    return draws()


@pytest.mark.parametrize("place", ["first", "second"])
def test_contract_21_what_a_test_draws_does_not_depend_on_those_before_it(request, shared, place):
    assert shared == draws_of("shared")
    assert draws() == draws_of(request.node.name)
