"""The arguments that bash itself gives the command of a script, in an environment without any other program.

The folder of stubs is the whole PATH: python3 and uv write down their arguments, `date` and the like are the
system's, and whatever else a script calls does nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = "verl.trainer.main_ppo"
PROGRAMS = (PROGRAM, "recipe.dapo.main_dapo", "dapo.main_dapo")
STARTS = ("python3", "python", "uv", "torchrun", "ray", "nohup", "sudo", "accelerate")
REAL = ("bash", "date", "dirname", "basename", "cat", "env", "realpath", "tee", "tr", "cut", "grep", "awk", "sed", "wc")
REAL = (*REAL, "head")
NOTHING = ("mkdir", "pip", "pip3", "sleep", "pkill", "rm", "chmod", "touch", "clear")
PRELUDE = """ulimit() { :; }
command_not_found_handle() { return 0; }
"""
STUB = """#!/bin/bash
for word in "$@"; do
    case "$word" in
        verl.trainer.main_ppo | recipe.dapo.main_dapo | dapo.main_dapo | *verl/trainer/main_ppo.py)
            [ -e "$WORDS_OF_STUB" ] || printf '%s\\0' "$@" > "$WORDS_OF_STUB"
            exit 0
            ;;
    esac
done
[ "$1" = -c ] && exit 1
exit 0
"""


def words_of_bash(
    script: Path, folder: Path, environment: Mapping[str, str] | None = None, arguments: Sequence[str] = ()
) -> list[str] | None:
    """What the script hands to one of `PROGRAMS`; None if it ends without it."""
    stubs, found = folder / "stubs", folder / "words"
    found.unlink(missing_ok=True)
    if not stubs.is_dir():
        _write_stubs(stubs)
    given = {"HOME": os.environ.get("HOME", "/home"), "PATH": str(stubs), "WORDS_OF_STUB": str(found)}
    given["BASH_ENV"] = str(stubs / "prelude")
    subprocess.run(
        [shutil.which("bash") or "bash", "--norc", "--noprofile", str(script), *arguments],
        env=given | dict(environment or {}),
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    if not found.exists():
        return None
    words = found.read_text(encoding="utf-8").split("\0")[:-1]
    at = next(number for number, word in enumerate(words) if word in PROGRAMS or word.endswith("main_ppo.py"))
    return words[at + 1 :]


def _write_stubs(folder: Path) -> None:
    folder.mkdir()
    (folder / "prelude").write_text(PRELUDE)
    for name in STARTS:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    for name in NOTHING:
        (folder / name).write_text("#!/bin/bash\n")
        (folder / name).chmod(0o755)
    for name in REAL:
        if path := shutil.which(name):
            (folder / name).symlink_to(path)
