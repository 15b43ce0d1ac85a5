"""Systems other than Linux, whose gaps tests/cases/other_systems.py imitates; nobody has run the tests on them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_ON_WINDOWS = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses"}


def _imported_at_once(source: str) -> set[str]:
    """What a file imports when it is loaded, unless a condition on the platform is around it."""
    body = ast.parse(source).body
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in body if isinstance(node, ast.ImportFrom)}


def test_no_file_imports_at_once_what_windows_lacks():
    assert _imported_at_once("import os, fcntl\nif os.name:\n    import pwd") & NOT_ON_WINDOWS == {"fcntl"}
    files = [
        file
        for package in ("policies", "rollout", "rewards", "review", "grpo")
        for file in (ROOT / package).rglob("*.py")
    ]
    guilty = [file.name for file in files if _imported_at_once(file.read_text(encoding="utf-8")) & NOT_ON_WINDOWS]
    assert guilty == []


@pytest.mark.slow
def test_windows_and_macos_import_everything_score_stop_and_train(tmp_path):
    command = [sys.executable, str(ROOT / "tests/cases/other_systems.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert "win32: " in done.stdout
    assert "darwin: " in done.stdout
    assert "on Windows rewards run in the process of the run" in done.stderr
